"""Tandem's processes as Ray actors.

Ray starts processes, tells when they die, and carries the control calls below. Tokens and KV never pass through it.
What a process needs is imported when it begins: the keeper, which makes them all, and whose start a launch waits for,
needs no more than these classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import ray
import ray.exceptions

from ..core.environment import leave_torch_out, show_gpus
from ..core.errors import TandemError, WorkerError
from ..core.health import LocalRank, Vitals
from ..core.ids import PeerId, worker_of
from ..core.log import configure_logging, logger
from ..core.messages import Member, Membership
from ..core.wire import ClusterKeys
from .ending import Ending
from .ray_errors import cause, reason

if TYPE_CHECKING:
    from ..kv_transfer.trial import TrialEnd
    from .controller import Event, WorkerStatus

_ABANDONED_S = 30.0
"""A launch whose command line has not asked for so long how it goes on has lost it."""
_LEAVE_S = 5.0
"""What a process that gets SIGTERM takes at most: what is not done by then is done again elsewhere."""


class WorkerActor:
    """The process of a worker or gateway."""

    def __init__(self, peer: PeerId, role: str, config: str, keys: bytes, log_folder: str, controller: Any) -> None:
        from ..core.config import Config

        self._config = Config.model_validate_json(config)
        log = self._config.log
        configure_logging(peer, log.level, log.format, Path(log_folder) / f"{peer}.log", log.max_per_s)
        self._peer = peer
        self._role = role
        self._keys = msgspec.msgpack.decode(keys, type=ClusterKeys)
        self._controller = controller
        self._runtime: Any = None
        self._ending = Ending()
        self._starting = threading.Lock()
        self._started: bytes | TandemError | None = None
        self._following = threading.Lock()
        self._version = 0
        self._trial: TrialEnd | None = None
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._leave, name="leave").start())

    def start(self) -> bytes:
        """Build and serve; returns the encoded `Member`. Errors say on which node. Who asks again, as the controller's
        next life does, gets the same answer."""
        with self._starting:
            if self._started is None:
                try:
                    self._started = self._start_here()
                except TandemError as error:
                    self._started = error
        if isinstance(self._started, TandemError):
            raise self._started
        return self._started

    def _start_here(self) -> bytes:
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

        if self._role == "gateway":
            leave_torch_out()
            from .gateway.runtime import GatewayRuntime

            self._runtime = GatewayRuntime(self._peer, self._config, self._keys, address, progress)
        else:
            from .expert_worker import Legacy
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
                Legacy(self._learned, lambda learned: self._controller.keep_learned.remote(self._peer, learned)),
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

    def _learned(self) -> bytes:
        """What the workers before this one and its group left of their experts."""
        try:
            return bytes(ray.get(self._controller.learned.remote(self._peer)))
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

    def end_trial(self) -> None:
        """Nobody tries anything any more."""
        if self._trial is not None:
            self._trial.close()
            self._trial = None

    def _open_trial(self) -> TrialEnd:
        from ..kv_transfer.trial import BLOCK_BYTES, TrialEnd

        address = ray.util.get_node_ip_address()
        self._trial = TrialEnd(self._peer, self._keys, address, self._config.kv, BLOCK_BYTES)
        return self._trial

    def wait(self) -> str:
        """Return when the process has been stopped, or somebody else waits; if it dies, the caller is told by Ray."""
        return "stopped" if self._ending.wait() else "taken over"

    def follow(self, membership: bytes) -> None:
        """The cluster has changed."""
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

    def stop(self, grace_s: float, leaves: bool = False) -> None:
        """End the threads; the cluster goes on if this process merely ``leaves``."""
        if self._runtime is not None:
            if leaves and self._role == "gateway":
                self._runtime.leave(grace_s)
            else:
                self._runtime.stop(grace_s)
        self._ending.set()

    def _leave(self) -> None:
        """SIGTERM: hand over what we have, and end; the controller starts the next life."""
        from .ray_cluster import ANSWER_TIMEOUT_S

        logger.info("SIGTERM: ends within %g s", _LEAVE_S)
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(self._controller.leaving.remote(self._peer), timeout=ANSWER_TIMEOUT_S)
        self.stop(_LEAVE_S, leaves=self._role == "gateway" and self._runtime is not None and not self._runtime.is_alone)

    def pid(self) -> int:
        """For tests and for people."""
        return psutil.Process().pid


class SupervisorActor:
    """A node's supervisor, and how it reaches processes: by Ray, which also knows when they are dead."""

    def __init__(self, name: str, config: str, log_folder: str) -> None:
        from ..core.config import Config
        from .supervisor.server import Supervisor

        parsed = Config.model_validate_json(config)
        log = parsed.log
        configure_logging(name, log.level, log.format, Path(log_folder) / f"{name}.log", log.max_per_s)
        self._supervisor = Supervisor(parsed.supervisor)
        self._starting = asyncio.Lock()
        self._port = 0
        self._stopped = asyncio.Event()

    async def start(self, address: str, port: int) -> int:
        """Returns the port. Idempotent."""
        async with self._starting:
            self._port = self._port or await self._supervisor.start(address, port)
        return self._port

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
    from .ray_cluster import ANSWER_TIMEOUT_S

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


