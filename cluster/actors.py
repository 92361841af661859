"""Tandem's processes as Ray actors, and their placement.

Ray starts processes, tells when they die, and carries the control calls below. Tokens and KV never pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.clock import SystemClock
from ..core.config import Config
from ..core.environment import leave_torch_out, show_gpus, worker_environment
from ..core.errors import TandemError, WorkerError
from ..core.expert_messages import LoadEntries
from ..core.health import Vitals
from ..core.ids import PeerId, WorkerId, worker_of
from ..core.log import configure_logging, logger
from ..core.messages import Member, Membership, Report
from ..core.wire import ClusterKeys, make_cluster_keys
from .controller import Controller, Event, Handle, WorkerStatus, desired_workers
from .gateway.listener import listen
from .node_actors import HostTiers, Supervisors
from .placement_groups import PlacementGroups, check_room
from .ray_cluster import ANSWER_TIMEOUT_S, NAMESPACE
from .ray_errors import cause, reason
from .rebalancing import Rebalancing
from .scaling import Scaling

if TYPE_CHECKING:
    from ..kv_transfer.trial import TrialEnd

_START_TIMEOUT_S = 600.0
_ABANDONED_S = 30.0
"""A launch whose command line has not asked for so long how it goes on has lost it."""
_LEAVE_S = 5.0
"""What a process that gets SIGTERM takes at most: what is not done by then is done again elsewhere."""


class _Process:
    """What every worker and gateway actor has."""

    def __init__(self, peer: PeerId, role: str, config: str, keys: bytes, log_folder: str, controller: Any) -> None:
        self._config = Config.model_validate_json(config)
        log = self._config.log
        configure_logging(peer, log.level, log.format, Path(log_folder) / f"{peer}.log", log.max_per_s)
        self._peer = peer
        self._role = role
        self._keys = msgspec.msgpack.decode(keys, type=ClusterKeys)
        self._controller = controller
        self._runtime: Any = None
        self._ended = threading.Event()
        self._following = threading.Lock()
        self._version = 0
        self._trial: TrialEnd | None = None
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._leave, name="leave").start())

    def start(self) -> bytes:
        """Build and serve; returns the encoded `Member`. Errors say on which node."""
        address, context = ray.util.get_node_ip_address(), ray.get_runtime_context()
        self._controller.placed.remote(self._peer, context.get_node_id(), context.current_actor)
        show_gpus(context.get_accelerator_ids().get("GPU", []))
        try:
            return self._start(address)
        except TandemError as error:
            error.message = f"{self._peer} at {address}: {error.message}"
            raise

    def _start(self, address: str) -> bytes:
        def progress(phase: str) -> None:
            self._controller.phase.remote(self._peer, phase)

        # Imported here: the controller's process needs neither torch nor a web server.
        if self._role == "gateway":
            leave_torch_out()
            from .gateway.runtime import GatewayRuntime

            self._runtime = GatewayRuntime(self._peer, self._config, self._keys, address, progress)
        else:
            from .worker_runtime import WorkerRuntime

            self._runtime = WorkerRuntime(
                self._peer,
                self._role,
                self._config,
                self._keys,
                address,
                address,
                progress,
                self._host_tier,
                self._meet,
                lambda text: self._controller.note.remote(self._peer, text),
            )
        member: Member = self._runtime.start()
        return msgspec.msgpack.encode(member)

    def _host_tier(self, block_bytes: int) -> Path:
        """Where this node's host tier is found; it is started by the first that asks."""
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        try:
            return Path(ray.get(self._controller.host_tier.remote(node, address, block_bytes)))
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None

    def _meet(self, rendezvous: str) -> str:
        """Wait for those that share experts with this worker."""
        try:
            return str(ray.get(self._controller.meet.remote(self._peer, rendezvous)))
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None

    def link_offer(self) -> bytes:
        """What readers may try before the model is there: see `kv_transfer.trial`."""
        return msgspec.msgpack.encode(self._open_trial().offer())

    def link_refusals(self, offers: list[bytes]) -> list[str]:
        """Why KV could not be read from the ends of these offers, or "" each."""
        from ..kv_transfer.trial import Offer

        trial = self._open_trial()
        return [trial.refusal(msgspec.msgpack.decode(offer, type=Offer)) for offer in offers]

    def _open_trial(self) -> TrialEnd:
        from ..kv_transfer.trial import BLOCK_BYTES, TrialEnd

        address = ray.util.get_node_ip_address()
        self._trial = TrialEnd(self._peer, self._keys, address, self._config.kv, BLOCK_BYTES)
        return self._trial

    def wait(self) -> str:
        """Return when the process has been stopped; if it dies, the caller is told by Ray."""
        self._ended.wait()
        return "stopped"

    def follow(self, membership: bytes) -> None:
        """The cluster has changed."""
        if self._trial is not None:
            self._trial.close()
            self._trial = None
        # Calls run in threads, and one may overtake another: yesterday's members shall not come back.
        with self._following:
            news = msgspec.msgpack.decode(membership, type=Membership)
            if self._runtime is not None and news.version > self._version:
                self._version = news.version
                self._runtime.follow(news)

    def report(self) -> bytes:
        """The encoded `Report`."""
        return msgspec.msgpack.encode(self._runtime.report())

    def vitals(self, with_metrics: bool) -> bytes:
        """The encoded `Vitals`, for the node's supervisor."""
        return msgspec.msgpack.encode(self._runtime.vitals(with_metrics) if self._runtime else Vitals(0.0))

    def rebalance(self, timeout_s: float) -> str:
        """Place the experts of this worker's group anew; see `WorkerRuntime.rebalance`."""
        return str(self._runtime.rebalance(timeout_s))

    def expert_load(self, after: int) -> bytes:
        """The encoded `LoadEntries`."""
        return msgspec.msgpack.encode(self._runtime.expert_load(after))

    def stop(self, grace_s: float) -> None:
        """End the threads."""
        if self._runtime is not None:
            self._runtime.stop(grace_s)
        self._ended.set()

    def _leave(self) -> None:
        """SIGTERM: hand over what we have, and end; the controller starts the next life."""
        logger.info("SIGTERM: ends within %g s", _LEAVE_S)
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(self._controller.leaving.remote(self._peer), timeout=ANSWER_TIMEOUT_S)
        self.stop(_LEAVE_S)

    def pid(self) -> int:
        """For tests and for people."""
        return psutil.Process().pid


