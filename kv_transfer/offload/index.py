"""Which key is in which slot of a tier.

::

             reserve            commit               evict
    FREE ─────────────► RESERVED ─────────► STORED ─────────► RESERVED, for another key
      ▲                    │ abort              │ remove
      └────────────────────┴────────────────────┘  (at once, or when the last pin is gone)

A slot gets a generation, a number that no slot of the tier ever had, when it is reserved, before anything is written to
it. Sans-IO; owned by one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from .base import Change, Lookup
from .keys import TierKey, tenant_of
from .policies import Priorities


class Evicted(NamedTuple):
    """What a slot held before it was reserved; its bytes are there until the new owner writes."""

    key: TierKey
    generation: int


class Reservation(NamedTuple):
    """A slot that waits for its content."""

    slot: int
    generation: int
    evicted: Evicted | None


class _Slot:
    __slots__ = ("generation", "key", "leaving", "number", "pins", "priority", "stored", "stored_at_s", "user_pins")

    def __init__(self, number: int) -> None:
        self.number = number
        self.generation = 0
        self.key: TierKey = b""
        self.priority = 0
        self.stored = False
        self.stored_at_s = 0.0
        self.leaving = False
        self.pins = 0
        self.user_pins = 0


class TierIndex:
    """Keys and slots of one tier; never more than ``num_slots``.

    Args:
        num_slots: ≥ 1.
        policy: chooses what goes.
    """

    def __init__(self, num_slots: int, policy: Priorities) -> None:
        self.num_slots = num_slots
        self.journal: list[Change] | None = None
        """What can be found from now on, or not any more; kept for whoever puts a list here, and takes it away."""
        self._policy = policy
        self._slots = [_Slot(number) for number in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))
        # In order of reservation; a plain dict takes long to find its first key when many before it have gone.
        self._by_key: OrderedDict[TierKey, _Slot] = OrderedDict()
        self._reserved: set[TierKey] = set()
        """Keys that wait for their content."""
        self._generation = 0

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def num_used(self) -> int:
        """Slots that hold something, or wait for it."""
        return self.num_slots - len(self._free)

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        """What is known of some keys."""
        known, reserved, miss, pending, hit = self._by_key, self._reserved, Lookup.MISS, Lookup.PENDING, Lookup.HIT
        # Slots are not looked at: of a large tier, none is in the processor's caches.
        if not reserved:
            return [hit if key in known else miss for key in keys]
        return [miss if key not in known else pending if key in reserved else hit for key in keys]

    def reserve(self, key: TierKey, priority: int = 0) -> Reservation | None:
        """A slot for a key that is not there; None: all slots are pinned or hold what is more important."""
        evicted = None
        if self._free:
            slot = self._slots[self._free.pop()]
        else:
            victim = self._policy.evict(key, priority)
            if victim is None:
                return None
            slot = self._by_key.pop(victim)
            if self.journal is not None:
                self.journal.append(Change(victim, False))
            evicted = Evicted(victim, slot.generation)
        self._generation += 1
        slot.generation = self._generation
        self._fill(slot, key, priority)
        slot.pins = 1
        self._reserved.add(key)
        self._policy.insert_pinned(key, priority)
        return Reservation(slot.number, slot.generation, evicted)

    def commit(self, slot: int, at_s: float = 0.0) -> bool:
        """A reserved slot has its content, from ``at_s`` on. It is held until `release`. Returns whether it may be
        found: its key was not removed meanwhile."""
        filled = self._slots[slot]
        filled.stored = True
        filled.stored_at_s = at_s
        if filled.leaving:
            return False
        self._reserved.discard(filled.key)
        if self.journal is not None:
            self.journal.append(Change(filled.key, True))
        return True

    def is_leaving(self, slot: int) -> bool:
        """Whether the key of a slot that is reserved or held was removed."""
        return self._slots[slot].leaving

    def abort(self, slot: int) -> None:
        """A reserved slot will not get its content: it is free again."""
        self._leave(self._slots[slot])
        self.release(slot)

    def hold(self, key: TierKey) -> tuple[int, int] | None:
        """Keep a stored key's slot as it is until `release`; its number and generation, or None: there is none."""
        slot = self._by_key.get(key)
        if slot is None or not slot.stored:
            return None
        self._pin(slot)
        return slot.number, slot.generation

    def release(self, slot: int) -> None:
        """Undo one `hold`, or end a reservation that was committed. Among keys that are released, the last is what the
        policy saw last."""
        held = self._slots[slot]
        held.pins -= 1
        if held.pins == 0:
            if held.leaving:
                self._free.append(slot)
            else:
                self._policy.unpin(held.key)

    def pin(self, keys: Sequence[TierKey]) -> list[TierKey]:
        """A user keeps keys; returns those that are there."""
        found = []
        for key in keys:
            slot = self._by_key.get(key)
            if slot is not None:
                slot.user_pins += 1
                self._pin(slot)
                found.append(key)
        return found

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """Undo one user's `pin`; what is not pinned is ignored."""
        for key in keys:
            slot = self._by_key.get(key)
            if slot is not None and slot.user_pins:
                slot.user_pins -= 1
                self.release(slot.number)

    def touch(self, keys: Sequence[TierKey]) -> None:
        """Keys were used; of several, the first most recently. Unknown ones are ignored."""
        for key in reversed(keys):
            if key in self._by_key:
                self._policy.touch(key)

    def remove(self, key: TierKey) -> int | None:
        """Forget a key; a slot that is held stays taken until it is not. Returns the slot; None: the key is unknown."""
        slot = self._by_key.get(key)
        if slot is None:
            return None
        self._leave(slot)
        if slot.pins == 0:
            self._free.append(slot.number)
        return slot.number

    def oldest_at_s(self) -> float:
        """When the oldest block was stored, as told; 0: there is none."""
        return next((slot.stored_at_s for slot in self._by_key.values() if slot.stored), 0.0)

    def stored_keys(self) -> list[TierKey]:
        """All keys that can be found."""
        return [key for key, slot in self._by_key.items() if slot.stored]

    def keys_of(self, tenant: bytes | None = None) -> list[TierKey]:
        """All keys, or those of one tenant. Looks at every key."""
        return [key for key in self._by_key if tenant is None or tenant_of(key) == tenant]

    def generation_of(self, key: TierKey) -> int | None:
        """The generation of a key's slot, or None."""
        slot = self._by_key.get(key)
        return None if slot is None else slot.generation

    def restore(self, found: Sequence[tuple[int, TierKey, int]], at_s: float = 0.0) -> None:
        """Fill an index that has no keys with what slots were found to hold: (slot, key, generation) each. What was
        stored last counts as used last, and of several slots with one key it is the one that is kept."""
        for number, key, generation in sorted(found, key=lambda entry: entry[2]):
            self._generation = max(self._generation, generation)
            if key in self._by_key:
                self.remove(key)
            slot = self._slots[number]
            if slot.pins == 0:
                slot.generation = generation
                self._fill(slot, key, 0)
                self._policy.insert(key)
                slot.stored, slot.stored_at_s = True, at_s
                if self.journal is not None:
                    self.journal.append(Change(key, True))
        taken = {slot.number for slot in self._by_key.values()}
        self._free = [slot.number for slot in reversed(self._slots) if not slot.pins and slot.number not in taken]

    def check(self) -> None:
        """Verify the invariants; for tests.

        Raises:
            AssertionError: the index is inconsistent.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        leaving = {slot.number for slot in self._slots if slot.leaving and slot.pins}
        used = {slot.number for slot in self._by_key.values()}
        assert not free & used, "a free slot has a key"
        assert free | used | leaving == set(range(self.num_slots)), "a slot is lost"
        assert len(self._policy) == len(self._by_key), "policy and index disagree"
        for key, slot in self._by_key.items():
            assert slot.key == key, "a key leads elsewhere"
            assert key in self._policy, "the policy does not know a key"
            assert (key in self._reserved) != slot.stored, "a key waits for what is there, or not for what is not"

    def _fill(self, slot: _Slot, key: TierKey, priority: int) -> None:
        slot.key, slot.priority = key, priority
        slot.stored = slot.leaving = False
        slot.user_pins = 0
        self._by_key[key] = slot

    def _pin(self, slot: _Slot) -> None:
        if slot.pins == 0:
            self._policy.pin(slot.key)
        slot.pins += 1

    def _leave(self, slot: _Slot) -> None:
        if not slot.leaving:
            if not slot.stored:
                self._reserved.discard(slot.key)
            elif self.journal is not None:
                self.journal.append(Change(slot.key, False))
            slot.leaving = True
            slot.pins -= slot.user_pins
            slot.user_pins = 0
            del self._by_key[slot.key]
            self._policy.remove(slot.key)
