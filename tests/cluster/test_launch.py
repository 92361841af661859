"""`tandem up` where something is amiss: it ends within a minute, names what, and leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gateway import wait_for
from support.hosts import Hosts, RayHosts
from support.served import TANDEM

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo-model"
LIMIT_S = 60.0
"""On an idle machine; one that has more to do than cores takes longer by so much."""
NOTHING: dict[str, list[str]] = {"groups": [], "named": []}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    hosts = Hosts(3)
    try:
        with RayHosts(tmp_path_factory.mktemp("launch"), hosts, cpus=1) as cluster:
            yield cluster
    finally:
        hosts.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model in a folder of its own."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def limit_s() -> float:
    return LIMIT_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def up_fails(cluster: RayHosts, *arguments: str, **environment: str) -> str:
    """What `tandem up` says; it ends in time and leaves nothing."""
    start_s = time.monotonic()
    done = cluster.tandem("up", "--set", f"gateway.host={cluster.hosts[1].address}", *arguments, **environment)
    assert time.monotonic() - start_s < limit_s(), done.stdout + done.stderr
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    assert "fix: " in done.stderr or "did you mean" in done.stderr, done.stderr
    left_nothing(cluster)
    return done.stderr


def left_nothing(cluster: RayHosts) -> None:
    # Ray tells of the end of an actor a little later.
    wait_for(lambda: cluster.left() == NOTHING, 30, "the end of actors and placement groups")


def test_gpus_that_are_not_there(cluster: RayHosts) -> None:
    told = up_fails(cluster, "--set", "pools.decode.gpus_per_replica=1")
    assert "decode-0 needs 1 GPU and 1 CPU on one node; none of the 3 nodes of the Ray cluster has a GPU" in told
    assert "pools.decode.gpus_per_replica: 0" in told


def test_too_few_cpus(cluster: RayHosts) -> None:
    told = up_fails(cluster, "--set", "pools.decode.replicas=2")
    assert "needs 1 CPU on one node, beside the other workers; free are" in told
    told = up_fails(cluster, "--set", "pools.prefill.cpus_per_replica=2")
    assert "prefill-0 needs 2 CPUs on one node; the largest has 1 CPU" in told


def test_too_little_memory(cluster: RayHosts) -> None:
    told = up_fails(cluster, "--set", "pools.decode.kv={capacity: 64KiB}")
    assert "decode-0#1 at 10.214." in told
    assert "kv.capacity" in told


def test_a_key_that_does_not_exist(cluster: RayHosts, tmp_path: Path) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text("pools: {prefill: {}, decod: {}}\n")
    told = up_fails(cluster, str(file))
    assert "decod" in told
    assert "decode" in told


def test_a_wrong_token(cluster: RayHosts) -> None:
    told = up_fails(cluster, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert "refuses this environment's token" in told
    assert "RAY_AUTH_TOKEN" in told


@pytest.mark.parametrize("section", ["gateway", "control"])
def test_a_port_that_is_taken(cluster: RayHosts, section: str) -> None:
    host = cluster.hosts[1].address
    code = f"import socket, time; s = socket.create_server(({host!r}, 9000)); print('up', flush=True); time.sleep(600)"
    command = [*cluster.hosts[1].prefix, sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as taken:
        assert taken.stdout is not None
        taken.stdout.readline()
        try:
            told = up_fails(cluster, "--set", f"{section}.port=9000", "--set", f"{section}.host={host}")
        finally:
            taken.kill()
    assert f"cannot listen on {host}:9000" in told


def test_a_node_without_the_model(cluster: RayHosts, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    host = cluster.hosts[2]
    subprocess.run([*host.prefix, "mount", "--bind", str(tmp_path / "empty"), str(model)], check=True)
    try:
        told = up_fails(cluster, "--set", f"model.path={model}")
    finally:
        subprocess.run([*host.prefix, "umount", str(model)], check=True)
    assert f"at {host.address}: model.path: {model}: it has no config.json" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_launch_whose_command_ends(cluster: RayHosts, number: signal.Signals, tmp_path: Path) -> None:
    """It is over, too: nobody would know of it."""
    output = tmp_path / "up.out"
    with output.open("w") as file:
        up = subprocess.Popen(
            [*cluster.hosts[1].prefix, TANDEM, "up", "--set", f"gateway.host={cluster.hosts[1].address}"],
            env=cluster.environment | {"RAY_ADDRESS": cluster.address}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    wait_for(lambda: "prefill-0: starting" in output.read_text(), 60, "the launch")
    [command] = [pid for pid in cluster.hosts[1].pids() if is_tandem_up(pid)]
    subprocess.run(["kill", f"-{number.value}", str(command)], check=True)
    assert up.wait(timeout=60) != 0
    wait_for(lambda: cluster.left() == NOTHING, 60, "the end of actors and placement groups")


def is_tandem_up(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"tandem\0up\0" in command and not command.startswith(b"nsenter\0")
    except OSError:
        return False


def test_a_host_that_dies_meanwhile(cluster: RayHosts, tmp_path: Path) -> None:
    output = tmp_path / "up.out"
    with output.open("w") as file:
        up = subprocess.Popen(
            [*cluster.hosts[1].prefix, TANDEM, "up", "--set", f"gateway.host={cluster.hosts[1].address}"],
            env=cluster.environment | {"RAY_ADDRESS": cluster.address}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    wait_for(lambda: "prefill-0: starting" in output.read_text(), 60, "the launch")
    cluster.hosts[2].kill()
    assert up.wait(timeout=limit_s()) == 1
    told = output.read_text()
    assert "#1 died while it started" in told or "died meanwhile" in told, told  # or it was not there yet
    assert "node" in told
    cluster.start(cluster.hosts[2])
    left_nothing(cluster)