class _ActorHandle:
    """`controller.Handle` over a Ray actor."""

    def __init__(self, peer: PeerId, create: Callable[[], Any]) -> None:
        self._peer = peer
        # Ray's head may be away, and does not answer then: that is for a thread to wait for.
        self._creation = asyncio.create_task(asyncio.to_thread(create))

    async def _actor(self) -> Any:
        return await asyncio.shield(self._creation)

    async def ready(self) -> Member:
        actor = await self._actor()
        try:
            encoded = await asyncio.wait_for(actor.start.remote(), _START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"{self._peer} died while it started: {reason(error)}") from None
        except TimeoutError:
            raise WorkerError(f"{self._peer} did not start within {_START_TIMEOUT_S:g} s") from None
        return msgspec.msgpack.decode(encoded, type=Member)

    async def link_offer(self) -> bytes:
        return bytes(await self._ask((await self._actor()).link_offer.remote()))

    async def link_refusals(self, offers: list[bytes]) -> list[str]:
        return list(await self._ask((await self._actor()).link_refusals.remote(offers)))

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
            how = str(await actor.wait.remote())
            ray.kill(actor)
            return how
        except ray.exceptions.RayActorError as error:
            return reason(error)

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

    async def stop(self, grace_s: float) -> None:
        try:
            actor = await asyncio.wait_for(self._actor(), ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, TandemError, TimeoutError):
            return  # it never came; should it still come, it ends with the controller
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(actor.stop.remote(grace_s), grace_s + ANSWER_TIMEOUT_S)
        ray.kill(actor)


