"""Manifests for KubeRay: the cluster, the job that runs `tandem up`, and what guards them.

KubeRay 1.6 or newer: the token comes from a Secret that is named, not rendered (`authOptions.secretName`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from ..core.config import Config
from ..core.errors import ConfigError
from .nodes import NodeGroup, plan_nodes
from .pods import (
    ADDRESS_VARIABLE,
    CONFIG_PATH,
    OBJECT_STORE_BYTES,
    PodOptions,
    Tree,
    head_pod,
    supervisor_port,
    worker_pod,
)

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
"""KubeRay makes longer names of it, and 63 characters is the limit."""


class KubeOptions(NamedTuple):
    """What the YAML does not know."""

    name: str
    """The cluster's: other objects' names begin with it."""
    image: str
    gpus_per_node: int = 8
    """Of a machine; a pod takes what its workers need of them."""
    model_claim: str | None = None
    """See `PodOptions`."""
    worker_memory_bytes: int | None = None
    """See `PodOptions`."""


def render_kuberay(config: Config, options: KubeOptions) -> Mapping[str, list[Tree]]:
    """Manifests by file name.

    Raises:
        ConfigError: a worker is larger than a node, or something that pods need is missing.
    """
    if not _NAME.fullmatch(options.name):
        raise ConfigError(
            f"--name {options.name}: expected at most 40 lower-case letters, digits and hyphens", fix="--name tandem"
        )
    groups = plan_nodes(config, node_gpus=options.gpus_per_node)
    return {
        "raycluster.yaml": [_cluster(config, options, groups)],
        "launch.yaml": [_launch(config, options)],
        "gateway.yaml": [_service(config, options), _network_policy(config, options)],
        "disruption.yaml": [
            _disruption_budget(f"{options.name}-head", options, {"ray.io/node-type": "head"}, 1),
            *(
                # One node goes at a time, and never the last.
                _disruption_budget(
                    f"{options.name}-{group.name}", options, {"ray.io/group": group.name}, max(1, group.num_nodes - 1)
                )
                for group in groups
            ),
        ],
    }


def _cluster(config: Config, options: KubeOptions, groups: list[NodeGroup]) -> Tree:
    pods = PodOptions(
        options.image,
        f"{options.name}-config",
        f"{options.name}-store",
        f"{options.name}-hub",
        options.model_claim,
        options.worker_memory_bytes,
    )
    store = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    spec = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": f"{options.name}-ray-token"},
        "enableInTreeAutoscaling": False,
        # No worker is placed on the head.
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", **store}, "template": head_pod(config, pods)},
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.num_nodes,
                "minReplicas": group.num_nodes,
                "maxReplicas": group.num_nodes,
                "rayStartParams": {"num-cpus": str(group.num_cpus), **store},
                "template": worker_pod(config, group, pods),
            }
            for group in groups
        ],
    }
    return _object("ray.io/v1", "RayCluster", options.name, spec)


def _launch(config: Config, options: KubeOptions) -> Tree:
    """A Ray job runs on the head, where the gateways then are. It ends when Tandem serves."""
    spec = {
        "clusterSelector": {"ray.io/cluster": options.name},
        "submissionMode": "HTTPMode",  # a shell on the head reads the entrypoint, and knows the head's address
        "entrypoint": f"tandem up {CONFIG_PATH} --set gateway.host=${ADDRESS_VARIABLE} "
        f"--set supervisor.port={supervisor_port(config)}",
        "shutdownAfterJobFinishes": False,
    }
    return _object("ray.io/v1", "RayJob", f"{options.name}-launch", spec)


def _service(config: Config, options: KubeOptions) -> Tree:
    spec = {
        "type": "ClusterIP",
        "selector": _selector(options, {"ray.io/node-type": "head"}),
        "ports": [{"name": "http", "port": config.gateway.port, "targetPort": "gateway"}],
    }
    return _object("v1", "Service", f"{options.name}-gateway", spec)


def _network_policy(config: Config, options: KubeOptions) -> Tree:
    """Who may come in: the cluster itself to everything, clients and Prometheus to the gateway, KubeRay's operator to
    Ray's dashboard, through which it submits the job."""
    everywhere: Tree = {"namespaceSelector": {}}
    clients = everywhere | {"podSelector": {"matchLabels": {f"{options.name}-client": "true"}}}
    prometheus = everywhere | {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    operator = everywhere | {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    spec = {
        "podSelector": {"matchLabels": _selector(options, {})},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": _selector(options, {})}}]},
            {"from": [clients, prometheus], "ports": [{"protocol": "TCP", "port": config.gateway.port}]},
            {"from": [prometheus], "ports": [{"protocol": "TCP", "port": supervisor_port(config)}]},
            {"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]},
        ],
    }
    return _object("networking.k8s.io/v1", "NetworkPolicy", options.name, spec)


def _disruption_budget(name: str, options: KubeOptions, labels: Mapping[str, str], least: int) -> Tree:
    # For pods of a custom resource Kubernetes takes minAvailable as a number, and nothing else.
    spec = {"minAvailable": least, "selector": {"matchLabels": _selector(options, labels)}}
    return _object("policy/v1", "PodDisruptionBudget", name, spec)


def _selector(options: KubeOptions, labels: Mapping[str, str]) -> dict[str, str]:
    return {"ray.io/cluster": options.name, **labels}


def _object(api: str, kind: str, name: str, spec: Mapping[str, Any]) -> Tree:
    labels = {"app.kubernetes.io/name": "tandem", "app.kubernetes.io/managed-by": "tandem-deploy"}
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": dict(spec)}
