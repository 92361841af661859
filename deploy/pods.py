"""Pods of a Ray cluster on Kubernetes: containers, their limits, what is mounted, and what they may do."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ..core.checkpoint import repository_of
from ..core.config import DEMO_MODEL, Config
from ..core.environment import UNDISTURBED
from ..core.errors import ConfigError
from .nodes import NodeGroup

Tree = dict[str, Any]

CONFIG_PATH = "/etc/tandem/tandem.yaml"
ADDRESS_VARIABLE = "TANDEM_POD_ADDRESS"
SUPERVISOR_PORT = 9464
"""Where pods tell health and metrics, unless the YAML says: a probe has to know. That of OpenTelemetry's exporters."""
OBJECT_STORE_BYTES = 256 << 20
"""Ray's own store, through which neither tokens nor KV pass."""

_COLLECTIVES_BYTES = 64 << 20
"""Of /dev/shm, for each rank's NCCL."""
_RANK_BYTES = 16 << 30
"""Of a process that computes: software, weights on their way to the GPU, pinned buffers."""
_HEAD_BYTES = 8 << 30
_HEAD_CPUS = 4
_USER = 1000
"""As in the image."""
_RAYLET_HEALTH = ("/api/local_raylet_healthz", 52365)
_GCS_HEALTH = ("/api/gcs_healthz", 8265)
_HUB_CACHE = "/var/cache/huggingface"
_CURL_REFUSED = 7
"""curl's exit status when nobody listens."""


class PodOptions(NamedTuple):
    """What the YAML does not know about the pods."""

    image: str
    config_secret: str
    """Holds the one YAML as tandem.yaml: it may name API keys."""
    store_secret: str
    """Holds AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for an s3 tier; need not be there."""
    hub_secret: str
    """Holds HF_TOKEN, for a model of the Hub; need not be there."""
    model_claim: str | None
    """A volume with the checkpoint, mounted where model.path is. Of the Hub: one that pods share as their cache; None:
    each pod fetches for itself."""
    worker_memory_bytes: int | None
    """Limit of a worker pod; None: an estimate."""


def head_pod(config: Config, options: PodOptions) -> Tree:
    """The pod of Ray's head, the controller and the gateways."""
    container = _container("ray-head", config, options, _GCS_HEALTH)
    container |= {
        "ports": [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "gateway", "containerPort": config.gateway.port},
            {"name": "health", "containerPort": supervisor_port(config)},
        ],
        "resources": _resources(_HEAD_CPUS, _HEAD_BYTES + OBJECT_STORE_BYTES, 0),
    }
    mounts = [
        *_shared_memory(OBJECT_STORE_BYTES),
        *_model(config, options),
        (
            {"name": "config", "secret": {"secretName": options.config_secret}},
            {"name": "config", "mountPath": str(PurePosixPath(CONFIG_PATH).parent), "readOnly": True},
        ),
    ]
    return _pod(container, mounts)


def worker_pod(config: Config, group: NodeGroup, options: PodOptions) -> Tree:
    """A pod that stands for a node: all workers that share it are in it, and reach each other's memory."""
    container = _container("ray-worker", config, options, _RAYLET_HEALTH)
    container["ports"] = [{"name": "health", "containerPort": supervisor_port(config)}]
    container["readinessProbe"] = _ready(config, container["readinessProbe"])
    shared_bytes = OBJECT_STORE_BYTES + host_tier_bytes(config) + group.num_ranks * _COLLECTIVES_BYTES
    memory_bytes = options.worker_memory_bytes or _estimate_bytes(config, group) + shared_bytes
    if memory_bytes <= shared_bytes:
        raise ConfigError(
            f"--worker-memory: {memory_bytes} bytes, and {shared_bytes} of them are for the host tier and Ray's store",
            fix="give more, or lower the host tier's capacity in offload.tiers",
        )
    container["resources"] = _resources(group.num_cpus, memory_bytes, group.num_gpus)
    if any(tier.kind == "s3" for tier in config.offload.tiers):
        container.setdefault("envFrom", []).append(_secret(options.store_secret))
    pod = _pod(container, [*_shared_memory(shared_bytes), *_model(config, options), *_disks(config)])
    if group.num_gpus:
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def host_tier_bytes(config: Config) -> int:
    """Of a node's memory; 0 without a host tier."""
    return sum(tier.capacity for tier in config.offload.tiers if tier.kind == "host")