class _RayLauncher:
    """`controller.Launcher` over Ray: workers go where `placement` says, gateways stay on the controller's node."""

    def __init__(
        self,
        name: str,
        config: Config,
        keys: ClusterKeys,
        log_folder: str,
    ) -> None:
        self._name = name
        self._config = config
        self._keys = msgspec.msgpack.encode(keys)
        self._log_folder = log_folder
        self._phases: dict[PeerId, Callable[[str], None]] = {}
        self._groups = PlacementGroups(name, config)
        self._background: set[asyncio.Task[None]] = set()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def check_room(self, role: str, count: int) -> None:
        check_room(self._config, role, count)

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

        def create() -> Any:
            if role == "gateway":
                strategy = NodeAffinitySchedulingStrategy(here, soft=False)
                options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
            else:
                options = self._groups.place(worker_of(peer), role)
            return (
                ray.remote(_Process)
                .options(
                    name=f"{self._name}-{peer}",
                    namespace=NAMESPACE,
                    max_concurrency=8,
                    runtime_env={"env_vars": worker_environment()},
                    **options,
                )
                .remote(peer, role, self._config.model_dump_json(), self._keys, self._log_folder, controller)
            )

        return _ActorHandle(peer, create)


class ControllerActor:
    """The controller's process. It owns all others: when it goes, they go."""

    def __init__(self, name: str, config: str, log_folder: str) -> None:
        parsed = Config.model_validate_json(config)
        from .control.server import ControlServer  # gRPC is the controller's alone

        log = parsed.log
        configure_logging("controller", log.level, log.format, Path(log_folder) / "controller.log", log.max_per_s)
        self._config = parsed
        self._log_folder = log_folder
        self._asked_s = time.monotonic()
        keys = make_cluster_keys()
        self._launcher = _RayLauncher(name, parsed, keys, log_folder)
        self._controller = Controller(parsed, self._launcher, SystemClock())
        tiers_changed = self._controller.follow_host_tiers
        self._host_tiers = HostTiers(parsed, msgspec.msgpack.encode(keys), log_folder, tiers_changed)
        self._supervisors = Supervisors(parsed, log_folder, self._controller)
        scaling = Scaling(parsed, self._launcher, self._controller)
        self._control = ControlServer(
            self._controller, scaling, Rebalancing(parsed, self._controller), parsed.control, Path(log_folder)
        )

    async def start(self) -> None:
        """Returns when everything serves. Ends this process if whoever called is gone before that."""
        starting = asyncio.create_task(self._start())
        self._asked_s = time.monotonic()
        while not (await asyncio.wait([starting], timeout=1))[0]:
            if time.monotonic() - self._asked_s > _ABANDONED_S:
                logger.error("nobody has asked for %g s how the start goes on: it is given up", _ABANDONED_S)
                starting.cancel()
                await asyncio.wait([starting])
                ray.actor.exit_actor()
        starting.result()

    async def _start(self) -> None:
        gateway = self._config.gateway
        if gateway.replicas > 1:  # they share their port among each other, and with nobody else
            listen(gateway.host, gateway.port).close()
        try:
            await self._control.start()
            await self._launcher.choose_nodes()
            await self._controller.start()
            await self._supervisors.started()
        except BaseException:
            await self.stop(grace_s=0)
            raise

    async def stop(self, grace_s: float) -> None:
        await self._control.stop()
        await asyncio.gather(self._supervisors.stop(), self._controller.stop(grace_s))
        await self._host_tiers.stop()
        await self._launcher.release_all()

    async def host_tier(self, node: str, address: str, block_bytes: int) -> str:
        return await self._host_tiers.folder(node, address, block_bytes)

    async def placed(self, peer: PeerId, node: str, actor: Any) -> None:
        self._supervisors.placed(worker_of(peer), peer, node, actor)

    async def supervisors(self) -> dict[str, str]:
        return self._supervisors.urls()

    async def meet(self, peer: PeerId, rendezvous: str) -> str:
        return await self._controller.meet(peer, rendezvous)

    async def phases(self) -> dict[str, str]:
        self._asked_s = time.monotonic()
        return self._controller.phases()

    async def phase(self, peer: PeerId, phase: str) -> None:
        self._launcher.phase(peer, phase)

    async def leaving(self, peer: PeerId) -> None:
        await self._controller.leaving(peer)

    async def note(self, peer: PeerId, text: str) -> None:
        await self._controller.note(peer, text)

    async def status(self) -> list[WorkerStatus]:
        return await self._controller.status()

    async def events(self, after: int, timeout_s: float) -> list[Event]:
        return await self._controller.events(after, timeout_s)

    async def describe(self) -> tuple[str, str]:
        """The configuration, as JSON, and the folder of the logs."""
        return self._config.model_dump_json(), self._log_folder
