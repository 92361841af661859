"""The reading side of a handoff: every order of events, and what must hold in all of them."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tandem.core.clock import ManualClock
from tandem.core.errors import IllegalTransition
from tandem.core.messages import FailureReason, Table
from tandem.kv_transfer.handoff import (
    CancelPulls,
    Closed,
    Failed,
    Handoff,
    HandoffState,
    Instruction,
    Loaded,
    Pull,
    Release,
)

BLOCK = 4
GROUPS = 2


def make(
    num_tokens: int = 10, skip_tokens: int = 0, *, first_tokens: list[int] | None = None, unit: int = BLOCK
) -> Handoff:
    firsts = [skip_tokens] if first_tokens is None else first_tokens
    return Handoff(1, "prefill-0#1", skip_tokens, num_tokens, firsts, BLOCK, unit, GROUPS, ManualClock())


def table(first_token: int, num_tokens: int) -> Table:
    """Blocks from the one that holds ``first_token`` to the prompt's end."""
    start, stop = first_token // BLOCK, -(-num_tokens // BLOCK)
    return Table(start * BLOCK, list(range(start, stop)), [1] * (stop - start))


class HandoffMachine(RuleBasedStateMachine):
    """A peer that computes, reads that end or fail in any order, aborts and losses at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 11
        self.skip_tokens = self.unit = 0

    @initialize(skip=st.integers(0, 10), unit=st.integers(1, 9), windows=st.lists(st.integers(0, 10), max_size=2))
    def begin(self, skip: int, unit: int, windows: list[int]) -> None:
        self.skip_tokens, self.unit = skip, unit
        self.first_tokens = [skip, *(max(skip, first) for first in windows)]
        self.handoff = make(self.num_tokens, skip, first_tokens=self.first_tokens, unit=unit)
        self.ready = [0] * GROUPS
        self.accepted = self.done = False
        self.outstanding: list[Pull] = []
        self.cancelled = False
        self.written: set[tuple[int, int]] = set()
        self.verified: set[tuple[int, int]] = set()
        self.ends: list[Instruction] = []
        self.releases = 0

    def take(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Pull(group, start, stop):
                    assert not self.ends, "a read after the end"
                    assert not self.cancelled, "a read after giving up"
                    assert self.skip_tokens <= start < stop <= self.ready[group], "read before it was ready"
                    assert stop % self.unit == 0 or stop == self.num_tokens, "a cut that nobody needs"
                    for token in range(start, stop):
                        assert (group, token) not in self.written, "a token was read twice"
                        self.written.add((group, token))
                    self.outstanding.append(instruction)
                case CancelPulls():
                    self.cancelled = True
                case Release():
                    self.releases += 1
                case Failed(_, num_tokens):
                    assert not self.outstanding, "over while reads may still write"
                    assert self.skip_tokens <= num_tokens <= self.num_tokens
                    here = range(self.skip_tokens, num_tokens)
                    assert all((group, token) in self.verified for group in range(GROUPS) for token in here)
                    partial = self.skip_tokens < num_tokens < self.num_tokens
                    assert not (partial and max(self.first_tokens) > self.skip_tokens), "nobody can vouch for this"
                    self.ends.append(instruction)
                case _:
                    assert not self.outstanding, "over while reads may still write"
                    self.ends.append(instruction)

    @precondition(lambda self: not self.accepted)
    @rule()
    def accept(self) -> None:
        self.accepted = True
        self.take(self.handoff.accepted([table(first, self.num_tokens) for first in self.first_tokens]))

    @precondition(lambda self: self.accepted and not self.done)
    @rule(group=st.integers(0, GROUPS - 1), tokens=st.integers(1, 11))
    def publish(self, group: int, tokens: int) -> None:
        self.ready[group] = max(self.ready[group], tokens)
        self.take(self.handoff.ready(group, self.ready[group]))

    @precondition(lambda self: self.accepted and not self.done)
    @rule()
    def finish_prompt(self) -> None:
        for group in range(GROUPS):
            self.ready[group] = self.num_tokens
            self.take(self.handoff.ready(group, self.num_tokens))
        self.done = True
        self.take(self.handoff.prompt_done())

    @precondition(lambda self: self.outstanding)
    @rule(index=st.integers(0, 10), failure=st.sampled_from([None, None, None, *FailureReason]), good=st.integers(0, 3))
    def end_read(self, index: int, failure: FailureReason | None, good: int) -> None:
        pull = self.outstanding.pop(index % len(self.outstanding))
        good = min(good, pull.stop - pull.start)
        here = range(pull.start, pull.stop if failure is None else pull.start + good)
        self.verified |= {(pull.layer_group, token) for token in here}
        self.take(self.handoff.pull_ended(pull, failure, good))

    @rule()
    def abort(self) -> None:
        self.take(self.handoff.abort())

    @rule(reason=st.sampled_from([FailureReason.PEER_LOST, FailureReason.TIMEOUT]))
    def lose(self, reason: FailureReason) -> None:
        self.take(self.handoff.fail(reason))

    @invariant()
    def ends_once(self) -> None:
        assert len(self.ends) <= 1
        assert self.releases == len(self.ends)
        assert self.handoff.finished == bool(self.ends)
        if self.ends and isinstance(self.ends[0], Loaded):
            assert self.verified == {(g, t) for g in range(GROUPS) for t in range(self.skip_tokens, self.num_tokens)}

    def teardown(self) -> None:
        """Whatever happened, when the reads have ended and we give up, it is over."""
        self.take(self.handoff.abort())
        while self.outstanding:
            self.take(self.handoff.pull_ended(self.outstanding.pop(), FailureReason.TRANSPORT))
        assert len(self.ends) == 1


TestHandoff = HandoffMachine.TestCase


def run(handoff: Handoff, *, upto: int) -> list[Instruction]:
    """Accept, and read everything up to ``upto`` tokens in both groups."""
    handoff.accepted([table(0, 12)])
    taken: list[Instruction] = []
    for group in range(GROUPS):
        for pull in handoff.ready(group, upto):
            assert isinstance(pull, Pull)
            taken += handoff.pull_ended(pull, None)
    return taken


def test_a_partial_block_is_read_only_at_the_end() -> None:
    handoff = make(num_tokens=10)
    handoff.accepted([table(0, 10)])
    assert handoff.ready(0, 7) == [Pull(0, 0, 4)]
    assert handoff.ready(0, 7) == []
    assert handoff.ready(0, 9) == [Pull(0, 4, 8)]
    assert handoff.ready(0, 10) == [Pull(0, 8, 10)]


def test_the_larger_blocks_say_how_much_is_read_at_a_time() -> None:
    handoff = make(num_tokens=20, skip_tokens=3, unit=8)
    handoff.accepted([table(3, 20)])
    assert handoff.ready(0, 7) == []
    assert handoff.ready(0, 12) == [Pull(0, 3, 8)]
    assert handoff.ready(0, 20) == [Pull(0, 8, 20)]


def test_skipped_tokens_are_not_read() -> None:
    for skip in (8, 9):
        handoff = make(num_tokens=10, skip_tokens=skip)
        handoff.accepted([Table(8, [5], [1])])
        assert handoff.ready(0, 8) == []
        assert handoff.ready(0, 10) == [Pull(0, skip, 10)]


def test_a_window_vouches_for_the_whole_prompt_or_for_nothing_new() -> None:
    for good, valid in ((None, 12), (FailureReason.CHECKSUM, 0)):
        handoff = make(num_tokens=12, first_tokens=[0, 8])
        handoff.accepted([table(0, 12), table(8, 12)])
        for group in range(GROUPS):
            [pull] = handoff.ready(group, 8)
            assert isinstance(pull, Pull)
            handoff.pull_ended(pull, None)
        for group in range(GROUPS):
            [pull] = handoff.ready(group, 12)
            assert isinstance(pull, Pull)
            end = handoff.pull_ended(pull, good if group else None, 2)
        assert (end or handoff.fail(FailureReason.TIMEOUT))[-1] == Failed(good or FailureReason.TIMEOUT, valid)


def test_loaded_only_when_every_group_is_there() -> None:
    handoff = make(num_tokens=8)
    handoff.accepted([table(0, 8)])
    [first] = handoff.ready(0, 8)
    [second] = handoff.ready(1, 8)
    assert handoff.pull_ended(first, None) == []
    assert handoff.prompt_done() == []
    assert handoff.pull_ended(second, None) == [Release(), Loaded()]


def test_a_failed_read_keeps_what_came_before_it() -> None:
    handoff = make(num_tokens=12)
    run(handoff, upto=8)
    [pull] = handoff.ready(0, 12)
    assert isinstance(pull, Pull)
    assert handoff.pull_ended(pull, FailureReason.GENERATION) == [Release(), Failed(FailureReason.GENERATION, 8)]


def test_failure_waits_for_the_reads_that_still_write() -> None:
    handoff = make(num_tokens=8)
    handoff.accepted([table(0, 8)])
    [pull] = handoff.ready(0, 8)
    assert handoff.fail(FailureReason.PEER_LOST) == [CancelPulls()]
    assert handoff.state is HandoffState.DRAINING
    assert handoff.ready(1, 8) == []
    assert handoff.pull_ended(pull, None) == [Release(), Failed(FailureReason.PEER_LOST, 0)]


def test_an_abort_overtakes_a_failure() -> None:
    handoff = make(num_tokens=8)
    handoff.accepted([table(0, 8)])
    [pull] = handoff.ready(0, 8)
    handoff.fail(FailureReason.PEER_LOST)
    assert handoff.abort() == []
    assert handoff.pull_ended(pull, None) == [Release(), Closed()]


def test_a_peer_that_lies_is_refused() -> None:
    for tables in (
        [], [Table(0, [0], [1])], [Table(0, [0, 1], [1])], [Table(4, [1], [1])], [Table(2, [0, 1], [1, 1])],
        [Table(0, [0, 1, 2], [1, 1, 1])], [table(0, 8)] * 2,
    ):  # fmt: skip
        handoff = make(num_tokens=8)
        assert handoff.accepted(tables) == [Release(), Failed(FailureReason.REFUSED, 0)]
    handoff = make(num_tokens=8)
    handoff.accepted([table(0, 8)])
    assert handoff.ready(7, 8)[-1] == Failed(FailureReason.REFUSED, 0)
    handoff = make(num_tokens=8)
    handoff.accepted([table(0, 8)])
    assert handoff.ready(0, 800)[-1] == Failed(FailureReason.REFUSED, 0)


def test_the_end_of_the_prompt_without_its_watermarks_is_a_failure() -> None:
    handoff = make(num_tokens=8)
    handoff.accepted([table(0, 8)])
    assert handoff.prompt_done()[-1] == Failed(FailureReason.TRANSPORT, 0)


def test_illegal_events_tell_the_story() -> None:
    handoff = make()
    with pytest.raises(IllegalTransition, match="ready in state requested") as caught:
        handoff.ready(0, 4)
    assert "requested" in str(caught.value)
    handoff.accepted([table(0, 10)])
    with pytest.raises(IllegalTransition, match="accepted in state pulling"):
        handoff.accepted([table(0, 10)])
    with pytest.raises(IllegalTransition, match="not outstanding"):
        handoff.pull_ended(Pull(0, 0, 1), None)
