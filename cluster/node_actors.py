"""What each node has one of: the owner of its host tier, and its supervisor. Ray actors that the controller owns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import Config
from ..core.errors import WorkerError
from ..core.health import LocalRank, Vitals
from ..core.ids import PeerId, WorkerId, index_of
from ..core.log import configure_logging, logger
from ..core.messages import Member
from .controller import Controller
from .ray_cluster import ANSWER_TIMEOUT_S
from .ray_errors import cause, reason
from .tls import is_loopback

_FOLLOW_S = 2.0
_RESTART_PAUSE_S = 1.0


class HostTiers:
    """The nodes' host tiers. Belongs to the controller's event loop.

    Args:
        config: the cluster's.
        keys: the cluster's, encoded.
        log_folder: where their logs go.
        on_change: told all those that other nodes may read.
    """

    def __init__(
        self, config: Config, keys: bytes, log_folder: str, on_change: Callable[[list[Member]], Awaitable[None]]
    ) -> None:
        self._config = config
        self._keys = keys
        self._log_folder = log_folder
        self._on_change = on_change
        self._owners: dict[str, Any] = {}
        self._readable: dict[str, Member] = {}
        """By node, host tiers that other nodes may read."""
        self._watches: set[asyncio.Task[None]] = set()

    async def folder(self, node: str, address: str, block_bytes: int) -> str:
        """The folder of a node's host tier, which is started if there is none.

        Args:
            node: Ray's name of it.
            address: where other nodes reach it.
            block_bytes: of a block.

        Raises:
            ConfigError: it cannot be; names the key.
            WorkerError: its process died.
        """
        if node not in self._owners:
            # Imported here, as by a worker's process: most clusters have no tiers.
            from .host_tier import HostTierOwner

            self._owners[node] = _on_node(HostTierOwner, node).remote(
                self._config.model_dump_json(), self._log_folder, self._keys, address
            )
        owner = self._owners[node]
        try:
            folder = str(await owner.start.remote(block_bytes))
            endpoint = str(await owner.endpoint.remote())
            if endpoint and node not in self._readable:
                self._readable[node] = Member(Path(folder).name, "host", address, endpoint)
                watch = asyncio.create_task(self._watch(node, owner))
                self._watches.add(watch)
                watch.add_done_callback(self._watches.discard)
                await self._on_change(list(self._readable.values()))
            return folder
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            self._owners.pop(node, None)
            raise WorkerError(f"the host tier of node {node} died: {reason(error)}") from None

    async def _watch(self, node: str, owner: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await owner.wait.remote()
        del self._readable[node]
        if self._owners.get(node) is owner:
            del self._owners[node]
        await self._on_change(list(self._readable.values()))

    async def stop(self) -> None:
        """End all of them, and what they left on their nodes. Idempotent."""
        while self._owners:
            _, owner = self._owners.popitem()
            await _end(owner)


class _SupervisorActor:
    """A node's supervisor, and how it reaches processes: by Ray, which also knows when they are dead."""

    def __init__(self, name: str, config: str, log_folder: str) -> None:
        from .supervisor.server import Supervisor  # a web server is this process's alone

        parsed = Config.model_validate_json(config)
        log = parsed.log
        configure_logging(name, log.level, log.format, Path(log_folder) / f"{name}.log", log.max_per_s)
        self._supervisor = Supervisor(parsed.supervisor)
        self._stopped = asyncio.Event()

    async def start(self, address: str, port: int) -> int:
        """Returns the port."""
        return await self._supervisor.start(address, port)

    async def follow(self, ranks: bytes, actors: dict[PeerId, Any]) -> None:
        """Who is on the node, and those of them that can be asked."""
        asks = {peer: _asker(peer, actor) for peer, actor in actors.items()}
        self._supervisor.follow(msgspec.msgpack.decode(ranks, type=list[LocalRank]), asks)

    async def wait(self) -> None:
        """Return when it has been stopped; if the process dies, Ray tells."""
        await self._stopped.wait()

    async def stop(self) -> None:
        await self._supervisor.stop()
        self._stopped.set()


def _asker(peer: PeerId, actor: Any) -> Callable[[bool], Awaitable[Vitals]]:
    async def ask(with_metrics: bool) -> Vitals:
        try:
            answer = await asyncio.wait_for(actor.vitals.remote(with_metrics), ANSWER_TIMEOUT_S)
        except ray.exceptions.ActorUnavailableError:
            raise TimeoutError("out of reach") from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"{peer} is gone: {reason(error)}") from None
        except ray.exceptions.RayError as error:
            raise TimeoutError(type(error).__name__) from None
        return msgspec.msgpack.decode(answer, type=Vitals)

    return ask


class _Place(NamedTuple):
    """Where a process lives."""

    peer: PeerId
    node: str
    actor: Any


