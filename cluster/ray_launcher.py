"""Workers and gateways as Ray actors: how the controller starts, asks and ends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import Config
from ..core.environment import worker_environment
from ..core.errors import TandemError, WorkerError
from ..core.expert_messages import LoadEntries
from ..core.ids import PeerId, WorkerId, worker_of
from ..core.messages import Member, Membership, Report
from .actors import WorkerActor
from .controller import desired_workers
from .estate import Estate
from .launcher import Handle
from .placement_groups import PlacementGroups, check_room
from .ray_cluster import ANSWER_TIMEOUT_S, NAMESPACE
from .ray_errors import cause, reason

_START_TIMEOUT_S = 600.0


class _ActorHandle:
    """`launcher.Handle` over a Ray actor."""

    def __init__(self, peer: PeerId, actor: Coroutine[Any, Any, Any], on_end: Callable[[], None]) -> None:
        self._peer = peer
        self._creation = asyncio.create_task(actor)
        self._on_end = on_end

    async def _actor(self) -> Any:
        return await asyncio.shield(self._creation)

    async def ready(self) -> Member:
        actor = await self._actor()
        try:
            encoded = await asyncio.wait_for(actor.start.remote(), _START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            self._on_end()
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            self._on_end()
            raise WorkerError(f"{self._peer} died while it started: {reason(error)}") from None
        except TimeoutError:
            self._on_end()
            raise WorkerError(f"{self._peer} did not start within {_START_TIMEOUT_S:g} s") from None
        return msgspec.msgpack.decode(encoded, type=Member)

    async def link_offer(self) -> bytes:
        return bytes(await self._ask((await self._actor()).link_offer.remote()))

    async def link_refusals(self, offers: list[bytes]) -> list[str]:
        return list(await self._ask((await self._actor()).link_refusals.remote(offers)))

    async def end_trial(self) -> None:
        if self._creation.done() and self._creation.exception() is None:
            self._creation.result().end_trial.remote()

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{self._peer} does not answer: {type(error).__name__}") from None

    async def gone(self) -> str:
        actor = await self._actor()
        try:
            return str(await actor.wait.remote())
        except ray.exceptions.RayActorError as error:
            return reason(error)
        finally:
            self._on_end()

    async def follow(self, membership: Membership) -> None:
        (await self._actor()).follow.remote(msgspec.msgpack.encode(membership))

    async def report(self) -> Report | None:
        if not self._creation.done() or self._creation.exception() is not None:
            return None
        try:
            encoded = await asyncio.wait_for(self._creation.result().report.remote(), ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return None
        return msgspec.msgpack.decode(encoded, type=Report)

    async def rebalance(self, timeout_s: float) -> str:
        return str(await self._ask((await self._actor()).rebalance.remote(timeout_s)))

    async def expert_load(self, after: int) -> LoadEntries:
        encoded = await self._ask((await self._actor()).expert_load.remote(after))
        return msgspec.msgpack.decode(encoded, type=LoadEntries)

    async def stop(self, grace_s: float, *, leaves: bool = False) -> None:
        try:
            actor = await asyncio.wait_for(self._actor(), ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, TandemError, TimeoutError):
            return  # it never came; should it still come, it ends with the controller
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(actor.stop.remote(grace_s, leaves), grace_s + ANSWER_TIMEOUT_S)
        ray.kill(actor)


class RayLauncher:
    """`launcher.Launcher` over Ray: workers go where `placement` says, gateways stay on the controller's node."""

    def __init__(
        self,
        name: str,
        config: Config,
        keys: bytes,
        log_folder: str,
        estate: Estate,
    ) -> None:
        self._name = name
        self._config = config
        self._keys = keys
        self._log_folder = log_folder
        self._phases: dict[PeerId, Callable[[str], None]] = {}
        self._estate = estate
        self._groups = PlacementGroups(name, config, estate)
        self._background: set[asyncio.Task[None]] = set()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def check_room(self, workers: Sequence[tuple[WorkerId, str]]) -> None:
        check_room(self._config, workers)

    async def choose_nodes(self) -> None:
        """Choose a node for each worker that will be launched first. Raises CapacityError: one finds none."""
        await asyncio.to_thread(self._groups.choose, desired_workers(self._config))

    def release(self, worker: WorkerId) -> None:
        self._in_background(asyncio.to_thread(self._groups.forget(worker)))

    async def release_all(self) -> None:
        """Give back every place. Idempotent."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._groups.close), ANSWER_TIMEOUT_S)

    def phase(self, peer: PeerId, phase: str) -> None:
        """A process tells how its start goes on."""
        if peer in self._phases:
            self._phases[peer](phase)

    def launch(self, peer: PeerId, role: str, on_phase: Callable[[str], None]) -> Handle:
        self._phases[peer] = on_phase
        context = ray.get_runtime_context()
        controller, here = context.current_actor, context.get_node_id()

        def options() -> dict[str, Any]:
            if role == "gateway":
                strategy = NodeAffinitySchedulingStrategy(here, soft=False)
                placed: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
            else:
                placed = self._groups.place(worker_of(peer), role)
            return {
                "name": f"{self._name}-{peer}",
                "namespace": NAMESPACE,
                "max_concurrency": 8,
                "runtime_env": {"env_vars": worker_environment()},
                **placed,
            }

        async def create() -> Any:
            # Ray's head may be away, and does not answer then: that is for a thread to wait for.
            placed = await asyncio.to_thread(options)
            arguments = (peer, role, self._config.model_dump_json(), self._keys, self._log_folder, controller)
            return await self._estate.create(peer, WorkerActor, placed, *arguments)

        return _ActorHandle(peer, create(), lambda: self._estate.let_go(peer))

    def adopt(self, peer: PeerId, on_phase: Callable[[str], None]) -> Handle | None:
        self._phases[peer] = on_phase
        actor = self._estate.actors.get(peer)
        if actor is None:
            return None

        async def found() -> Any:
            return actor

        return _ActorHandle(peer, found(), lambda: self._estate.let_go(peer))
