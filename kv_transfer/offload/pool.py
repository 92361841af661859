"""The host tier's shared memory: slots that every engine of the node maps, and an index that they read without asking.

Two anonymous files (memfd_create): slots, which engines write; and records, which they can only read. All numbers are
little-endian uint64.

::

    records    page 0     num_slots, num_heads, block bytes, slots in use, microseconds of the oldest, changes so far
               heads      [num_heads]: slot + 1 of the first record of a chain, or 0
               records    [num_slots, 8]: key (4), generation, state, next slot + 1 in its chain, 0

One word is changed at a time and every step leaves chains that end, so that a reader needs no lock: at worst it misses
a key. That a slot still holds what was found, key and generation, is checked once more when its bytes have been copied;
the owner changes the generation, and then the key, before it gives the slot away.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .base import Lookup, SomeRows
from .keys import KEY_BYTES, TierKey

_PAGE_BYTES = 4096
_RECORD_WORDS = 8
RECORD_BYTES = 8 * _RECORD_WORDS
_LINE_BYTES = 64
_GENERATION, _STATE, _NEXT = 4, 5, 6
_RESERVED, _STORED = 1, 2
_NUM_SLOTS, _NUM_HEADS, _BLOCK_BYTES, _USED, _OLDEST_US, _CHANGES = range(6)
_LONGEST_CHAIN = 64
# linux/fcntl.h: not in every Python's fcntl.
_F_ADD_SEALS = 1033
_FIXED_SIZE = 0x0002 | 0x0004  # F_SEAL_SHRINK, F_SEAL_GROW
_NO_MORE_WRITERS = 0x0010  # F_SEAL_FUTURE_WRITE
_STATES = np.array((Lookup.MISS, Lookup.PENDING, Lookup.HIT), object)


class Places(NamedTuple):
    """Where keys were found. Each [keys]."""

    states: np.ndarray
    """uint64: 0 unknown, 1 reserved, 2 stored."""
    slots: np.ndarray
    """int64; meaningless where unknown."""
    generations: np.ndarray
    """uint64."""

    def lookups(self) -> list[Lookup]:
        """The states as answers of a tier."""
        answers: list[Lookup] = _STATES[self.states].tolist()
        return answers


def slot_bytes(block_bytes: int) -> int:
    """What a block's bytes take: whole cache lines."""
    return -(-block_bytes // _LINE_BYTES) * _LINE_BYTES


def pool_bytes(num_slots: int, block_bytes: int) -> int:
    """Memory of a pool, everything included."""
    return _records_bytes(num_slots) + num_slots * slot_bytes(block_bytes)


def slots_within(capacity_bytes: int, block_bytes: int) -> int:
    """The most slots whose pool fits."""
    most = capacity_bytes // slot_bytes(block_bytes)
    return bisect.bisect_right(range(1, most + 1), capacity_bytes, key=lambda slots: pool_bytes(slots, block_bytes))


def _num_heads(num_slots: int) -> int:
    return 1 << max(1, (2 * num_slots - 1).bit_length())


def _records_bytes(num_slots: int) -> int:
    return _PAGE_BYTES + 8 * _num_heads(num_slots) + RECORD_BYTES * num_slots


class OwnedPool:
    """The owner's end. Owned by one thread.

    Args:
        num_slots: ≥ 1.
        block_bytes: of a block.
    """

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        heads = _num_heads(num_slots)
        self._records = os.memfd_create("tandem-kv-index", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._records, _records_bytes(num_slots))
        self._words = memoryview(mmap.mmap(self._records, _records_bytes(num_slots))).cast("Q")
        # This mapping stays writable; no other will be.
        fcntl.fcntl(self._records, _F_ADD_SEALS, _FIXED_SIZE | _NO_MORE_WRITERS)
        self._slots = os.memfd_create("tandem-kv-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._slots, num_slots * slot_bytes(block_bytes))
        fcntl.fcntl(self._slots, _F_ADD_SEALS, _FIXED_SIZE)
        self._mask = heads - 1
        self._heads = _PAGE_BYTES // 8
        self._first = self._heads + heads
        self._words[_NUM_SLOTS], self._words[_NUM_HEADS], self._words[_BLOCK_BYTES] = num_slots, heads, block_bytes

    def descriptors(self) -> list[int]:
        """Of records and slots, for `MappedPool` in another process."""
        return [self._records, self._slots]

    def num_bytes(self) -> int:
        """Memory that is really taken by now."""
        return sum(os.fstat(descriptor).st_blocks * 512 for descriptor in self.descriptors())

    def reserve(self, slot: int, key: TierKey, generation: int) -> None:
        """A slot that is in no chain is about to be written for a key."""
        words, at = self._words, self._first + slot * _RECORD_WORDS
        words[at + _GENERATION] = generation
        for place in range(KEY_BYTES // 8):
            words[at + place] = int.from_bytes(key[8 * place : 8 * place + 8], "little")
        head = self._heads + (words[at] & self._mask)
        words[at + _STATE] = _RESERVED
        words[at + _NEXT] = words[head]
        words[head] = slot + 1

    def store(self, slot: int) -> None:
        """A reserved slot has its bytes."""
        self._words[self._first + slot * _RECORD_WORDS + _STATE] = _STORED
        self._words[_CHANGES] += 1

    def remove(self, slot: int, generation: int) -> None:
        """A slot's key is not to be found any more, and whoever copies it now must notice."""
        words, at = self._words, self._first + slot * _RECORD_WORDS
        words[at + _STATE] = 0
        words[at + _GENERATION] = generation
        link = self._heads + (words[at] & self._mask)
        while words[link] != slot + 1:
            link = self._first + (words[link] - 1) * _RECORD_WORDS + _NEXT
        words[link] = words[at + _NEXT]
        words[_CHANGES] += 1

    def count(self, num_used: int, oldest_at_s: float) -> None:
        """What engines show as statistics."""
        self._words[_USED] = num_used
        self._words[_OLDEST_US] = round(oldest_at_s * 1e6)


class MappedPool:
    """An engine's end. Lookups by one thread; slots by several.

    Args:
        records: descriptor; closed.
        slots: descriptor; closed.
        block_bytes: as the engine knows it.
        pin: called with the slots' memory, [bytes] uint8; returns what undoes it, called when nobody uses it any more.

    Raises:
        ValueError: the files are not what they should be.
    """

    def __init__(
        self, records: int, slots: int, block_bytes: int, pin: Callable[[np.ndarray], Callable[[], None]] | None = None
    ) -> None:
        try:
            words = np.frombuffer(mmap.mmap(records, os.fstat(records).st_size, prot=mmap.PROT_READ), np.uint64)
            num_slots, num_heads, theirs = (int(words[place]) for place in (_NUM_SLOTS, _NUM_HEADS, _BLOCK_BYTES))
            size = slot_bytes(block_bytes)
            if theirs != block_bytes or os.fstat(slots).st_size != num_slots * size:
                raise ValueError(f"the pool has blocks of {theirs} bytes, ours have {block_bytes}")
            memory = np.frombuffer(mmap.mmap(slots, num_slots * size), np.uint8)
        finally:
            os.close(records)
            os.close(slots)
        self.num_slots = num_slots
        self._unpin: Callable[[], None] = pin(memory) if pin is not None else _nothing
        self._words = words
        first = _PAGE_BYTES // 8
        self._heads = words[first : first + num_heads]
        self._table = words[first + num_heads :].reshape(num_slots, _RECORD_WORDS)
        self._mask = np.uint64(num_heads - 1)
        self.memory = memory
        """All slots: [bytes] uint8."""
        self.slot_bytes = size
        self._blocks = memory.reshape(num_slots, size)[:, :block_bytes]

    def __del__(self) -> None:
        # Nothing was pinned by an instance that could not be made.
        getattr(self, "_unpin", _nothing)()

    def block(self, slot: int) -> np.ndarray:
        """A slot's bytes: [block_bytes] uint8."""
        view: np.ndarray = self._blocks[slot]
        return view

    def blocks(self, slots: np.ndarray) -> SomeRows:
        """`block` of some slots, [slots] int64."""
        return SomeRows(self._blocks, slots.astype(np.int64))

    def still(self, keys: Sequence[TierKey], slots: np.ndarray, generations: np.ndarray) -> np.ndarray:
        """Whether slots are still those that `find` found: [keys] bool. Keys first: the owner writes them last."""
        return unchanged(self.records(slots), keys, generations)

    def records(self, slots: np.ndarray) -> bytes:
        """What the index says of some slots now; see `unchanged`."""
        octets: bytes = self._table[slots].tobytes()
        return octets

    def num_changes(self) -> int:
        """Grows after every change of what can be found."""
        return int(self._words[_CHANGES])

    def stored(self) -> np.ndarray:
        """The generation of each slot that can be found, 0 for the others: [slots] uint64. Looks at every slot."""
        generations = self._table[:, _GENERATION].copy()
        # Generations first: with one that is current still, the state is its own.
        generations[self._table[:, _STATE] != _STORED] = 0
        return generations

    def keys(self, slots: np.ndarray) -> bytes:
        """The keys of some slots, one after the other."""
        octets: bytes = self._table[slots, : KEY_BYTES // 8].tobytes()
        return octets

    def find(self, keys: Sequence[TierKey]) -> Places:
        """Look keys up, a thousand in about a tenth of a millisecond."""
        wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(len(keys), KEY_BYTES // 8)
        states = np.zeros(len(keys), np.uint64)
        slots = np.zeros(len(keys), np.int64)
        generations = np.zeros(len(keys), np.uint64)
        open_ = np.arange(len(keys))
        chain = self._heads[wanted[:, 0] & self._mask].astype(np.int64)
        for _ in range(_LONGEST_CHAIN):
            there = chain > 0
            if not there.all():
                open_, chain = open_[there], chain[there]
            if not len(open_):
                break
            # A torn value leads nowhere outside.
            chain = np.minimum(chain - 1, self.num_slots - 1)
            records = self._table[chain]
            same = (records[:, : KEY_BYTES // 8] == wanted[open_]).all(axis=1)
            hit = open_[same]
            states[hit] = np.minimum(records[same, _STATE], np.uint64(_STORED))
            slots[hit] = chain[same]
            generations[hit] = records[same, _GENERATION]
            open_, chain = open_[~same], records[~same, _NEXT].astype(np.int64)
        return Places(states, slots, generations)

    def stored_keys(self) -> list[TierKey]:
        """All keys that can be found."""
        stored = self._table[self._table[:, _STATE] == _STORED, : KEY_BYTES // 8].tobytes()
        return [stored[at : at + KEY_BYTES] for at in range(0, len(stored), KEY_BYTES)]

    def in_use(self) -> tuple[int, float]:
        """Slots that hold something, or wait for it, of all engines; and when the oldest was stored, on the wall
        clock."""
        return int(self._words[_USED]), int(self._words[_OLDEST_US]) / 1e6


def unchanged(records: bytes, keys: Sequence[TierKey], generations: np.ndarray) -> np.ndarray:
    """Which slots still hold what was found in them: [keys] bool.

    Args:
        records: of the slots, read after their bytes.
        keys: what was found.
        generations: [keys] uint64.
    """
    table = np.frombuffer(records, np.uint64).reshape(len(keys), _RECORD_WORDS)
    wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(len(keys), KEY_BYTES // 8)
    same: np.ndarray = (table[:, : KEY_BYTES // 8] == wanted).all(axis=1) & (table[:, _GENERATION] == generations)
    return same


def _nothing() -> None:
    """There is nothing to undo."""