class _Node:
    """A node's supervisor, as its owner knows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.actor: Any = None
        self.address = ""
        self.port = 0
        self.told: list[LocalRank] | None = None
        self.first_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Supervisors:
    """A supervisor on every node that has a process of ours. Belongs to the controller's event loop.

    Args:
        config: the cluster's.
        log_folder: where their logs go.
        controller: knows who should live.
    """

    def __init__(self, config: Config, log_folder: str, controller: Controller) -> None:
        self._config = config
        self._log_folder = log_folder
        self._controller = controller
        self._places: dict[WorkerId, _Place] = {}
        self._nodes: dict[str, _Node] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._num_started = 0
        self._stopping = False

    def placed(self, worker: WorkerId, peer: PeerId, node: str, actor: Any) -> None:
        """A process has begun. Does not wait.

        Args:
            worker: which.
            peer: its life.
            node: Ray's name of it.
            actor: its handle.
        """
        if self._stopping:
            return
        self._places[worker] = _Place(peer, node, actor)
        if not self._tasks:
            self._tasks.append(asyncio.create_task(self._follow()))
        if node not in self._nodes:
            self._nodes[node] = _Node(f"supervisor-{self._num_started}")
            self._num_started += 1
            self._tasks.append(asyncio.create_task(self._keep(node)))

    async def started(self) -> None:
        """Wait until those that have begun listen.

        Raises:
            ConfigError: one cannot.
        """
        await asyncio.gather(*(node.first_start for node in self._nodes.values()))

    def urls(self) -> dict[WorkerId, str]:
        """Where each worker's node tells its health and metrics."""
        scheme = "https" if self._config.supervisor.tls_cert else "http"
        nodes = {worker: self._nodes.get(place.node) for worker, place in self._places.items()}
        return {
            worker: f"{scheme}://{f'[{node.address}]' if ':' in node.address else node.address}:{node.port}"
            for worker, node in nodes.items()
            if node is not None and node.port
        }

    async def stop(self) -> None:
        """End all of them. Idempotent."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(_end(node.actor) for node in self._nodes.values() if node.actor is not None))
        self._nodes = {}

    async def _keep(self, where: str) -> None:
        """Have a node's supervisor live; a new life listens where the last one did."""
        node = self._nodes[where]
        while True:
            node.actor = _on_node(_SupervisorActor, where).remote(
                node.name, self._config.model_dump_json(), self._log_folder
            )
            try:
                node.address = node.address or self._address(where)
                node.port = await node.actor.start.remote(node.address, node.port or self._config.supervisor.port)
                node.told = None
                if not node.first_start.done():
                    node.first_start.set_result(None)
                await node.actor.wait.remote()
            except ray.exceptions.RayTaskError as error:
                ray.kill(node.actor)
                if not node.first_start.done():
                    node.first_start.set_exception(cause(error))
                    return
                logger.warning("%s does not start: %s", node.name, cause(error))
            except ray.exceptions.RayActorError as error:
                if not node.first_start.done():
                    node.first_start.set_exception(WorkerError(f"{node.name} did not start: {reason(error)}"))
                    return
                logger.warning("%s is gone: %s", node.name, reason(error))
            await asyncio.sleep(_RESTART_PAUSE_S)
            if not any(found["NodeID"] == where and found["Alive"] for found in await asyncio.to_thread(ray.nodes)):
                logger.warning("%s is not started again: its node is gone", node.name)
                del self._nodes[where]
                return

    def _address(self, node: str) -> str:
        """Where its supervisor listens."""
        listen = self._config.supervisor.listen
        if listen == "loopback" or (listen == "auto" and is_loopback(self._config.gateway.host)):
            return "127.0.0.1"
        return str(next(found["NodeManagerAddress"] for found in ray.nodes() if found["NodeID"] == node))

    async def _follow(self) -> None:
        """Tell each supervisor who is on its node, whenever that changes."""
        while True:
            view = self._view()
            for name, node in self._nodes.items():
                ranks = view.get(name, [])
                if node.port and ranks != node.told:
                    node.told = ranks
                    alive = {rank.peer for rank in ranks}
                    actors = {place.peer: place.actor for place in self._places.values() if place.peer in alive}
                    node.actor.follow.remote(msgspec.msgpack.encode(ranks), actors)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._controller.until(lambda: self._view() != view), _FOLLOW_S)  # noqa: B023

    def _view(self) -> dict[str, list[LocalRank]]:
        """By node, who is there; one that is about to begin another life, where it lived last."""
        view: dict[str, list[LocalRank]] = {}
        for worker in self._controller.desired:
            place = self._places.get(worker.worker)
            if place is not None:
                size = self._config.expert_parallel(worker.role)
                rank = index_of(worker.worker) % size
                told = LocalRank(
                    worker.worker, worker.peer, worker.role, rank, worker.phase, max(0, worker.incarnation - 1)
                )
                view.setdefault(place.node, []).append(told)
        return view


def _on_node(kind: type, node: str) -> Any:
    return ray.remote(kind).options(
        num_cpus=0, max_concurrency=8, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )


async def _end(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
        await asyncio.wait_for(actor.stop.remote(), ANSWER_TIMEOUT_S)
    ray.kill(actor)
