"""The first rank's thread that knows the load of all, and proposes where experts should be."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..core.clock import Clock
from ..core.config_experts import BalanceConfig
from ..core.errors import CapacityError
from ..core.expert_messages import ExpertsReport, LoadEntries, LoadEntry
from ..core.log import logger
from ..core.metrics import ExpertMetrics
from ..eplb.balance import balancedness, num_moved
from ..eplb.learned import Learned
from ..eplb.migrate import Outcome
from ..eplb.placement import Placement, Topology, plan
from ..eplb.rebalance import Reason
from ..eplb.trigger import Trigger, TriggerSettings, TriggerState
from ..eplb.window import LoadWindow

_BYTES_PER_S = {"cuda": 50e9, "cpu": 1e9}
"""What a rank is thought to receive, beside serving."""
_MAX_ENTRIES = 256
"""Of the load, kept for those who record it."""
_MAX_SENT = 16
_RETRY_S = 0.02
_END_S = 10.0


class Look(NamedTuple):
    """What all ranks counted between two looks."""

    num_steps: int
    """With work."""
    seconds: float
    """That they took."""
    tokens: NDArray[np.int64]
    """[ranks, layers, logical]: on each rank."""


class _Attempt(NamedTuple):
    before: Placement
    demanded: Future[str] | None


class Planner:
    """Never blocks its callers.

    Args:
        propose: see `Migrator.propose`.
        current: where experts are.
        topology: of the slots.
        expert_bytes: of one expert of one layer.
        device_type: where they are.
        config: when to move.
        num_looks: that the window remembers.
        model: what recorded loads say that they are of.
        metrics: what to count.
        clock: of intervals and ages.
        note: told how attempts end that were not declined.
        keep: told, when experts have moved, a `Learned`, packed.
    """

    def __init__(
        self,
        propose: Callable[[Placement], None],
        current: Callable[[], Placement],
        topology: Topology,
        expert_bytes: int,
        device_type: str,
        config: BalanceConfig,
        num_looks: int,
        model: str,
        metrics: ExpertMetrics,
        clock: Clock,
        note: Callable[[str], object],
        keep: Callable[[bytes], object],
    ) -> None:
        self._propose = propose
        self._current = current
        self._topology = topology
        self._config = config
        self._expert_bytes = expert_bytes
        self._model = model
        self._metrics = metrics
        self._clock = clock
        self._note = note
        self._keep = keep
        settings = TriggerSettings(
            expert_bytes,
            _BYTES_PER_S[device_type],
            mode=config.when,
            interval_steps=config.steps,
            interval_s=config.interval_s,
            first_steps=max(1, config.steps // 4),
            min_gain=config.min_gain,
        )
        self._trigger = Trigger(settings, topology, clock)
        placement = current()
        num_layers, num_logical = placement.num_layers, placement.num_logical
        self._window = LoadWindow(num_looks, num_layers, num_logical)
        self._ranks = LoadWindow(num_looks, num_layers, topology.num_ranks)
        """[layers, ranks]: as it was, whatever experts were where."""
        self._steps: deque[tuple[int, float]] = deque(maxlen=num_looks)
        self._attempt: _Attempt | None = None
        self._changed = threading.Condition()
        self._looks: deque[Look] = deque(maxlen=_MAX_ENTRIES)
        self._demands: deque[Future[str]] = deque()
        self._ended: deque[Outcome] = deque()
        self._closing = False
        self._entries: deque[LoadEntry] = deque(maxlen=_MAX_ENTRIES)
        self._num_entries = 0
        self._attempts: Counter[str] = Counter()
        self._report = ExpertsReport(
            topology.num_ranks,
            num_layers,
            num_logical,
            topology.num_physical,
            int(placement.replica_count.max()),
            self._trigger.state.value,
            clock.wall_s(),
        )
        self._publish()
        self._thread = threading.Thread(target=self._run, name="experts-plan", daemon=True)
        self._thread.start()

    def hand(self, look: Look) -> None:
        """All ranks have counted."""
        with self._changed:
            self._looks.append(look)
            self._changed.notify_all()

    def ended(self, outcome: Outcome) -> None:
        """An attempt has."""
        with self._changed:
            self._ended.append(outcome)
            self._changed.notify_all()

    def demand(self) -> Future[str]:
        """See `Balancer.demand`."""
        answer: Future[str] = Future()
        with self._changed:
            if self._closing:
                raise CapacityError("the worker ends")
            self._demands.append(answer)
            self._changed.notify_all()
        return answer

    def report(self) -> ExpertsReport:
        """How the group is."""
        return self._report

    def entries(self, after: int) -> LoadEntries:
        """See `Balancer.entries`."""
        with self._changed:
            found = [entry for entry in self._entries if entry.number > after][:_MAX_SENT]
            last = self._num_entries
        report = self._report
        return LoadEntries(found, report.num_layers, report.num_experts, self._model, last)

    def close(self) -> None:
        """End. Blocks until the thread has, some seconds at most. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_END_S)
        for demand in self._demands:
            demand.cancel()
        if self._attempt is not None and self._attempt.demanded is not None:
            self._attempt.demanded.cancel()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._something)
                if self._closing:
                    return
                ended = self._ended.popleft() if self._ended else None
                look = self._looks.popleft() if self._looks and ended is None else None
                demanded = None
                if ended is None and look is None:
                    demanded = self._demands.popleft()
            try:
                if ended is not None:
                    self._conclude(ended)
                elif look is not None:
                    self._take(look)
                else:
                    self._plan(demanded)
            except Exception as error:  # noqa: BLE001 - it is told, and the next interval tries again
                logger.exception("experts: planning failed")
                self._recover(f"{type(error).__name__}: {error}", demanded)

    def _recover(self, why: str, demanded: Future[str] | None) -> None:
        if self._trigger.state is TriggerState.PLANNING:
            self._trigger.give_up(why)
        if self._attempt is not None:
            self._finish("exception", why, 0.0)
        else:
            self._tell("exception", why, demanded)

    def _something(self) -> bool:
        idle = self._attempt is None
        return bool(self._closing or self._looks or self._ended or (self._demands and idle))

    def _take(self, look: Look) -> None:
        if not look.num_steps:
            return
        tokens = look.tokens.sum(0)
        self._window.add_tokens(tokens)
        self._ranks.add_tokens(np.ascontiguousarray(look.tokens.sum(2).T))
        self._steps.append((look.num_steps, look.seconds))
        with self._changed:
            self._num_entries += 1
            self._entries.append(LoadEntry(self._num_entries, look.num_steps, tokens.astype("<i8").tobytes()))
        self._publish()
        if self._trigger.step(look.num_steps):
            self._plan(None)

    def _plan(self, demanded: Future[str] | None) -> None:
        load, current = self._window.load(), self._current()
        if demanded is not None and not load.any():
            self._tell("declined", "no load has been counted yet", demanded)
            return
        if demanded is not None and not self._trigger.demand():
            self._tell("declined", "experts are being moved already", demanded)
            return
        steps = sum(count for count, _ in self._steps)
        step_s = sum(seconds for _, seconds in self._steps) / max(1, steps)
        new = plan(load, self._topology, current, self._config.policy)
        decision = self._trigger.decide(load, current, new, step_s, forced=demanded is not None)
        self._report = msgspec.structs.replace(self._report, predicted=decision.predicted)
        if not decision.go:
            self._tell("declined", decision.reason, demanded)
            return
        logger.info(
            "experts: %s; balancedness %.4f, predicted %.4f, %d experts to move",
            decision.reason, decision.balancedness, decision.predicted, decision.num_moved,
        )  # fmt: skip
        self._attempt = _Attempt(current, demanded)
        self._publish()
        self._offer(new)

    def _offer(self, new: Placement) -> None:
        """Until the ranks have put the last attempt away."""
        by_s = self._clock.monotonic_s() + self._config.timeout_s
        while True:
            try:
                return self._propose(new)
            except CapacityError as error:
                if self._closing or self._clock.monotonic_s() > by_s:
                    self._finish("not_begun", error.message, 0.0)
                    return None
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, _RETRY_S)

    def _conclude(self, outcome: Outcome) -> None:
        detail = "" if outcome.reason is Reason.DONE else f"rank {outcome.rank}"
        if outcome.layer is not None:
            detail += f", layer {outcome.layer}"
        if outcome.detail:
            detail += f": {outcome.detail}"
        self._finish(outcome.reason.name.lower(), detail, outcome.duration_s, counted=True)

    def _finish(self, outcome: str, detail: str, took_s: float, *, counted: bool = False) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        now = self._current()
        done = outcome == Reason.DONE.name.lower()
        self._trigger.ended(error="" if done else f"{outcome} {detail}")
        moved, _ = num_moved(attempt.before, now, self._topology)
        if moved:
            self._keep(Learned.of(now, self._topology, self._window.load()).pack())
        report = self._report
        self._report = msgspec.structs.replace(
            report,
            max_replicas=int(now.replica_count.max()),
            placed_at_s=self._clock.wall_s() if moved else report.placed_at_s,
            took_s=took_s,
            moved=moved,
            moved_bytes=moved * self._expert_bytes,
            total_moved=report.total_moved + moved,
            total_bytes=report.total_bytes + moved * self._expert_bytes,
        )
        if done:
            # What ranks had under another placement says nothing of this one.
            self._ranks.clear()
            detail = f"{moved} experts moved in {took_s:.2f} s, predicted balancedness {report.predicted:.4f}"
        self._tell(outcome, detail, attempt.demanded, counted=counted)

    def _tell(self, outcome: str, detail: str, demanded: Future[str] | None, *, counted: bool = False) -> None:
        """``counted``: the rank's metrics have it already."""
        self._attempts[outcome] += 1
        if not counted:
            self._metrics.attempts.labels(outcome).inc()
        self._report = msgspec.structs.replace(
            self._report,
            outcome=outcome,
            detail=detail[:500],
            ended_at_s=self._clock.wall_s(),
            attempts=dict(self._attempts),
        )
        self._publish()
        if outcome != "declined":
            self._note(f"experts: {outcome}: {detail}")
        if demanded is not None:
            with contextlib.suppress(InvalidStateError):  # whoever asked has gone: the future was cancelled
                demanded.set_result(f"{outcome}: {detail}" if detail else outcome)

    def _publish(self) -> None:
        # Just after a move nothing is counted yet: what was told stays.
        counted = self._ranks.load() if self._ranks.num_entries else None
        report = msgspec.structs.replace(
            self._report,
            state=self._trigger.state.value,
            balancedness=self._report.balancedness if counted is None else balancedness(counted),
            window_steps=sum(count for count, _ in self._steps),
        )
        self._report = report
        self._metrics.balancedness.labels("now").set(report.balancedness)
        self._metrics.balancedness.labels("predicted").set(report.predicted)
        self._metrics.placed_at_s.set(report.placed_at_s)
        self._metrics.replicas.set(report.max_replicas)
