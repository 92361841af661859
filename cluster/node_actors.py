"""What each node has one of: the owner of its host tier, and its supervisor. The controller looks after them."""

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
from ..core.health import LocalRank
from ..core.ids import PeerId, WorkerId, index_of
from ..core.log import logger
from ..core.messages import Member
from .actors import SupervisorActor
from .controller import Controller
from .estate import Estate
from .ray_cluster import ANSWER_TIMEOUT_S
from .ray_errors import cause, reason
from .state import KeptNode, KeptPlace
from .tls import is_loopback

_OWNER = "host-tier "
"""Begins the names of those who own a host tier; the node follows."""
_FOLLOW_S = 2.0
_RESTART_PAUSE_S = 1.0


class HostTiers:
    """The nodes' host tiers. Belongs to the controller's event loop.

    Args:
        config: the cluster's.
        keys: the cluster's, encoded.
        log_folder: where their logs go.
        estate: makes them.
        on_change: told all those that other nodes may read.
    """

    def __init__(
        self,
        config: Config,
        keys: bytes,
        log_folder: str,
        estate: Estate,
        on_change: Callable[[list[Member]], Awaitable[None]],
    ) -> None:
        self._config = config
        self._keys = keys
        self._log_folder = log_folder
        self._estate = estate
        self._on_change = on_change
        self._creating = asyncio.Lock()
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
        async with self._creating:
            if node not in self._owners:
                # Imported here, as by a worker's process: most clusters have no tiers.
                from .host_tier import HostTierOwner

                arguments = (self._config.model_dump_json(), self._log_folder, self._keys, address)
                self._owners[node] = await self._estate.create(_OWNER + node, HostTierOwner, _on_node(node), *arguments)
        owner = self._owners[node]
        try:
            folder = str(await owner.start.remote(block_bytes))
            endpoint = str(await owner.endpoint.remote())
            if endpoint and node not in self._readable:
                self._readable[node] = Member(Path(folder).name, "host", address, endpoint)
                self._begin_watch(node, owner)
                await self._on_change(list(self._readable.values()))
            return folder
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            self._owners.pop(node, None)
            raise WorkerError(f"the host tier of node {node} died: {reason(error)}") from None

    def state(self) -> dict[str, Member]:
        """What `take_over` needs."""
        return dict(self._readable)

    def take_over(self, readable: dict[str, Member]) -> list[Member]:
        """Go on with those of the controller's last life. Returns those that other nodes may read."""
        names = {name: name.removeprefix(_OWNER) for name in self._estate.actors if name.startswith(_OWNER)}
        self._owners = {node: self._estate.actors[name] for name, node in names.items()}
        self._readable = {node: member for node, member in readable.items() if node in self._owners}
        for node in self._readable:
            self._begin_watch(node, self._owners[node])
        return list(self._readable.values())

    def _begin_watch(self, node: str, owner: Any) -> None:
        watch = asyncio.create_task(self._watch(node, owner))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

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
        estate: makes them.
        controller: knows who should live.
        on_change: called when `state` has changed.
    """

    def __init__(
        self,
        config: Config,
        log_folder: str,
        estate: Estate,
        controller: Controller,
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._log_folder = log_folder
        self._estate = estate
        self._controller = controller
        self._on_change = on_change
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
        self._on_change()

    def state(self) -> tuple[dict[str, KeptNode], dict[WorkerId, KeptPlace], int]:
        """What `take_over` needs: by node, by worker, and how many have been started."""
        nodes = {where: KeptNode(node.name, node.address, node.port) for where, node in self._nodes.items()}
        places = {worker: KeptPlace(place.peer, place.node) for worker, place in self._places.items()}
        return nodes, places, self._num_started

    def take_over(self, nodes: dict[str, KeptNode], places: dict[WorkerId, KeptPlace], num_started: int) -> None:
        """Go on with those of the controller's last life; see `state`. Does not wait."""
        self._num_started = num_started
        actors = self._estate.actors
        for worker, place in places.items():
            if place.peer in actors:
                self._places[worker] = _Place(place.peer, place.node, actors[place.peer])
        for where, kept in nodes.items():
            node = self._nodes[where] = _Node(kept.supervisor)
            node.address, node.port = kept.address, kept.port
            node.first_start.set_result(None)
            self._tasks.append(asyncio.create_task(self._keep(where, actors.get(kept.supervisor))))
        self._tasks.append(asyncio.create_task(self._follow()))

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

    async def _keep(self, where: str, taken: Any = None) -> None:
        """Have a node's supervisor live; a new life listens where the last one did.

        Args:
            where: Ray's name of the node.
            taken: handle of the one that it has; None: it has none.
        """
        node = self._nodes[where]
        while True:
            try:
                arguments = (node.name, self._config.model_dump_json(), self._log_folder)
                node.actor = taken or await self._estate.create(
                    node.name, SupervisorActor, _on_node(where) | {"max_concurrency": 100}, *arguments
                )
                taken = None
                node.address = node.address or self._address(where)
                node.port = await node.actor.start.remote(node.address, node.port or self._config.supervisor.port)
                node.told = None
                self._on_change()
                if not node.first_start.done():
                    node.first_start.set_result(None)
                await node.actor.wait.remote()
            except WorkerError as error:
                if not node.first_start.done():
                    node.first_start.set_exception(error)
                    return
                logger.warning("%s does not start: %s", node.name, error)
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


def _on_node(node: str) -> dict[str, Any]:
    """Options of an actor that lives there."""
    return {
        "num_cpus": 0,
        "max_concurrency": 8,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


async def _end(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
        await asyncio.wait_for(actor.stop.remote(), ANSWER_TIMEOUT_S)
    ray.kill(actor)
