"""What `tandem deploy render` writes: it fits Ray's and Kubernetes' schemas, has room for the pools, and no secrets."""

from __future__ import annotations

import copy
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.kubernetes import validate_manifest
from tandem.cluster.cli.app import app
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.deploy.kuberay import KubeOptions, render_kuberay
from tandem.deploy.machines import OFFERS, Provider
from tandem.deploy.nodes import plan_nodes
from tandem.deploy.ray_up import Site, extras, render_ray_cluster
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]

GPUS = """
model: {path: /models/qwen3-8b}
pools:
  prefill: {replicas: 2, gpus_per_replica: 4, tensor_parallel: 4, cpus_per_replica: 8}
  decode: {replicas: 4, gpus_per_replica: 2, tensor_parallel: 2, cpus_per_replica: 4.5}
offload:
  tiers:
    - {kind: host, capacity: 64GiB}
    - {kind: disk, capacity: 1000GB, path: [/scratch/a, /scratch/b]}
    - {kind: s3, capacity: 1GiB, bucket: kv}
gateway: {host: 10.0.0.1, port: 8123, api_keys: [sk-not-for-files]}
"""
CPUS = "pools: {prefill: {replicas: 3}, decode: {replicas: 2, cpus_per_replica: 1.5}}"

TARGETS = {
    "onprem": ["--target", "ray", "--head", "10.0.0.1", "--worker", "10.0.0.2", "--ssh-key", "~/.ssh/id"],
    "aws": ["--target", "ray", "--provider", "aws", "--zone", "us-west-2b"],
    "gcp": ["--target", "ray", "--provider", "gcp", "--project", "some-project", "--machine", "a3-ultragpu-8g"],
    "kuberay": ["--target", "kuberay", "--model-claim", "models"],
}


def config(text: str) -> Config:
    return Config.model_validate(yaml.safe_load(text))


