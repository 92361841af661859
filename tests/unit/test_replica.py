"""The copy of a pool's index follows it, whatever changes and however little is told at a time."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiers import keys_of
from tandem.kv_transfer.offload.keys import tenant_of
from tandem.kv_transfer.offload.pool import MappedPool, OwnedPool, unchanged
from tandem.kv_transfer.offload.replica import Changes, IndexLog, IndexReplica

SLOTS = 6
KEYS = keys_of(*range(12))


class Pool:
    """What a keeper does to its pool."""

    def __init__(self) -> None:
        self.owned = OwnedPool(SLOTS, 64)
        self.mapped = MappedPool(*(os.dup(descriptor) for descriptor in self.owned.descriptors()), 64)
        self.held: dict[int, tuple[bytes, bool]] = {}
        self._generation = 0

    def do(self, slot: int, what: str, key: bytes) -> None:
        if slot in self.held and what == "store":
            self.owned.store(slot)
            self.held[slot] = (self.held[slot][0], True)
        elif slot in self.held:
            self.owned.remove(slot, 0)
            del self.held[slot]
        if what == "reserve" and key not in [held for held, _ in self.held.values()]:
            self._generation += 1
            self.owned.reserve(slot, key, self._generation)
            self.held[slot] = (key, False)

    def stored(self) -> dict[bytes, int]:
        return {key: slot for slot, (key, stored) in self.held.items() if stored}

    def close(self) -> None:
        for descriptor in self.owned.descriptors():
            os.close(descriptor)


steps = st.tuples(st.integers(0, SLOTS - 1), st.sampled_from(["reserve", "store", "remove"]), st.sampled_from(KEYS))


@given(st.lists(st.one_of(steps, st.integers(1, 4)), max_size=60))
def test_it_follows(actions: list[tuple[int, str, bytes] | int]) -> None:
    """A number stands for a look of so many changes; some readers look all the time, some never before the end."""
    pool = Pool()
    log, replica, sequence = IndexLog(pool.mapped), IndexReplica(SLOTS), 0
    for action in [*actions, SLOTS]:
        if not isinstance(action, int):
            pool.do(*action)
            continue
        log.look()
        changes = log.since(sequence, action)
        replica.apply(changes)
        sequence = changes.sequence
        assert sequence <= log.sequence
    while sequence < log.sequence:
        changes = log.since(sequence, 2)
        replica.apply(changes)
        sequence = changes.sequence
    late = IndexReplica(SLOTS)
    late.apply(log.since(0, SLOTS))
    assert replica.slots == late.slots == pool.stored()
    places, slots, generations = replica.find(KEYS)
    wanted = [KEYS[place] for place in places]
    assert sorted(wanted) == sorted(pool.stored())
    if wanted:
        assert unchanged(pool.mapped.records(slots), wanted, generations).all()
    pool.close()


def test_what_was_removed_is_found_when_it_changes_again() -> None:
    replica = IndexReplica(SLOTS)
    changes = Changes(3, np.arange(3), b"".join(KEYS[:3]), np.array([1, 2, 3], np.uint64))
    replica.apply(changes)
    replica.remove(KEYS[:1])
    assert set(replica.slots) == set(KEYS[1:3])
    replica.clear(b"somebody")
    assert set(replica.slots) == set(KEYS[1:3])
    replica.clear(tenant_of(KEYS[1]))
    assert not replica.slots
    replica.apply(changes)
    assert set(replica.slots) == set(KEYS[:3])


@pytest.mark.parametrize(
    "changes",
    [
        Changes(1, np.array([SLOTS]), KEYS[0], np.ones(1, np.uint64)),
        Changes(1, np.array([-1]), KEYS[0], np.ones(1, np.uint64)),
        Changes(1, np.array([0]), KEYS[0][1:], np.ones(1, np.uint64)),
        Changes(1, np.array([0]), KEYS[0], np.ones(2, np.uint64)),
    ],
)
def test_changes_of_something_else_are_refused(changes: Changes) -> None:
    replica = IndexReplica(SLOTS)
    with pytest.raises(ValueError, match="slots"):
        replica.apply(changes)
    assert not replica.slots