def _estimate_bytes(config: Config, group: NodeGroup) -> int:
    """What the workers of a pod take beside shared memory."""
    on_host = 0
    if not group.num_gpus:
        for role in ("prefill", "decode", "colocated"):
            if getattr(config.pools, role) is not None and isinstance(config.of_pool(role).kv.capacity, int):
                on_host = max(on_host, int(config.of_pool(role).kv.capacity))
    return group.num_ranks * _RANK_BYTES + group.num_workers * (on_host + config.offload.moving)


def _secret(name: str) -> Tree:
    return {"secretRef": {"name": name, "optional": True}}


def _container(name: str, config: Config, options: PodOptions, health: tuple[str, int]) -> Tree:
    path, port = health
    of_hub: Tree = {}
    env = []
    if repository_of(config):
        env = [{"name": "HF_HOME", "value": _HUB_CACHE}]
        of_hub = {"envFrom": [_secret(options.hub_secret)]}

    def probe(failures: int) -> Tree:
        action = {"httpGet": {"path": path, "port": port}}
        return {**action, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": failures}

    return {
        "name": name,
        "image": options.image,
        "env": [
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            *({"name": name, "value": value} for name, value in UNDISTURBED.items()),
            {"name": ADDRESS_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *env,
        ],
        **of_hub,
        # A node that works hard answers late: what ends it is a minute of silence.
        "startupProbe": probe(60),
        "livenessProbe": probe(12),
        "readinessProbe": probe(3),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def supervisor_port(config: Config) -> int:
    """The same on every node."""
    return config.supervisor.port or SUPERVISOR_PORT


def _ready(config: Config, probe: Tree) -> Tree:
    """Ray's node is well, and so are all of Tandem's ranks on it, if there are any: pods are there before `tandem up`,
    and KubeRay waits for it. A rank that is not well is started again alone: this is no reason to end the pod."""
    path, port = _RAYLET_HEALTH
    scheme, trust = ("https", " --insecure") if config.supervisor.tls_cert else ("http", "")
    ask = "curl --silent --show-error --fail --max-time 4"
    host = f"${ADDRESS_VARIABLE}"
    ranks = f"{ask}{trust} {scheme}://{host}:{supervisor_port(config)}/readyz || [ $? -eq {_CURL_REFUSED} ]"
    command = ["sh", "-c", f"{ask} http://{host}:{port}{path} && {{ {ranks}; }}"]
    times = {key: value for key, value in probe.items() if key != "httpGet"}
    return {"exec": {"command": command}, **times}


def _resources(cpus: int, memory_bytes: int, gpus: int) -> Tree:
    limits = {"cpu": str(cpus), "memory": str(memory_bytes)} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": dict(limits), "limits": limits}


def _pod(container: Tree, mounts: list[tuple[Tree, Tree]]) -> Tree:
    return {
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 60,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container | {"volumeMounts": [mount for _, mount in mounts]}],
            "volumes": [volume for volume, _ in mounts],
        }
    }


def _shared_memory(size_bytes: int) -> list[tuple[Tree, Tree]]:
    volume = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(size_bytes)}}
    return [(volume, {"name": "shm", "mountPath": "/dev/shm"})]


def _disks(config: Config) -> list[tuple[Tree, Tree]]:
    found: list[tuple[Tree, Tree]] = []
    for tier in config.offload.tiers:
        for path in tier.path:
            name = f"disk-{len(found)}"
            volume = {"name": name, "emptyDir": {"sizeLimit": str(tier.capacity)}}
            found.append((volume, {"name": name, "mountPath": _absolute("offload.tiers: path", path)}))
    return found


def _model(config: Config, options: PodOptions) -> list[tuple[Tree, Tree]]:
    if config.model.path == DEMO_MODEL:
        return []
    if repository_of(config):
        claim = {"persistentVolumeClaim": {"claimName": options.model_claim}}
        cache: Tree = {"name": "hub", **(claim if options.model_claim else {"emptyDir": {}})}
        return [(cache, {"name": "hub", "mountPath": _HUB_CACHE})]
    if options.model_claim is None:
        raise ConfigError(
            f"--model-claim is missing: pods find {config.model.path} on a volume",
            fix="name a PersistentVolumeClaim with the checkpoint, which all nodes can read",
        )
    volume = {"name": "model", "persistentVolumeClaim": {"claimName": options.model_claim, "readOnly": True}}
    path = _absolute("model.path", config.model.path)
    return [(volume, {"name": "model", "mountPath": path, "readOnly": True})]


def _absolute(key: str, path: str) -> str:
    if not PurePosixPath(path).is_absolute():
        raise ConfigError(f"{key}: {path}: in a pod, a path begins with /", fix="write it out")
    return path
