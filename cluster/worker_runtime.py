"""A worker process: one thread that computes, one that speaks, and the queue between them.

The engine thread alone touches the model, the block pool and the transports. It sleeps when there is nothing to do,
and is woken by messages and by finished reads. If either thread breaks, the process ends: the controller starts a new
one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import NamedTuple

import msgspec
from prometheus_client import CollectorRegistry

from ..core.clock import SystemClock
from ..core.config import Config
from ..core.environment import cache_folder
from ..core.errors import CapacityError, ConfigError, RequestError, TandemError, WorkerError
from ..core.expert_messages import LoadEntries
from ..core.garbage import settle
from ..core.health import Vitals
from ..core.ids import PeerId
from ..core.kv_messages import KVClear, KVControlled, KVPin, KVReport, KVUnpin, KVWatch
from ..core.log import logger
from ..core.messages import Member, Membership, Message, Report, Scrape, Scraped, Subscribe
from ..core.metrics import WorkerMetrics, render
from ..core.wire import ClusterKeys
from ..engine.expert_balancer import Balancer
from ..kv_transfer.offload.network import Servers
from .expert_worker import Legacy
from .heartbeat import Heartbeat
from .worker_parts import WorkerParts

_INBOX_SIZE = 16384
_MAX_TAKEN_AT_ONCE = 1024
_REPORT_PERIOD_S = 1.0
_RETRY_PERIOD_S = 1.0
_AGREEMENT_PERIOD_S = 0.005
"""How long a worker that shares experts may keep the others waiting when it has nothing to do."""

Progress = Callable[[str], None]
"""Called with a worker's phase, for people: "weights 40 %"."""


class _Lost(NamedTuple):
    peer: PeerId


_Item = tuple[PeerId, Message] | _Lost | None
"""A message and its sender, a lost peer, or None: reads have ended."""


