"""`tandem up`, `status` and `down` on a Ray cluster of two nodes that is there already."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support.patience import stretched
from support.served import TANDEM, free_port, wait_for

pytestmark = pytest.mark.e2e

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class RayCluster:
    """Two nodes on the loopback address, one logical CPU each, in a folder of their own."""

    def __init__(self, home: Path) -> None:
        # Sockets live below it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-test-"))
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = os.environ | {
            "XDG_CACHE_HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": self.address, "COLUMNS": "200",
        }  # fmt: skip
        port = self.address.rpartition(":")[2]
        common = [
            "--num-cpus=1",
            "--node-ip-address=127.0.0.1",
            "--disable-usage-stats",
            "--object-store-memory=80000000",
        ]
        try:
            self.start("--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false", *common)
            self.start(f"--address={self.address}", *common)
        except BaseException:
            self.close()
            raise

    def start(self, *arguments: str) -> None:
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        for _ in range(3):
            done = subprocess.run(
                [*RAY, "start", *arguments], env=environment, capture_output=True, text=True, timeout=stretched(120)
            )
            if "timed out during startup" not in done.stdout + done.stderr:  # Ray waits for 30 s, however busy all is
                break
        assert done.returncode == 0, done.stdout + done.stderr

    def tandem(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TANDEM, *arguments], env=self.environment, capture_output=True, text=True, timeout=stretched(180)
        )

    def processes(self, folder: Path | None = None) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if any(file.path.startswith(str(folder or self.folder)) for file in process.open_files()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self, folder: Path) -> None:
        """Kill what uses a session's folder, and remove it."""
        for process in self.processes(folder):
            try:
                process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self.end(self.folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    cluster = RayCluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.close()


def test_up_status_down(cluster: RayCluster) -> None:
    """One logical CPU a node, one a worker: prefill and decode live on different nodes."""
    port = free_port()
    assert "no Tandem runs on this Ray cluster" in cluster.tandem("status").stderr
    up = cluster.tandem("up", "--set", f"gateway.port={port}", "--set", "routing.local_prefill=never")
    assert up.returncode == 0, up.stdout + up.stderr
    assert f"serving tandem-demo at http://127.0.0.1:{port}/v1" in up.stdout
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
    wait_for(lambda: client.get("/readyz").status_code == 200, 30, "/readyz")
    answer = client.post("/v1/completions", json={"prompt": list(range(10, 900)), "max_tokens": 4})
    assert answer.status_code == 200

    table = cluster.tandem("status")
    assert table.returncode == 0, table.stderr
    for word in ("worker", "prefill-0", "decode-0", "gateway-0", "ready", "blocks used", "leases", "output tok/s"):
        assert word in table.stdout, table.stdout
    rows = [json.loads(line) for line in cluster.tandem("status", "--json").stdout.splitlines()]
    by_worker = {row["worker"]: row for row in rows}
    assert by_worker["prefill-0"]["report"]["prompt_tokens"] == 890
    assert by_worker["decode-0"]["report"]["received_bytes"] > 0
    assert by_worker["decode-0"]["restarts"] == 0
    assert "output_tokens_per_s" in by_worker["decode-0"]

    parents = set()
    for process in cluster.processes():
        files = " ".join(file.path for file in process.open_files())
        if "/prefill-0#1.log" in files or "/decode-0#1.log" in files:
            parents.add(process.ppid())
    assert len(parents) == 2, "each worker's parent is its own node's raylet"

    again = cluster.tandem("up", "--set", f"gateway.port={free_port()}")
    assert again.returncode == 1
    assert "Tandem already runs on this Ray cluster" in again.stderr
    assert "`tandem down` stops it" in again.stderr

    down = cluster.tandem("down")
    assert down.returncode == 0, down.stderr
    with pytest.raises(httpx.HTTPError):
        client.get("/livez")
    client.close()
    assert "no Tandem runs" in cluster.tandem("down").stderr


def test_what_does_not_fit_is_refused_and_leaves_nothing(cluster: RayCluster) -> None:
    up = cluster.tandem("up", "--set", "pools.prefill={replicas: 5}")
    assert up.returncode == 1
    assert "prefill-2 needs 1 CPU on one node, beside the other workers; free are" in up.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up = cluster.tandem("up", "--set", f"gateway.port={port}")
    assert up.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in up.stderr
    assert "no Tandem runs" in cluster.tandem("status").stderr


def test_up_ends_where_rdma_is_required_and_missing(cluster: RayCluster) -> None:
    port = free_port()
    start_s = time.monotonic()
    up = cluster.tandem("up", "--set", f"gateway.port={port}", "--set", "kv={transport: zmq, require_rdma: true}")
    assert up.returncode == 1, up.stdout
    assert time.monotonic() - start_s < stretched(60)
    assert "decode-0#1 cannot read KV from prefill-0#1: kv.transport zmq: nothing works" in up.stderr
    assert "no Tandem runs" in cluster.tandem("status").stderr
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_doctor_sees_both_nodes(cluster: RayCluster) -> None:
    done = cluster.tandem("doctor", "--json", "--set", f"gateway.port={free_port()}")
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert summary["fail"] == 0
    checks = {row["check"]: row for row in rows}
    assert checks["Ray"]["measured"].endswith(cluster.address)
    assert checks["authentication"]["measured"] == "by token"
    nodes = {checks[f"place of {worker}"]["measured"].split()[-1] for worker in ("prefill-0", "decode-0")}
    assert len(nodes) == 2, "as workers would be spread"
    assert any(row["check"].startswith("clock of") for row in rows)
    assert sum(row["check"] == "shared memory" for row in rows) == 2, "each node is looked at"
    assert "GB/s" in checks["zmq"]["measured"]
    again = cluster.tandem("doctor", "--json", "--set", "pools.prefill.replicas=4", "--limit-s", "60")
    assert again.returncode == 1
    failed = [json.loads(line) for line in again.stdout.splitlines() if '"verdict": "fail"' in line]
    assert "needs 1 CPU on one node, beside the other workers" in failed[0]["measured"]
    assert "no Tandem runs" in cluster.tandem("down").stderr, "the doctor starts none"


def test_a_cluster_that_lets_strangers_in_is_refused(cluster: RayCluster) -> None:
    """Reachable from the network, and without token authentication: neither `up` nor the doctor joins it."""
    address = next(
        (found.address for name, addresses in psutil.net_if_addrs().items() for found in addresses
         if found.family == socket.AF_INET and not found.address.startswith("127.")),
        None,
    )  # fmt: skip
    if address is None:
        pytest.skip("this machine has the loopback address alone")
    folder = Path(tempfile.mkdtemp(prefix="ray-test-"))
    open_ray = f"{address}:{free_port()}"
    environment = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_A")}
    # Left unset, Ray takes a token that this user may have in a file.
    environment["RAY_AUTH_MODE"] = "disabled"
    try:
        subprocess.run(
            [*RAY, "start", "--head", f"--node-ip-address={address}", f"--port={open_ray.rpartition(':')[2]}",
             f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats", "--num-cpus=2",
             "--object-store-memory=80000000"],
            env=environment, check=True, capture_output=True, timeout=stretched(120),
        )  # fmt: skip
        for command in (["up"], ["status"], ["doctor", "--json"]):
            done = subprocess.run(
                [TANDEM, *command, "--address", open_ray],
                env=environment,
                capture_output=True,
                text=True,
                timeout=stretched(180),
            )
            assert done.returncode == 1, done.stdout
            told = done.stdout + done.stderr
            assert "can be reached from the network, and this environment does not ask for token authentication" in told
            assert "set RAY_AUTH_MODE=token" in told
    finally:
        cluster.end(folder)


def test_a_wrong_token_is_refused(cluster: RayCluster) -> None:
    done = subprocess.run(
        [TANDEM, "status"], env=cluster.environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, capture_output=True,
        text=True, timeout=stretched(180),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "token" in done.stderr.lower()
