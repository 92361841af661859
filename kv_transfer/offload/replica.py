"""The index of a node's host tier as other nodes know it: what changed in it, in order, and the copy that follows.

Every change of a slot has a number of its own. Who has followed up to one asks for what came after; who knows nothing
asks from zero. So nothing need be remembered of anybody who follows, and nobody can miss a change. A copy lags behind:
what it leads to is checked when the bytes have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .base import Lookup
from .keys import KEY_BYTES, TierKey, tenant_of
from .pool import MappedPool


class Changes(NamedTuple):
    """What slots hold that changed."""

    sequence: int
    """The number of the last of these changes."""
    slots: np.ndarray
    """[changes] int64, all different."""
    keys: bytes
    """One after the other."""
    generations: np.ndarray
    """[changes] uint64; 0: the slot holds nothing that can be found."""


class IndexLog:
    """The changes of one pool. Owned by one thread.

    Args:
        pool: it is read, a slot at most once a call, and never written.
    """

    def __init__(self, pool: MappedPool) -> None:
        self._pool = pool
        self._num_changes = -1
        self._generations = np.zeros(pool.num_slots, np.uint64)
        self._changed_at = np.zeros(pool.num_slots, np.int64)
        self.sequence = 0

    def look(self) -> None:
        """Number what has changed. Looks at every slot, a hundred thousand in a millisecond, if anything has."""
        num_changes = self._pool.num_changes()
        if num_changes == self._num_changes:
            return
        self._num_changes = num_changes
        generations = self._pool.stored()
        changed = np.flatnonzero(generations != self._generations)
        self._generations = generations
        self._changed_at[changed] = np.arange(self.sequence + 1, self.sequence + 1 + len(changed))
        self.sequence += len(changed)

    def since(self, sequence: int, most: int) -> Changes:
        """What came after a change, at most so much."""
        slots = np.flatnonzero(self._changed_at > sequence)
        slots = slots[np.argsort(self._changed_at[slots])][:most]
        last = int(self._changed_at[slots[-1]]) if len(slots) else sequence
        # Keys last: one that is not its generation's any more fails the check of the record.
        return Changes(last, slots, self._pool.keys(slots), self._generations[slots])


class IndexReplica:
    """A copy of another node's index; about 200 bytes a block. Changed by one thread, read by any.

    Args:
        num_slots: of that node's tier.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: dict[TierKey, int] = {}
        """Where keys are. For lookups."""
        self._keys: list[TierKey] = [b""] * num_slots
        self._generations = np.zeros(num_slots, np.uint64)

    def apply(self, changes: Changes) -> None:
        """Follow some changes.

        Raises:
            ValueError: they are not of such an index.
        """
        slots, generations = changes.slots.tolist(), changes.generations.tolist()
        if len(changes.keys) != len(slots) * KEY_BYTES or len(generations) != len(slots):
            raise ValueError(f"{len(slots)} slots, {len(generations)} generations, {len(changes.keys)} bytes of keys")
        if slots and not 0 <= min(slots) <= max(slots) < self.num_slots:
            raise ValueError(f"slots {min(slots)} to {max(slots)} of {self.num_slots}")
        for place, (slot, generation) in enumerate(zip(slots, generations, strict=True)):
            self._leave(slot)
            if generation:
                key = changes.keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]
                self._generations[slot] = generation
                self._keys[slot] = key
                self.slots[key] = slot

    def find(self, keys: Sequence[TierKey]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Where some keys are: their places among those that were asked for, slots, and generations."""
        found = [(place, slot) for place, key in enumerate(keys) if (slot := self.slots.get(key)) is not None]
        slots = np.array([slot for _, slot in found], np.int64)
        return [place for place, _ in found], slots, self._generations[slots]

    def remove(self, keys: Sequence[TierKey]) -> None:
        """These are not to be found, until they change."""
        for key in keys:
            slot = self.slots.get(key)
            if slot is not None:
                self._leave(slot)

    def clear(self, tenant: bytes | None) -> None:
        """A tenant's keys, or all, are not to be found, until they change."""
        self.remove([key for key in self.slots if tenant is None or tenant_of(key) == tenant])

    def _leave(self, slot: int) -> None:
        key = self._keys[slot]
        if key:
            self._keys[slot] = b""
            # It may have moved to another slot, which was told first.
            if self.slots.get(key) == slot:
                del self.slots[key]


def look_up(keys: Sequence[TierKey], replicas: Sequence[IndexReplica]) -> list[Lookup]:
    """Which keys are in one of several indexes; a thousand in well under a millisecond."""
    wanted, found = set(keys), set[TierKey]()
    for replica in replicas:
        # One call into C, during which no other thread runs.
        hits = replica.slots.keys() & wanted
        found |= hits
        wanted -= hits
    return [Lookup.HIT if key in found else Lookup.MISS for key in keys]