def render(tmp_path: Path, text: str, arguments: list[str]) -> dict[str, list[Any]]:
    """Run the command; the documents of each file."""
    (tmp_path / "my.yaml").write_text(text)
    result = CliRunner().invoke(
        app, ["deploy", "render", str(tmp_path / "my.yaml"), *arguments, "--output", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output or result.exception
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("text", [GPUS, CPUS], ids=["gpus", "cpus"])
@pytest.mark.parametrize("target", ["onprem", "aws", "gcp"])
def test_ray_takes_the_launch_file(
    tmp_path: Path, target: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from ray.autoscaler._private.util import prepare_config, validate_config

    (tree,) = render(tmp_path, text, TARGETS[target])["cluster.yaml"]
    prepared = prepare_config(copy.deepcopy(tree))  # as `ray up` does
    validate_config(prepared)
    commands = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in prepared["setup_commands"]:
        shlex.split(command)

    with pytest.raises(jsonschema.ValidationError):  # the schema can be failed
        validate_config(prepared | {"setup_comands": []})


def test_ray_is_asked_for_what_the_pools_need(tmp_path: Path) -> None:
    (aws,) = render(tmp_path, GPUS, TARGETS["aws"])["cluster.yaml"]
    gpu = aws["available_node_types"]["gpu"]
    assert gpu["node_config"]["InstanceType"] == "p5.48xlarge"
    assert (
        gpu["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 1200
    )  # the disk tier's, and the system's
    assert gpu["min_workers"] == gpu["max_workers"] == aws["max_workers"] == 2  # 2 × 4 and 4 × 2 GPUs
    assert gpu["resources"] == {"CPU": 192, "GPU": 8}
    assert aws["available_node_types"][aws["head_node_type"]]["resources"] == {"CPU": 0}
    assert '"$HOME/tandem[gpu,nixl,s3]"' in aws["setup_commands"][-1]

    (cpu,) = render(tmp_path, CPUS, TARGETS["gcp"])["cluster.yaml"]
    assert cpu["available_node_types"]["cpu"]["min_workers"] == 1
    assert "gpu" not in cpu["available_node_types"]


def test_extras_are_those_of_the_package() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = set(extras(config(GPUS))) | set(extras(config("kv: {transport: ucx}")))
    asked |= set(extras(config("observability: {traces: {endpoint: 'http://collector:4318/v1/traces'}}")))
    assert asked == {"gpu", "nixl", "otel", "s3", "ucx"}
    image = (ROOT / "deploy" / "image" / "Dockerfile").read_text()
    in_image = re.search(r"ARG EXTRAS=(\S+)", image)
    assert in_image is not None
    assert asked | set(in_image[1].split(",")) <= declared


@pytest.mark.parametrize("text", [GPUS, CPUS], ids=["gpus", "cpus"])
def test_kubernetes_takes_the_manifests(tmp_path: Path, text: str) -> None:
    files = render(tmp_path, text, TARGETS["kuberay"])
    assert set(files) == {"raycluster.yaml", "launch.yaml", "gateway.yaml", "disruption.yaml"}
    for documents in files.values():
        for manifest in documents:
            validate_manifest(manifest)
            for path in _fields(manifest):
                broken = copy.deepcopy(manifest)
                _at(broken, path)["mispelt"] = 1
                with pytest.raises(jsonschema.ValidationError):
                    validate_manifest(broken)


def _fields(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where an object has fields of its kind, not names that a user chooses."""
    if isinstance(tree, dict):
        if path and path[-1] in ("labels", "matchLabels", "selector", "rayStartParams", "clusterSelector"):
            return
        yield path
        for key, value in tree.items():
            yield from _fields(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _fields(value, (*path, index))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def test_pods_have_what_the_pools_need(tmp_path: Path) -> None:
    files = render(tmp_path, GPUS, TARGETS["kuberay"])
    (cluster,), (launch,) = files["raycluster.yaml"], files["launch.yaml"]
    spec = cluster["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["groupName"], group["replicas"]) == ("gpu", 2)
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["limits"]["cpu"] == group["rayStartParams"]["num-cpus"] == "18"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shared = int(volumes["shm"]["emptyDir"]["sizeLimit"])
    assert shared >= (64 << 30) + int(group["rayStartParams"]["object-store-memory"])
    assert int(container["resources"]["limits"]["memory"]) > shared
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/dev/shm", "/models/qwen3-8b", "/scratch/a", "/scratch/b"}
    assert set(mounts.values()) == set(volumes)

    # The gateway is on the head, where the job runs, and answers at the address of its pod.
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable for variable in head["env"]}
    shown = re.search(r"gateway\.host=\$(\w+)", launch["spec"]["entrypoint"])
    assert shown is not None
    assert variables[shown[1]]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    service, policy = files["gateway.yaml"]
    assert service["spec"]["ports"][0]["port"] == 8123
    assert {"name": "gateway", "containerPort": 8123} in head["ports"]
    assert service["spec"]["selector"] == {"ray.io/cluster": "tandem", "ray.io/node-type": "head"}
    assert launch["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}

    # Everybody knows where health is told, and only Prometheus and the cluster reach it.
    assert "--set supervisor.port=9464" in launch["spec"]["entrypoint"]
    assert {"name": "health", "containerPort": 9464} in head["ports"]
    assert {"name": "health", "containerPort": 9464} in container["ports"]
    (told,) = [rule for rule in policy["spec"]["ingress"] if {"protocol": "TCP", "port": 9464} in rule.get("ports", ())]
    assert [peer["podSelector"]["matchLabels"] for peer in told["from"]] == [{"app.kubernetes.io/name": "prometheus"}]

    # Only the cluster reaches every port.
    open_to_all_ports = [rule["from"] for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert open_to_all_ports == [[{"podSelector": policy["spec"]["podSelector"]}]]
    assert all(peer.get("podSelector") for rule in policy["spec"]["ingress"] for peer in rule["from"])

    budgets = {budget["metadata"]["name"]: budget["spec"]["minAvailable"] for budget in files["disruption.yaml"]}
    assert budgets == {"tandem-head": 1, "tandem-gpu": 1}

    # The image has the user that the pods run as.
    image = (ROOT / "deploy" / "image" / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in image


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path names; Ray's health is good."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/local_raylet_healthz" else self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl, which the image has")
def test_a_pod_is_ready_when_its_ranks_are(tmp_path: Path) -> None:
    """The probe's own command, against servers that answer as Ray's node and the supervisor do."""
    (cluster,) = render(tmp_path, "supervisor: {port: 45678}", ["--target", "kuberay"])["raycluster.yaml"]
    (container,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert "httpGet" in container["livenessProbe"]  # a rank that stands still is no reason to end the pod
    shell, option, script = container["readinessProbe"]["exec"]["command"]

    def ready(ray: int, ranks: int) -> bool:
        command = script.replace(":52365/", f":{ray}/").replace(":45678/", f":{ranks}/")
        assert command != script
        environment = {"TANDEM_POD_ADDRESS": "127.0.0.1", "PATH": os.environ["PATH"]}
        return subprocess.run([shell, option, command], env=environment, capture_output=True).returncode == 0

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        there, refused = server.server_address[1], nobody.getsockname()[1]
        threading.Thread(target=server.serve_forever).start()
        try:
            assert ready(there, refused)  # before `tandem up`
            assert ready(there, there)
            assert not ready(refused, there)
            _Answers.status = 503
            assert not ready(there, there)
        finally:
            _Answers.status = 200
            server.shutdown()


@pytest.mark.parametrize("target", TARGETS)
def test_no_secret_is_written(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "feedc0de" * 8)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "feedc0de" * 5)
    files = json.dumps(render(tmp_path, GPUS, TARGETS[target]))
    assert "sk-not-for-files" not in files
    assert "feedc0de" not in files


@given(
    replicas=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    gpus=st.tuples(st.sampled_from([0, 1, 2, 4, 8]), st.sampled_from([0, 1, 2, 4, 8])),
    cpus=st.tuples(st.floats(0, 16), st.floats(0, 16)),
)
def test_every_worker_finds_its_node(
    replicas: tuple[int, int], gpus: tuple[int, int], cpus: tuple[float, float]
) -> None:  # fmt: skip
    pools = {
        role: {"replicas": count, "gpus_per_replica": num_gpus, "tensor_parallel": num_gpus or 1, "cpus_per_replica": num_cpus}
        for role, count, num_gpus, num_cpus in zip(("prefill", "decode"), replicas, gpus, cpus, strict=True)
    }  # fmt: skip
    groups = plan_nodes(Config.model_validate({"pools": pools}), node_gpus=8, gpu_node_cpus=96, cpu_node_cpus=32)
    wanted_gpus = sum(count * num_gpus for count, num_gpus in zip(replicas, gpus, strict=True))
    assert sum(group.num_nodes * group.num_gpus for group in groups) >= wanted_gpus
    assert all(group.num_gpus <= 8 and group.num_cpus <= (96 if group.num_gpus else 32) for group in groups)
    # First-fit decreasing wastes no GPU where sizes divide each other: there are as few nodes as GPUs allow.
    if min(gpus) and sum(count * num_cpus for count, num_cpus in zip(replicas, cpus, strict=True)) <= 96:
        assert groups[0].num_nodes == -(-wanted_gpus // 8)


@pytest.mark.parametrize("claim", [None, "cache"])
def test_pods_fetch_from_the_hub(claim: str | None) -> None:
    options = KubeOptions(name="tandem", image="tandem:1", model_claim=claim)
    cluster = render_kuberay(config("model: {path: Qwen/Qwen3-8B}"), options)["raycluster.yaml"][0]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == "hub"]
        [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == "hub"]
        assert {"name": "HF_HOME", "value": mount["mountPath"]} in container["env"]
        assert not mount.get("readOnly")
        assert {"secretRef": {"name": "tandem-hub", "optional": True}} in container["envFrom"]
        assert ("emptyDir" in volume) == (claim is None)


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("model: {path: /m}", {}, "--model-claim"),
        ("model: {path: ~/m}", {"model_claim": "m"}, "begins with /"),
        ("{}", {"name": "Tandem"}, "--name Tandem"),
        ("{}", {"worker_memory_bytes": 1 << 20}, "--worker-memory"),
        ("pools: {colocated: {gpus_per_replica: 4, tensor_parallel: 4}}", {"gpus_per_node": 2}, "pools.colocated.gpus_per"),
    ],
)  # fmt: skip
def test_what_pods_cannot_have_is_told(text: str, options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(found)) as error:
        render_kuberay(config(text), KubeOptions(**{"name": "tandem", "image": "tandem:1", **options}))
    assert error.value.fix


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "--head"),
        ({"head": "10.0.0.1"}, "2 nodes of 8 GPUs; there are 1"),
        ({"provider": Provider.GCP}, "--project"),
        ({"provider": Provider.AWS, "machine": "p6"}, "known: p5.48xlarge"),
        ({"provider": Provider.AWS, "machine": "g6e.4xlarge"}, "a node has 1"),
        ({"provider": Provider.AWS, "source": Path("/nowhere")}, "pyproject.toml"),
    ],
)
def test_what_ray_cannot_have_is_told(options: dict[str, Any], found: str) -> None:
    site = {"provider": Provider.ONPREM, "name": "tandem", "file": Path("my.yaml"), "source": ROOT}
    with pytest.raises(ConfigError, match=re.escape(found)) as error:
        render_ray_cluster(config(GPUS), Site(**{**site, **options}))
    assert error.value.fix


def test_every_cloud_has_machines() -> None:
    assert set(OFFERS) == set(Provider) - {Provider.ONPREM}
    for offer in OFFERS.values():
        assert all(machine.num_gpus for machine in offer.gpu)
        assert not offer.cpu.num_gpus + offer.head.num_gpus
