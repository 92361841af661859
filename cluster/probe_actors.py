"""The doctor's probes as Ray actors: one a node, and one where each worker would live. They end with their driver."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import Config
from ..core.environment import worker_environment
from ..core.errors import ConfigError, TandemError, WorkerError
from ..core.ids import WorkerId
from .doctor.probe import Probe
from .placement_groups import check_resources, choose_nodes
from .tandem_cluster import Cluster

_POLL_S = 0.2


class Node(NamedTuple):
    """A live node of the Ray cluster."""

    node_id: str
    address: str
    cpus: float
    gpus: float


class _ProbeActor(Probe):
    """A probe that knows which node it came to."""

    def __init__(self, peer: str, config: str, keys: bytes) -> None:
        super().__init__(peer, config, keys, ray.util.get_node_ip_address())

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


class PlacedProbe:
    """A probe somewhere. Calls block.

    Args:
        peer: whose place.
        actor: the Ray actor.
        check: called while a call waits; may raise.
    """

    def __init__(self, peer: str, actor: Any, check: Callable[[], None]) -> None:
        self.peer = peer
        self._actor = actor
        self._check = check

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """What a method of `Probe` returns.

        Raises:
            WorkerError: the probe died, failed, or took too long.
        """
        answer = getattr(self._actor, method).remote(*arguments)
        deadline_s = time.monotonic() + timeout_s
        while not ray.wait([answer], timeout=_POLL_S)[0]:
            self._check()
            if time.monotonic() > deadline_s:
                raise WorkerError(f"{self.peer}: no answer within {timeout_s:.0f} s")
        try:
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            raise WorkerError(f"{self.peer}: {type(error.cause).__name__}: {error.cause}") from None
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{self.peer} died: {str(error).splitlines()[0][:200]}") from None

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor)


class Probes:
    """All probes of one examination, on the Ray cluster that this process is connected to.

    Args:
        config: of the workers.
        keys: encoded `ClusterKeys`.
        check: called while a call waits; may raise.
    """

    def __init__(self, config: Config, keys: bytes, check: Callable[[], None]) -> None:
        self._config = config
        self._keys = keys
        self._check = check
        self._placed: list[PlacedProbe] = []
        self._nodes: dict[WorkerId, str] | None = None

    def nodes(self) -> list[Node]:
        """Those alive, by address."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        found = [
            Node(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
            )
            for node in alive
        ]
        return sorted(found, key=lambda node: (node.address, node.node_id))

    def on_node(self, peer: str, node_id: str) -> PlacedProbe:
        """A probe on one node, beside whatever runs there."""
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return self._place(peer, {"num_cpus": 0, "scheduling_strategy": strategy})

    def as_worker(self, peer: str, role: str) -> PlacedProbe:
        """A probe that is placed as the worker of this name and role would be."""
        nodes = self._chosen()
        pool = getattr(self._config.pools, role)
        options = {
            "num_cpus": pool.cpus_per_replica,
            "num_gpus": pool.gpus_per_replica,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[peer], soft=True)
            if peer in nodes
            else "SPREAD",
        }
        return self._place(peer, options)

    def lacking(self) -> str:
        """What the cluster lacks to hold all workers, or ""."""
        try:
            check_resources(self._config)
        except ConfigError as error:
            return error.message
        return ""

    def has_room(self, peer: str) -> bool:
        """Whether this worker is one of those that find room."""
        return peer in self._chosen()

    def _chosen(self) -> dict[WorkerId, str]:
        if self._nodes is None:
            self._nodes = choose_nodes(self._config)
        return self._nodes

    def close(self) -> None:
        """End all probes. Idempotent."""
        for placed in self._placed:
            placed.kill()
        self._placed.clear()

    def _place(self, peer: str, options: dict[str, Any]) -> PlacedProbe:
        # A node's probe asks for no GPU and yet must see them all.
        environment = worker_environment() | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        actor = (
            ray.remote(_ProbeActor)
            .options(runtime_env={"env_vars": environment}, **options)
            .remote(peer, self._config.model_dump_json(), self._keys)
        )
        placed = PlacedProbe(peer, actor, self._check)
        self._placed.append(placed)
        return placed


def ray_version() -> str:
    """Of this process."""
    return str(ray.__version__)


def running_tandem() -> tuple[Config, dict[str, str]] | None:
    """The configuration of the Tandem on the connected Ray cluster, and the node address of each of its workers; None
    if none runs, or it does not answer."""
    try:
        cluster = Cluster.find()
        return cluster.describe()[0], {worker.worker: worker.node for worker in cluster.status()}
    except (TandemError, ray.exceptions.RayError):
        return None