class WorkerRuntime:
    """One life of one worker.

    Args:
        peer: who we are.
        role: prefill, decode or colocated.
        config: the cluster's.
        keys: the cluster's.
        address: this node's address, where peers reach us.
        node: the node's name, for people.
        progress: told how the start goes on.
        host_tier: called with the bytes of a block, where a host tier is configured: where the node's is found.
        meet: called with a rendezvous of which this worker may be the first rank, where workers share experts: blocks
            until all of them have called, and returns the first's.
        note: told, on any thread, what operators want to know.
        legacy: of the workers that shared experts before.
    """

    def __init__(
        self,
        peer: PeerId,
        role: str,
        config: Config,
        keys: ClusterKeys,
        address: str,
        node: str,
        progress: Progress,
        host_tier: Callable[[int], Path] = lambda block_bytes: cache_folder(),
        meet: Callable[[str], str] = lambda rendezvous: rendezvous,
        note: Callable[[str], object] = lambda text: None,
        legacy: Legacy = Legacy(),
    ) -> None:
        self.peer = peer
        self._role = role
        self._config = config.of_pool(role)
        self._keys = keys
        self._address = address
        self._node = node
        self._progress = progress
        self._host_tier = host_tier
        self._meet = meet
        self._note = note
        self._legacy = legacy
        self._metrics = WorkerMetrics(CollectorRegistry())
        self._clock = SystemClock()
        self._heartbeat = Heartbeat(self._clock)
        self._inbox: queue.Queue[_Item] = queue.Queue(_INBOX_SIZE)
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._failure: TandemError | None = None
        self._report = Report(0, 0, 0, 0, 0)
        self._reported_s = 0.0
        self._subscribers: set[PeerId] = set()
        self._membership: Membership | None = None
        self._linked: set[PeerId] = set()
        self._host_tiers = Servers()
        self._retry_s: float | None = None
        self._busy = False
        self._balancer: Balancer | None = None
        self._thread = threading.Thread(target=self._guarded, name="engine")

    # ---- any thread -------------------------------------------------------------------------------------------------

    def start(self) -> Member:
        """Load the model, warm up, listen. Blocks until requests can be served.

        Raises:
            ConfigError: the model cannot be served as configured.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return Member(self.peer, self._role, self._node, self._parts.mesh.endpoint)

    def follow(self, membership: Membership) -> None:
        """The cluster has changed."""
        self._put(("controller", membership))

    def report(self) -> Report:
        """The newest load figures; at most a second old while anything changes."""
        return self._report

    def vitals(self, with_metrics: bool) -> Vitals:
        """How we are, told without the engine thread, which may be the one that stands still."""
        return Vitals(self._heartbeat.stalled_s(), render(self._metrics.registry) if with_metrics else "")

    def rebalance(self, timeout_s: float) -> str:
        """Place the experts of this worker's group anew. Blocks for ``timeout_s`` at most.

        Returns:
            what became of it, for people.

        Raises:
            CapacityError: they cannot be moved, or this is not the worker that plans.
            WorkerError: it has not ended by then, or the worker ends.
        """
        if self._balancer is None:
            raise CapacityError(f"{self.peer} has no experts that could be moved", fix="see experts.balance")
        try:
            return self._balancer.demand().result(timeout_s)
        except TimeoutError:
            raise WorkerError(f"{self.peer}: experts are still being moved after {timeout_s:g} s") from None
        except CancelledError:
            raise WorkerError(f"{self.peer} ends") from None

    def expert_load(self, after: int) -> LoadEntries:
        """What experts computed since entry ``after``."""
        return LoadEntries() if self._balancer is None else self._balancer.entries(after)

    def stop(self, grace_s: float) -> None:
        """Finish what peers still need, at most ``grace_s`` seconds long, and end the threads. Blocks. Idempotent."""
        self._stop_by_s = self._clock.monotonic_s() + grace_s
        self._stopping.set()
        self._put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _put(self, item: _Item) -> None:
        self._inbox.put(item)

    def _nudge(self) -> None:
        """A full queue will wake the engine by itself."""
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(None)

    # ---- mesh thread ------------------------------------------------------------------------------------------------

    def _on_message(self, sender: PeerId, message: Message) -> None:
        if isinstance(message, Scrape):
            self._parts.mesh.send(sender, Scraped(message.number, render(self._metrics.registry)))
        elif isinstance(message, Membership):  # comes from the controller by Ray, never from a peer
            self._metrics.bad_frames.labels("mesh").inc()
        else:
            self._put((sender, message))

    # ---- engine thread ----------------------------------------------------------------------------------------------

    def _guarded(self) -> None:
        try:
            self._build()
        except TandemError as error:
            self._failure = error
            self._ready.set()
            return
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is told
            logger.exception("the worker could not start")
            self._failure = ConfigError(f"{self.peer} could not start: {type(error).__name__}: {error}")
            self._ready.set()
            return
        self._ready.set()
        try:
            self._run()
        except BaseException:  # noqa: BLE001 - whatever it was, it is told
            logger.exception("the engine thread broke; the process ends")
            os._exit(70)

    def _build(self) -> None:
        self._parts = WorkerParts(
            self.peer,
            self._role,
            self._config,
            self._keys,
            self._address,
            self._metrics,
            self._clock,
            self._progress,
            self._host_tier,
            self._host_tiers,
            self._meet,
            self._note,
            self._legacy,
            self._nudge,
            self._on_message,
            lambda peer: self._put(_Lost(peer)),
        )
        self._balancer = self._parts.balancer
        self._update_report()
        self._parts.mesh.start()
        settle()
        self._progress("ready")
        logger.info("ready at %s", self._parts.mesh.endpoint)

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._may_end()):
            self._take(self._wait_s())
            self._heartbeat.wakes()
            now_s = self._clock.monotonic_s()
            deadline_s = self._parts.worker.next_deadline_s()
            if deadline_s is not None and now_s >= deadline_s:
                self._parts.worker.tick()
            try:
                self._busy = self._parts.worker.step() or self._parts.engine.accompany()
            except WorkerError:
                if not self._stopping.is_set():
                    raise
                break  # workers that share experts end together
            if self._busy:
                self._heartbeat.steps()
            self._look_after_links(now_s)
            self._parts.control.poll(now_s)
            self._parts.publisher.poll(now_s)
            self._publish_report(now_s)
        self._parts.close()
        logger.info("stopped")

    def _may_end(self) -> bool:
        return self._parts.worker.drained() or self._clock.monotonic_s() >= self._stop_by_s

    def _wait_s(self) -> float | None:
        """How long nothing may happen; None: until somebody wakes us."""
        if self._busy:
            return 0.0
        deadlines = [
            self._parts.worker.next_deadline_s(),
            self._retry_s,
            self._parts.publisher.next_due_s(),
            self._parts.control.next_due_s(),
        ]
        if self._parts.engine.model.experts is not None:
            deadlines.append(self._clock.monotonic_s() + _AGREEMENT_PERIOD_S)
        report = self._current_report()
        # KV that is on its way from others is not ours to hurry.
        self._heartbeat.sleeps(has_work=report.running > 0 or report.queued_tokens > 0)
        if report != self._report:
            deadlines.append(self._reported_s + _REPORT_PERIOD_S)
        if self._stopping.is_set():
            deadlines.append(self._clock.monotonic_s() + 0.05)
        known = [deadline_s for deadline_s in deadlines if deadline_s is not None]
        return max(0.0, min(known) - self._clock.monotonic_s()) if known else None

    def _take(self, wait_s: float | None) -> None:
        """Handle what is in the inbox, after waiting for a first item for at most ``wait_s``."""
        try:
            item = self._inbox.get(timeout=wait_s) if wait_s != 0.0 else self._inbox.get_nowait()
            self._heartbeat.wakes()
            for _ in range(_MAX_TAKEN_AT_ONCE):
                self._handle(item)
                item = self._inbox.get_nowait()
            self._handle(item)
        except queue.Empty:
            return

    def _handle(self, item: _Item) -> None:
        if item is None:
            return
        if isinstance(item, _Lost):
            logger.warning("lost %s", item.peer)
            self._subscribers.discard(item.peer)
            self._parts.publisher.forget(item.peer)
            self._linked.discard(item.peer)
            self._retry_s = self._clock.monotonic_s() + _RETRY_PERIOD_S
            self._parts.worker.peer_lost(item.peer)
            return
        sender, message = item
        if isinstance(message, Subscribe):
            if sender in self._subscribers:
                # It had lost us, and gave what it had asked for to others: nobody waits for our answers.
                self._parts.worker.peer_lost(sender)
            self._subscribers.add(sender)
            self._parts.mesh.send(sender, self._report)
        elif isinstance(message, KVWatch):
            self._parts.publisher.watch(sender)
        elif isinstance(message, KVClear | KVPin | KVUnpin):
            self._carry_out(sender, message)
        elif isinstance(message, Membership):
            self._membership = message
            self._host_tiers.follow({tier.peer: tier.endpoint for tier in message.host_tiers})
            self._link(message)
            self._parts.worker.handle(sender, message)
        else:
            self._parts.worker.handle(sender, message)

    def _carry_out(self, sender: PeerId, order: KVClear | KVPin | KVUnpin) -> None:
        try:
            answer = KVControlled(order.number, self._parts.control.carry_out(order))
            logger.info("%s: %s, %d blocks", sender, type(order).__name__, answer.num_blocks)
        except RequestError as error:
            answer = KVControlled(order.number, 0, str(error))
        self._parts.mesh.send(sender, answer)

    def _link(self, membership: Membership) -> None:
        """Decode workers connect to every prefill worker, and to decode workers that hand over what they have."""
        if self._role != "decode":
            return
        members = [m for m in membership.members if m.role == "prefill"]
        # One that leaves takes nothing new, but still hands over.
        wanted = {m.peer: m.endpoint for m in members if m.ready or m.peer in self._linked}
        ending = [m for m in membership.members if m.role == "decode" and m.hands_over]
        if self.peer not in {member.peer for member in ending}:
            wanted |= {m.peer: m.endpoint for m in ending}
        for peer in self._linked - wanted.keys():
            self._parts.mesh.disconnect(peer)
        for peer in wanted.keys() - self._linked:
            self._parts.mesh.connect(peer, wanted[peer])
        self._linked = set(wanted)

    def _look_after_links(self, now_s: float) -> None:
        """A peer that was lost and is still a member may only have been out of reach: try again."""
        if self._retry_s is not None and now_s >= self._retry_s:
            self._retry_s = None
            if self._membership is not None:
                self._link(self._membership)
                self._parts.worker.handle("controller", self._membership)

    def _publish_report(self, now_s: float) -> None:
        if now_s - self._reported_s >= _REPORT_PERIOD_S and self._update_report():
            self._reported_s = now_s
            for subscriber in self._subscribers:
                self._parts.mesh.send(subscriber, self._report)

    def _current_report(self) -> Report:
        report = self._parts.worker.report()
        pool = self._parts.engine.pool
        used = pool.num_blocks - pool.num_free + pool.num_cached
        hits = report.cached_tokens // self._parts.engine.block_tokens
        cache = KVReport("", pool.num_blocks, used, 0, hits, 0, 0, 0.0, 0.0, pool.num_evicted, 0.0, 0, "")
        experts = None if self._balancer is None else self._balancer.report()
        return msgspec.structs.replace(report, kv=[cache, *self._parts.offloader.reports()], experts=experts)

    def _update_report(self) -> bool:
        report = self._current_report()
        if report == self._report:
            return False
        self._report = report
        pool = self._parts.engine.pool
        self._metrics.blocks.labels("free").set(pool.num_free)
        self._metrics.blocks.labels("cached").set(pool.num_cached)
        self._metrics.blocks.labels("used").set(pool.num_blocks - pool.num_free)
        self._metrics.running.set(report.running)
        self._metrics.waiting.set(report.waiting)
        self._metrics.leases.set(report.leases)
        self._parts.offloader.publish()
        return True
