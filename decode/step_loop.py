"""One engine step after the other, and on a device one ahead: while it computes, the host deals with the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..core.clock import Clock
from ..engine.batch import Work
from ..engine.engine import Engine, Outcome, Step
from .scheduler import DecodeScheduler
from .stream import Stream, StreamState


class Landed(NamedTuple):
    """What a step did."""

    outcomes: list[tuple[Stream, Outcome]]
    """Also of streams that ended while it ran."""
    prompt_tokens: int
    seconds: float


class _Flight(NamedTuple):
    """A step that was started, and whose outcome is still to come."""

    step: Step
    streams: dict[int, Stream]
    """By the id of their sequence."""
    prompt_tokens: int
    started_s: float


class StepLoop:
    """Owned by the engine thread.

    Args:
        engine: computes.
        scheduler: says what.
        clock: for durations.
        on_preempted: told of each stream that lost its blocks to others.
        on_landed: told of each step that ended, in order.
        on_failed: told the streams of a step that failed, and why.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        clock: Clock,
        on_preempted: Callable[[Stream], None],
        on_landed: Callable[[Landed], None],
        on_failed: Callable[[list[Stream], RuntimeError], None],
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._clock = clock
        self._on_preempted = on_preempted
        self._on_landed = on_landed
        self._on_failed = on_failed
        self._flight: _Flight | None = None
        self._landed_s = 0.0

    def turn(self) -> bool:
        """Start a step and finish one: where the engine overlaps steps, the one before. Returns whether there was
        anything to compute. Blocks until the step that it finishes has ended."""
        previous = self._flight
        plan = self._scheduler.plan(in_flight=previous is not None)
        if plan is None:
            assert previous is not None
            self._land(previous)
            previous, plan = None, self._scheduler.plan()
        assert plan is not None, "nothing is in flight"
        for stream in plan.preempted:
            self._on_preempted(stream)
        flight = self._start(plan.works) if plan.works else None
        if previous is not None:
            self._land(previous)
        self._flight = flight
        if flight is not None and not self._engine.overlaps:
            self._land(flight)
        return previous is not None or bool(plan.works)

    def _start(self, works: list[Work]) -> _Flight | None:
        streams = {id(stream.sequence): stream for stream in self._scheduler.computing()}
        started_s = self._clock.monotonic_s()
        prompt_tokens = sum(w.num_new for w in works if streams[id(w.sequence)].state is StreamState.PREFILLING)
        planned = {id(work.sequence): streams[id(work.sequence)] for work in works}
        try:
            step = self._engine.submit(works)
        except RuntimeError as error:
            self._on_failed(list(planned.values()), error)
            return None
        return _Flight(step, planned, prompt_tokens, started_s)

    def _land(self, flight: _Flight) -> None:
        self._flight = None
        try:
            outcomes = self._engine.collect(flight.step)
        except RuntimeError as error:
            self._on_failed(list(flight.streams.values()), error)
            return
        now_s = self._clock.monotonic_s()
        # A step that was queued behind another began when that one ended.
        seconds = now_s - max(flight.started_s, self._landed_s)
        self._landed_s = now_s
        pairs = [(flight.streams[id(outcome.sequence)], outcome) for outcome in outcomes]
        self._on_landed(Landed(pairs, flight.prompt_tokens, seconds))
