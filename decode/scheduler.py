"""Which streams a decode step works on: those that run, one token each, and parts of prompts that are computed here."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..core.clock import Clock
from ..core.urgency import before_levels
from ..engine.batch import Work
from ..engine.engine import Engine
from .stream import Stream, StreamState


class Plan(NamedTuple):
    """A step to be, and the streams that had to give their blocks up for it."""

    works: list[Work]
    preempted: list[Stream]


class DecodeScheduler:
    """The streams of a worker. Owned by the engine thread; nothing blocks.

    Streams have an order: by priority, and of one priority by arrival. The first that waits is admitted when there are
    blocks for all its known tokens, and a spare block for each stream that already runs; where layers see a window,
    they need blocks for a window and a chunk alone. Nobody who runs is stopped for it. When a running stream needs a
    block and none is free, or no prompt can go on, the last in order gives its blocks up and waits again: the first
    always moves on.

    Args:
        engine: whose blocks are given out.
        max_running: outputs that have blocks at a time.
        max_batched_tokens: tokens of one step, when some are a prompt's.
        clock: for the streams' histories.
        fetch: asked before a stream is admitted, matched against the prefix cache, with the spare blocks: whether tiers
            have begun to load what it lacks. If so it gives its place and its blocks up until `fetched`.
    """

    def __init__(
        self,
        engine: Engine,
        max_running: int,
        max_batched_tokens: int,
        clock: Clock,
        fetch: Callable[[Stream, int], bool] = lambda stream, spare: False,
    ) -> None:
        self._engine = engine
        self._max_running = max_running
        self._max_batched_tokens = max_batched_tokens
        self._clock = clock
        self._fetch = fetch
        self._waiting: list[Stream] = []
        """By order."""
        self._fetching: dict[int, Stream] = {}
        self._loading: dict[int, Stream] = {}
        self._prefilling: dict[int, Stream] = {}
        self._running: dict[int, Stream] = {}

    def __iter__(self) -> Iterator[Stream]:
        yield from self._waiting
        for streams in (self._fetching, self._loading, self._prefilling, self._running):
            yield from streams.values()

    def computing(self) -> Iterator[Stream]:
        """The streams that take part in steps."""
        for streams in (self._prefilling, self._running):
            yield from streams.values()

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_prefilling(self) -> int:
        return len(self._prefilling)

    def before_levels(self) -> list[tuple[int, int]]:
        """Streams that wait or whose prompts are computed here, and tokens of these, before a request of each level of
        `core.urgency`; all of them before the last."""
        return before_levels(
            (s.request.priority, s.sequence.num_tokens - s.sequence.num_computed)
            for streams in (self._waiting, self._fetching.values(), self._prefilling.values())
            for s in streams
        )

    @property
    def num_prefilling_tokens(self) -> int:
        """Prompt tokens that are being computed here."""
        return sum(s.sequence.num_tokens - s.sequence.num_computed for s in self._prefilling.values())

    @property
    def num_loading_tokens(self) -> int:
        """Prompt tokens that prefill workers have yet to compute for us."""
        waiting = [s.sequence for s in self._loading.values() if s.first_tokens is None]
        return sum(sequence.num_tokens - sequence.num_computed for sequence in waiting)

    def add(self, stream: Stream) -> None:
        """Queue a new or split-off stream, in its order."""
        bisect.insort(self._waiting, stream, key=lambda s: s.order)

    def admit(self) -> Iterator[Stream]:
        """Take waiting streams off the queue while there is room for them.

        Prompts that are computed here start when they would take part in the next step, not sooner: what a step
        computes, later streams with the same prefix find in the cache. They do not wait for less urgent ones.

        Each comes with blocks to compute all its tokens with, matched against the prefix cache, and must be given to
        `load`, `prefill` or `end` before the next is asked for.
        """
        while self._waiting:
            stream = self._waiting[0]
            sequence = stream.sequence
            if self._num_tokens_before(stream) >= self._max_batched_tokens:
                return
            starting = (self._fetching, self._loading, self._prefilling)
            busy = sum(len(s.children) for streams in starting for s in streams.values()) + len(self._running)
            if busy and busy + len(stream.children) > self._max_running:
                return
            # The cached part first: what is left of the pool then tells how much can be allocated.
            self._engine.match_prefix(sequence)
            spare = len(self._running) * len(self._engine.groups)
            if self._fetch(stream, spare):
                self._engine.free(sequence)
                del self._waiting[0]
                stream.move(StreamState.FETCHING, self._clock.monotonic_s())
                self._fetching[id(stream)] = stream
                continue
            if not self._engine.reserve_prompt(sequence, spare):
                self._engine.free(sequence)
                return
            del self._waiting[0]
            yield stream

    def fetched(self, stream: Stream) -> None:
        """Tiers have given what they had to the prefix cache, or took too long: a stream waits as before, in its
        order."""
        del self._fetching[id(stream)]
        stream.move(StreamState.WAITING, self._clock.monotonic_s())
        self.add(stream)

    def load(self, stream: Stream) -> None:
        """A stream's prompt comes from a prefill worker."""
        self._prefilling.pop(id(stream), None)
        self._engine.expect(stream.sequence)
        stream.move(StreamState.LOADING, self._clock.monotonic_s())
        self._loading[id(stream)] = stream

    def prefill(self, stream: Stream, why: str = "") -> None:
        """A stream's prompt, or the rest of it, is computed here."""
        self._loading.pop(id(stream), None)
        stream.move(StreamState.PREFILLING, self._clock.monotonic_s(), why)
        self._prefilling[id(stream)] = stream

    def run(self, stream: Stream) -> None:
        """A stream has everything: it takes part in steps."""
        self._loading.pop(id(stream), None)
        self._prefilling.pop(id(stream), None)
        stream.move(StreamState.RUNNING, self._clock.monotonic_s())
        self._running[id(stream)] = stream

    def waiting(self) -> list[Stream]:
        """The streams without blocks."""
        return [*self._waiting, *self._fetching.values()]

    def hold(self, stream: Stream) -> None:
        """A running stream takes part in no step any more, and keeps its blocks."""
        del self._running[id(stream)]
        stream.move(StreamState.HELD, self._clock.monotonic_s())

    def drain(self, stream: Stream) -> None:
        """A stream is over, but reads may still write into its blocks."""
        stream.move(StreamState.DRAINING, self._clock.monotonic_s())

    def end(self, stream: Stream) -> None:
        """A stream is over; its blocks are free."""
        if stream.state is StreamState.WAITING:
            self._waiting = [other for other in self._waiting if other is not stream]
        for streams in (self._fetching, self._loading, self._prefilling, self._running):
            streams.pop(id(stream), None)
        stream.move(StreamState.ENDED, self._clock.monotonic_s())
        self._engine.free(stream.sequence)

    def plan(self, in_flight: bool = False) -> Plan | None:
        """The next step.

        Every running stream computes its newest token, which a step in flight may still have to sample; what room is
        left goes to prompts, in order.

        Args:
            in_flight: whether the outcome of a step is still to come.

        Returns:
            None when blocks lack that the step in flight may set free: ask again when its outcome is known.
        """
        preempted: list[Stream] = []
        works: list[Work] = []
        for stream in sorted(self._running.values(), key=lambda s: s.order):
            sequence = stream.sequence
            if sequence.num_expected >= stream.limit:  # the token in flight is its last
                continue
            while stream.state is StreamState.RUNNING:
                if self._engine.reserve(sequence, sequence.num_expected):
                    works.append(Work(sequence, 1))
                    break
                if in_flight:
                    return None
                preempted.append(self._preempt())
        prompts = self._plan_prompts(self._max_batched_tokens - len(works))
        while not (works or prompts or in_flight) and len(self._prefilling) > 1:
            preempted.append(self._preempt())
            prompts = self._plan_prompts(self._max_batched_tokens)
        return Plan(works + prompts, preempted)

    def _num_tokens_before(self, stream: Stream) -> int:
        """Prompt tokens that are being computed here, of streams that are as urgent as a waiting one."""
        before = [s.sequence for s in self._prefilling.values() if s.request.priority <= stream.request.priority]
        return sum(sequence.num_tokens - sequence.num_computed for sequence in before)

    def _plan_prompts(self, room: int) -> list[Work]:
        works = []
        for stream in sorted(self._prefilling.values(), key=lambda s: s.order):
            if room <= 0:
                break
            num_new = min(room, stream.sequence.num_tokens - stream.sequence.num_computed)
            num_new = self._engine.room(stream.sequence, num_new)
            if num_new:
                works.append(Work(stream.sequence, num_new))
                room -= num_new
        return works

    def _preempt(self) -> Stream:
        """Send the last in order that holds blocks back to the queue; no step is in flight. A loading one is left
        alone: its KV is on the way, and it ends without our help."""
        candidates = [*self._running.values(), *self._prefilling.values()]
        victim = max(candidates, key=lambda s: s.order)
        self._running.pop(id(victim), None)
        self._prefilling.pop(id(victim), None)
        victim.preempt(self._clock.monotonic_s())
        self._engine.free(victim.sequence)
        self.add(victim)
        return victim