class ControllerActor:
    """The controller's process. What it has made belongs to the keeper, and outlives it: its next life takes it over.

    Args:
        keeper: handle of the keeper.
        name: of the Tandem.
        config: as JSON.
        log_folder: where all logs go.
    """

    def __init__(self, keeper: Any, name: str, config: str, log_folder: str) -> None:
        from ..core.config import Config
        from .reign import Reign

        parsed = Config.model_validate_json(config)
        log = parsed.log
        configure_logging("controller", log.level, log.format, Path(log_folder) / "controller.log", log.max_per_s)
        self._config = parsed
        self._log_folder = log_folder
        self._asked_s = time.monotonic()
        self._reign = Reign(name, parsed, log_folder, keeper)
        self._stopped = asyncio.Event()
        self._open = asyncio.Event()
        """Whether calls are let in: those to a next life wait until it knows whom it has."""
        if self._reign.is_first:
            self._open.set()

    async def start(self) -> None:
        """Returns when everything serves, and whoever called has asked once more: if he is gone, this process ends, and
        all that it has started."""
        starting = asyncio.create_task(self._reign.start())
        self._asked_s = time.monotonic()
        while not (await asyncio.wait([starting], timeout=1))[0]:
            if self._is_abandoned():
                starting.cancel()
                await asyncio.wait([starting])
                ray.actor.exit_actor()
        starting.result()
        served_s = time.monotonic()
        while self._asked_s < served_s:
            await asyncio.sleep(0.05)
            if self._is_abandoned():
                await self._reign.stop(0.0)
                ray.actor.exit_actor()

    def _is_abandoned(self) -> bool:
        gone = time.monotonic() - self._asked_s > _ABANDONED_S
        if gone:
            logger.error("nobody has asked for %g s how the start goes on: it is given up", _ABANDONED_S)
        return gone

    async def reign(self, how: str) -> None:
        """Returns when the cluster has been stopped. A next life first takes everything over.

        Args:
            how: the last life ended.
        """
        if not self._open.is_set():
            await self._reign.take_over(how)
            self._open.set()
        await self._stopped.wait()

    async def stop(self, grace_s: float) -> None:
        await self._open.wait()
        await self._reign.stop(grace_s)
        self._stopped.set()

    async def host_tier(self, node: str, address: str, block_bytes: int) -> str:
        await self._open.wait()
        return await self._reign.host_tiers.folder(node, address, block_bytes)

    async def placed(self, peer: PeerId, node: str, actor: Any) -> None:
        await self._open.wait()
        self._reign.supervisors.placed(worker_of(peer), peer, node, actor)

    async def supervisors(self) -> dict[str, str]:
        await self._open.wait()
        return self._reign.supervisors.urls()

    async def meet(self, peer: PeerId, rendezvous: str) -> str:
        await self._open.wait()
        return await self._reign.controller.meet(peer, rendezvous)

    async def learned(self, peer: PeerId) -> bytes:
        await self._open.wait()
        return self._reign.controller.learned(peer)

    async def keep_learned(self, peer: PeerId, learned: bytes) -> None:
        await self._open.wait()
        self._reign.controller.keep_learned(peer, learned)

    async def phases(self) -> dict[str, str]:
        self._asked_s = time.monotonic()
        return self._reign.controller.phases()

    async def phase(self, peer: PeerId, phase: str) -> None:
        await self._open.wait()
        self._reign.launcher.phase(peer, phase)

    async def leaving(self, peer: PeerId) -> None:
        await self._open.wait()
        await self._reign.controller.leaving(peer)

    async def note(self, peer: PeerId, text: str) -> None:
        await self._open.wait()
        await self._reign.controller.note(peer, text)

    async def status(self) -> list[WorkerStatus]:
        await self._open.wait()
        return await self._reign.controller.status()

    async def events(self, after: int, timeout_s: float) -> list[Event]:
        await self._open.wait()
        return await self._reign.controller.events(after, timeout_s)

    async def describe(self) -> tuple[str, str]:
        """The configuration, as JSON, and the folder of the logs."""
        return self._config.model_dump_json(), self._log_folder
