"""Desired state against actual state: which workers should live, which do, and who is told.

Knows nothing of Ray: a `Launcher` starts processes and says when they are ready and when they are gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import msgspec

from ..core.clock import Clock
from ..core.config import Config
from ..core.errors import ConfigError, TandemError, WorkerError
from ..core.ids import PeerId, WorkerId, peer_id
from ..core.log import logger
from ..core.messages import Member, Membership, Report
from .expert_groups import ExpertGroups
from .launcher import Handle, Launcher
from .state import ControllerState, KeptEvent, KeptWorker

_MAX_EVENTS = 1000
_KEPT_EVENTS = 50
_SKIPPED = 1000
"""Numbers that a new life of the controller leaves out: the last one may have used some that it did not keep."""
_RECALL_TIMEOUT_S = 10.0
_STABLE_S = 10.0
_FIRST_BACKOFF_S = 0.5
# With the start of a worker well under `gateway.failover_timeout_s`: nobody who waits is given up for a pause of ours.
_MAX_BACKOFF_S = 8.0
_TRIAL_TIMEOUT_S = 45.0
_LINKS_TIMEOUT_S = 30.0
_LINKS_POLL_S = 0.2


class Event(NamedTuple):
    """Something that an operator wants to know."""

    number: int
    at_s: float
    text: str


class WorkerStatus(NamedTuple):
    """A row of `tandem status`."""

    worker: WorkerId
    peer: PeerId
    role: str
    phase: str
    node: str
    restarts: int
    report: Report | None


class Desired:
    """A worker that should live, or that has been drained and may be called back."""

    def __init__(self, worker: WorkerId, role: str) -> None:
        self.worker = worker
        self.role = role
        self.incarnation = 0
        self.wanted = True
        self.grace_s: float | None = None
        """What it was given when it was asked to end."""
        self.phase = "starting"
        self.member: Member | None = None
        self.handle: Handle | None = None
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def peer(self) -> PeerId:
        return peer_id(self.worker, self.incarnation)

    @property
    def failed(self) -> bool:
        """Whether its newest life was a short one."""
        return self.phase.startswith("restarts in")

    def state(self) -> KeptWorker:
        """What a new life of the controller needs to know of it."""
        return KeptWorker(self.worker, self.role, self.incarnation, self.wanted, self.grace_s, self.phase, self.member)

    @classmethod
    def restored(cls, kept: KeptWorker) -> Desired:
        """From its `state`."""
        worker = cls(kept.worker, kept.role)
        worker.incarnation, worker.wanted, worker.grace_s = kept.incarnation, kept.wanted, kept.grace_s
        worker.phase, worker.member = kept.phase, kept.member
        worker.first_ready.set_result(None)
        return worker


def desired_workers(config: Config) -> list[tuple[WorkerId, str]]:
    """Worker id and role of everything that a configuration asks for."""
    pools = config.pools
    counts = {
        "prefill": pools.prefill.replicas if pools.prefill else 0,
        "decode": pools.decode.replicas if pools.decode else 0,
        "colocated": pools.colocated.replicas if pools.colocated else 0,
        "gateway": config.gateway.replicas,
    }
    return [(f"{role}-{index}", role) for role, count in counts.items() for index in range(count)]


class Controller:
    """Owned by one event loop.

    Args:
        config: what should run.
        launcher: starts it.
        clock: tells the time.
        on_change: called when `state` has changed.
    """

    def __init__(
        self, config: Config, launcher: Launcher, clock: Clock, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._clock = clock
        self._on_change = on_change
        self._groups = ExpertGroups(config)
        self._desired: list[Desired] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._version = 0
        self._host_tiers: list[Member] = []
        self._stopping = False
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._num_events = 0
        self._news = asyncio.Condition()

    async def start(self) -> None:
        """Launch everything, and wait until everything serves.

        Raises:
            TandemError: a worker could not start, or `kv.require_rdma` cannot be met; everything is stopped again.
        """
        self._desired = [Desired(worker, role) for worker, role in desired_workers(self._config)]
        self._tasks = [asyncio.create_task(self._supervise(worker)) for worker in self._desired]
        try:
            starts = [worker.first_ready for worker in self._desired]
            if self._config.kv.require_rdma:
                await asyncio.gather(*starts, self._try_links())
                await self._check_links()
            else:
                await asyncio.gather(*starts)
        except BaseException:
            await self.stop(grace_s=0)
            raise

    def state(self) -> ControllerState:
        """What `take_over` needs."""
        events = [KeptEvent(*event) for event in list(self._events)[-_KEPT_EVENTS:]]
        workers = [worker.state() for worker in self._desired]
        return ControllerState(self._version, self._num_events, events, workers, *self._groups.state())

    async def take_over(self, state: ControllerState, host_tiers: list[Member], how: str) -> None:
        """Go on where the last life of the controller ended, instead of `start`: with all that live, and with new lives
        of those that have died meanwhile. Nobody who lives notices.

        Args:
            state: the last that it kept.
            host_tiers: that other nodes may read.
            how: it ended.
        """
        self._version = state.version + _SKIPPED
        self._num_events = state.num_events + _SKIPPED
        self._events.extend(Event(event.number, event.at_s, event.text) for event in state.events)
        self._host_tiers = host_tiers
        self._groups.restore(state.groups, state.learned)
        self._desired = [Desired.restored(kept) for kept in state.workers]
        lost = [worker.peer for worker in self._desired if worker.member is not None]
        await asyncio.gather(*(self._recall(worker) for worker in self._desired if worker.phase != "drained"))
        living = [worker for worker in self._desired if worker.handle is not None]
        taken = [worker for worker in living if worker.member is not None]
        lost = [peer for peer in lost if peer not in {worker.peer for worker in taken}]
        many = "worker was" if len(taken) == 1 else "workers were"
        await self._tell(f"the controller ended ({how}) and was started again; {len(taken)} {many} taken over")
        await self._announce()  # of all at once: to miss somebody who lives would end what runs on him
        for peer in lost:
            await self._tell(f"{peer} ended meanwhile")
        for worker in self._desired:
            if worker.phase != "drained":
                self.background(self._supervise(worker, worker.handle))
            if worker.handle is not None and worker.grace_s is not None:
                self.background(worker.handle.stop(worker.grace_s, leaves=True))
        for peer in lost:
            await self._end_group(peer)

    async def stop(self, grace_s: float) -> None:
        """End everything: gateways first, so that no new request comes. Idempotent."""
        self._stopping = True
        for role_is_gateway in (True, False):
            await asyncio.gather(
                *(
                    w.handle.stop(grace_s)
                    for w in self._desired
                    if w.handle and (w.role == "gateway") == role_is_gateway
                )
            )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def leaving(self, peer: PeerId, *, hands_over: bool = True) -> None:
        """A process was asked to end: it gets nothing new, and finishes what it has, or ``hands_over`` what runs on
        it, where another worker can go on with it."""
        for worker in self._desired:
            if worker.peer == peer and worker.member is not None:
                worker.phase = "leaving"
                worker.member = msgspec.structs.replace(worker.member, ready=False, hands_over=hands_over)
                await self._tell(f"{peer} was asked to end")
                await self._announce()

    async def note(self, peer: PeerId, text: str) -> None:
        """A process tells something that operators want to know."""
        await self._tell(f"{peer}: {text}")

    async def follow_host_tiers(self, host_tiers: list[Member]) -> None:
        """These are the nodes' host tiers that other nodes may read."""
        self._host_tiers = host_tiers
        if not self._stopping:
            await self._announce()

    async def meet(self, peer: PeerId, rendezvous: str) -> str:
        """Wait until all workers that share experts with ``peer`` are there; see `ExpertGroups.meet`."""
        first = await self._groups.meet(peer, rendezvous)
        self._on_change()
        return first

    def learned(self, peer: PeerId) -> bytes:
        """What the group before that of ``peer`` left of its experts; see `ExpertGroups.learned`."""
        return self._groups.learned(peer)

    def keep_learned(self, peer: PeerId, learned: bytes) -> None:
        """What the next group of these workers is to know; see `ExpertGroups.keep`."""
        self._groups.keep(peer, learned)
        self._on_change()

    @property
    def desired(self) -> list[Desired]:
        """Who should live or was drained; of each role in the order of their numbers."""
        return self._desired

    def take_in(self, worker: Desired) -> None:
        """Let a new worker, or one that was drained, live. Does not wait; a start that fails is tried again."""
        worker.wanted = True
        if worker not in self._desired:
            worker.first_ready.set_result(None)
            self._desired.append(worker)
        elif worker.phase != "drained":
            self._on_change()
            return  # it still leaves, and then begins another life
        self.background(self._supervise(worker))

    def take_out(self, worker: Desired, grace_s: float, *, restart: bool, hand_over: bool = True) -> None:
        """Have a worker finish or hand over what it has, for at most ``grace_s`` seconds, and end. Does not wait.

        Args:
            worker: ready or not.
            grace_s: what is not finished by then goes on elsewhere.
            restart: whether another life follows.
            hand_over: whether what runs on a decode worker goes on elsewhere, with its KV; else it is finished there.
        """
        worker.wanted = restart
        worker.grace_s = grace_s
        if worker.member is not None:
            worker.phase = "leaving"  # at once: whoever is asked next may be the last that is ready
        self._on_change()
        self.background(self._end(worker.peer, worker.handle, grace_s, hand_over))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done until it is over, or the controller stops. Does not wait."""
        self._tasks = [task for task in self._tasks if not task.done()] + [asyncio.create_task(work)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of the workers or the membership."""
        async with self._news:
            await self._news.wait_for(condition)

    async def status(self) -> list[WorkerStatus]:
        """Every worker, and its load."""
        handles = [worker.handle for worker in self._desired]
        reports = await asyncio.gather(*(handle.report() if handle else _nothing() for handle in handles))
        return [
            WorkerStatus(
                w.worker, w.peer, w.role, w.phase, w.member.node if w.member else "", w.incarnation - 1, report
            )
            for w, report in zip(self._desired, reports, strict=True)
        ]

    def phases(self) -> dict[WorkerId, str]:
        """How far each worker is."""
        return {worker.worker: worker.phase for worker in self._desired}

    async def events(self, after: int, timeout_s: float) -> list[Event]:
        """Events with a number above ``after``; waits for one for at most ``timeout_s``."""
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(lambda: self._num_events > after), timeout_s)
            except TimeoutError:
                return []
        return [event for event in self._events if event.number > after]

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _end(self, peer: PeerId, handle: Handle | None, grace_s: float, hand_over: bool) -> None:
        await self.leaving(peer, hands_over=hand_over)
        if handle is not None:
            await handle.stop(grace_s, leaves=True)

    def _on_phase(self, worker: Desired) -> Callable[[str], None]:
        def on_phase(phase: str) -> None:
            if worker.member is None:
                worker.phase = phase

        return on_phase

    async def _recall(self, worker: Desired) -> None:
        """Find a worker's process again: it has a handle then, and a member if it serves."""
        worker.handle = self._launcher.adopt(worker.peer, self._on_phase(worker))
        if worker.member is None:
            return  # it was starting, and is waited for as ever
        try:
            if worker.handle is not None:
                await asyncio.wait_for(worker.handle.ready(), _RECALL_TIMEOUT_S)
                return
        except TimeoutError:
            return  # it is silent, which is no reason to end it: if it is dead, `gone` will tell
        except TandemError as error:
            logger.warning("%s is not taken over: %s", worker.peer, error)
            worker.handle = None
        worker.member = None

    async def _supervise(self, worker: Desired, taken: Handle | None = None) -> None:
        """Keep one worker alive: each life is a new incarnation, and short lives are followed by longer pauses.

        Args:
            worker: who.
            taken: the process that it is now; None: there is none.
        """
        backoff_s = 0.0
        while (taken is not None or worker.wanted) and not self._stopping:
            if taken is None:
                worker.incarnation += 1
                worker.grace_s = None
                worker.phase = "starting"
                self._on_change()
            started_s, why = self._clock.monotonic_s(), ""
            try:
                await self._live(worker, taken)
            except TandemError as error:
                if not worker.first_ready.done():
                    worker.first_ready.set_exception(error)
                    return
                why = f": {error.message}"
                await self._tell(f"{worker.peer} did not start{why}")
            if self._stopping:
                return
            lived_s = self._clock.monotonic_s() - started_s
            well = lived_s > _STABLE_S or worker.grace_s is not None
            taken = None
            backoff_s = 0.0 if well else min(max(2 * backoff_s, _FIRST_BACKOFF_S), _MAX_BACKOFF_S)
            if backoff_s:
                worker.phase = f"restarts in {backoff_s:g} s after a life of {lived_s:.1f} s"
                await self._tell(f"{worker.worker} {worker.phase}")
                worker.phase += why
                await asyncio.sleep(backoff_s)
        worker.phase = "drained"
        self._launcher.release(worker.worker)
        await self._tell(f"{worker.worker} is drained")

    async def _live(self, worker: Desired, taken: Handle | None) -> None:
        """From launch, or from where it was ``taken`` over, to death. Raises what the start raised."""
        handle = worker.handle = taken or self._launcher.launch(worker.peer, worker.role, self._on_phase(worker))
        try:
            if worker.member is None:
                await self._begin(worker, handle)
            how = await handle.gone()
            if not self._stopping:
                await self._tell(f"{worker.peer} is gone: {how}")
        except WorkerError as error:  # died before it was ready
            if not worker.first_ready.done():
                raise
            await self._tell(f"{worker.peer} died while starting: {error.message}")
        finally:
            worker.handle = None
            worker.phase = "gone"
            if worker.member is not None:
                worker.member = None
                if not self._stopping:
                    await self._announce()
            await self._end_group(worker.peer)

    async def _begin(self, worker: Desired, handle: Handle) -> None:
        worker.member = await handle.ready()
        worker.phase = "ready"
        await self._announce()
        if worker.first_ready.done():
            await self._tell(f"{worker.peer} is ready")
        else:
            worker.first_ready.set_result(None)

    async def _end_group(self, gone: PeerId) -> None:
        """Those who shared experts with one that is gone begin anew with its next life."""
        others = self._groups.gone(gone)
        handles = [worker.handle for worker in self._desired if worker.peer in others and worker.handle]
        if handles and not self._stopping:
            await self._tell(f"{', '.join(sorted(others))} shared experts with {gone}, and start anew")
            await asyncio.gather(*(handle.stop(0) for handle in handles))

    async def _try_links(self) -> None:
        """Find out before the models are read, which may take minutes, whether `kv.require_rdma` can be met.

        Raises:
            ConfigError: a decode worker could not read from a prefill worker.
        """
        await asyncio.sleep(0)  # the handles come with the launch
        owners, readers = (
            [(w.peer, w.handle) for w in self._desired if w.role == role and w.handle] for role in ("prefill", "decode")
        )
        try:
            async with asyncio.timeout(_TRIAL_TIMEOUT_S):
                offers = await asyncio.gather(*(handle.link_offer() for _, handle in owners))
                answers = await asyncio.gather(*(handle.link_refusals(offers) for _, handle in readers))
        except (WorkerError, TimeoutError) as error:
            logger.warning("links are checked later: %s", error)  # who died tells why itself
            return
        finally:
            # An owner's end stays until the last reader has tried, also where that one starts when the owner serves.
            await asyncio.gather(*(handle.end_trial() for _, handle in owners + readers))
        for (reader, _), refusals in zip(readers, answers, strict=True):
            for (owner, _), reason in zip(owners, refusals, strict=True):
                if reason:
                    raise _cannot_read(reader, owner, reason)

    async def _check_links(self) -> None:
        """Wait until every decode worker has shaken hands with every prefill worker, by the rules of
        `kv.require_rdma`.

        Raises:
            ConfigError: one cannot read from another.
            WorkerError: they have not come to terms in time.
        """
        missing: list[str] = []
        try:
            async with asyncio.timeout(_LINKS_TIMEOUT_S):
                while True:
                    owners = {worker.peer for worker in self._desired if worker.role == "prefill"}
                    missing = []
                    for reader in await self.status():
                        if reader.role != "decode":
                            continue
                        report = reader.report
                        for owner, reason in sorted(report.refused.items()) if report else ():
                            raise _cannot_read(reader.peer, owner, reason)
                        missing += [
                            f"{reader.peer} ← {owner}" for owner in owners - set(report.peers if report else ())
                        ]
                    if not missing:
                        return
                    await asyncio.sleep(_LINKS_POLL_S)
        except TimeoutError:
            raise WorkerError(f"no handshake within {_LINKS_TIMEOUT_S:g} s: {', '.join(sorted(missing))}") from None

    async def _announce(self) -> None:
        """Tell everybody who is there."""
        self._version += 1
        self._on_change()
        async with self._news:
            self._news.notify_all()
        members = [worker.member for worker in self._desired if worker.member is not None]
        membership = Membership(self._version, members, self._host_tiers)
        await asyncio.gather(*(w.handle.follow(membership) for w in self._desired if w.member and w.handle))

    async def _tell(self, text: str) -> None:
        logger.info("%s", text)
        async with self._news:
            self._num_events += 1
            self._events.append(Event(self._num_events, self._clock.wall_s(), text))
            self._on_change()
            self._news.notify_all()


async def _nothing() -> None:
    return None


def _cannot_read(reader: PeerId, owner: PeerId, reason: str) -> ConfigError:
    return ConfigError(
        f"{reader} cannot read KV from {owner}: {reason}",
        fix="give both hosts an active RDMA port and NIXL or UCX (`tandem doctor` shows what they have), "
        "put both workers on one host, or leave kv.require_rdma out",
    )
