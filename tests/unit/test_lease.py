"""Leases against a list that is scanned."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tandem.core.clock import ManualClock
from tandem.core.errors import IllegalTransition
from tandem.core.ids import TransferId
from tandem.kv_transfer.lease import LeaseState, LeaseTable

transfers = st.builds(TransferId, st.sampled_from(["decode-0#1", "decode-1#1"]), st.integers(0, 5))


class LeaseMachine(RuleBasedStateMachine):
    """The table's deadlines and a plain dictionary's agree, whatever happens in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.table = LeaseTable(10.0, self.clock)
        self.deadlines: dict[TransferId, float] = {}

    @rule(transfer=transfers)
    def grant(self, transfer: TransferId) -> None:
        if transfer in self.deadlines:
            with pytest.raises(IllegalTransition) as caught:
                self.table.grant(transfer)
            assert caught.value.history
            return
        lease = self.table.grant(transfer)
        assert lease.state is LeaseState.HELD
        self.deadlines[transfer] = self.clock.monotonic_s() + 10.0

    @rule(transfer=transfers)
    def publish(self, transfer: TransferId) -> None:
        if transfer in self.deadlines:
            self.table.publish(transfer)
        else:
            with pytest.raises(IllegalTransition):
                self.table.publish(transfer)

    @rule(several=st.lists(transfers, max_size=4))
    def renew(self, several: list[TransferId]) -> None:
        known = [transfer for transfer in several if transfer in self.deadlines]
        assert self.table.renew(several) == len(known)
        for transfer in known:
            self.deadlines[transfer] = self.clock.monotonic_s() + 10.0

    @rule(transfer=transfers)
    def release(self, transfer: TransferId) -> None:
        assert self.table.release(transfer) == (self.deadlines.pop(transfer, None) is not None)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        now_s = self.clock.monotonic_s()
        due = {transfer for transfer, deadline_s in self.deadlines.items() if deadline_s <= now_s}
        assert set(self.table.expire()) == due
        for transfer in due:
            del self.deadlines[transfer]

    @invariant()
    def agree(self) -> None:
        assert len(self.table) == len(self.deadlines)
        for reader in ("decode-0#1", "decode-1#1"):
            assert set(self.table.of_reader(reader)) == {t for t in self.deadlines if t.reader == reader}
        deadline_s = self.table.next_deadline_s()
        if self.deadlines:
            # It may be early (a renewed lease is looked at again), never late.
            assert deadline_s is not None
            assert deadline_s <= min(self.deadlines.values())


TestLease = LeaseMachine.TestCase


def test_a_renewed_lease_does_not_hide_the_one_behind_it() -> None:
    clock = ManualClock()
    table = LeaseTable(10.0, clock)
    first, second = TransferId("d#1", 1), TransferId("d#1", 2)
    table.grant(first)
    clock.advance(1)
    table.grant(second)
    for _ in range(5):
        clock.advance(4)
        table.renew([first])
        expired = table.expire()
        if expired:
            break
    assert expired == [second]
    assert first in table


def test_the_heap_does_not_grow_with_released_leases() -> None:
    table = LeaseTable(10.0, ManualClock())
    for number in range(10_000):
        table.grant(TransferId("d#1", number))
        table.release(TransferId("d#1", number))
    assert len(table._heap) < 200
