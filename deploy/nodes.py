"""How many nodes the pools of a configuration need, and what each node must have."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..core.config import Config, PoolsConfig
from ..core.errors import ConfigError


class NodeGroup(NamedTuple):
    """Equal nodes; the figures are of the fullest."""

    name: str
    """gpu or cpu."""
    num_nodes: int
    num_gpus: int
    num_cpus: int
    num_workers: int
    num_ranks: int


class _Replica(NamedTuple):
    role: str
    num_gpus: int
    num_cpus: float
    num_ranks: int


def plan_nodes(
    config: Config, *, node_gpus: int, gpu_node_cpus: int | None = None, cpu_node_cpus: int | None = None
) -> list[NodeGroup]:
    """Put all workers on as few nodes as first-fit decreasing finds, those with GPUs and those without apart.

    A worker is never split: its ranks share a host.

    Args:
        config: the cluster's.
        node_gpus: of a node with GPUs.
        gpu_node_cpus: of a node with GPUs; None: as many as its workers want.
        cpu_node_cpus: of a node without; None: as many as the widest worker wants.

    Raises:
        ConfigError: a worker is larger than a node.
    """
    replicas = [
        _Replica(role, pool.gpus_per_replica, pool.cpus_per_replica, pool.tensor_parallel)
        for role in PoolsConfig.model_fields
        if (pool := getattr(config.pools, role)) is not None
        for _ in range(pool.replicas)
    ]
    on_gpus = [replica for replica in replicas if replica.num_gpus]
    on_cpus = [replica for replica in replicas if not replica.num_gpus]
    widest = max((replica.num_cpus for replica in on_cpus), default=0.0)
    groups = [
        _pack("gpu", on_gpus, node_gpus, math.inf if gpu_node_cpus is None else gpu_node_cpus),
        _pack("cpu", on_cpus, 0, widest if cpu_node_cpus is None else cpu_node_cpus),
    ]
    return [group for group in groups if group is not None]


def _pack(name: str, replicas: list[_Replica], node_gpus: int, node_cpus: float) -> NodeGroup | None:
    nodes: list[list[_Replica]] = []
    for replica in sorted(replicas, key=lambda replica: (replica.num_gpus, replica.num_cpus), reverse=True):
        for key, wanted, there in (
            ("gpus_per_replica", replica.num_gpus, node_gpus),
            ("cpus_per_replica", replica.num_cpus, node_cpus),
        ):
            if wanted > there:
                raise ConfigError(
                    f"pools.{replica.role}.{key}: {wanted:g}, and a node has {there:g}",
                    fix="lower it, or choose larger nodes: --machine, --gpus-per-node",
                )
        for node in nodes:
            if (
                sum(other.num_gpus for other in node) + replica.num_gpus <= node_gpus
                and sum(other.num_cpus for other in node) + replica.num_cpus <= node_cpus
            ):
                node.append(replica)
                break
        else:
            nodes.append([replica])
    if not nodes:
        return None
    return NodeGroup(
        name,
        len(nodes),
        max(sum(replica.num_gpus for replica in node) for node in nodes),
        max(math.ceil(sum(replica.num_cpus for replica in node)) for node in nodes),
        max(len(node) for node in nodes),
        max(sum(replica.num_ranks for replica in node) for node in nodes),
    )
