"""Least frequently used, ties by least recently (Shah, Mitra, Matani: An O(1) algorithm for implementing the LFU cache
eviction scheme, 2010).

Counts end at `MAX_COUNT`, so that the paper's list of counts is an array, and its first entry the lowest bit of a mask.
"""

from __future__ import annotations

from collections import OrderedDict

from .base import Key, PinningPolicy

MAX_COUNT = 255


class LFU(PinningPolicy[int]):
    """See `Policy`. The key that was used least often goes first; its arrival is its first use.

    Args:
        capacity: not needed.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._count: dict[Key, int] = {}
        self._queues: list[OrderedDict[Key, None]] = [OrderedDict() for _ in range(MAX_COUNT + 1)]
        self._filled = 0

    def __len__(self) -> int:
        return len(self._count) + len(self._pinned)

    def __contains__(self, key: Key) -> bool:
        return key in self._count or key in self._pinned

    def insert(self, key: Key) -> None:
        """See `Policy`."""
        self._put(key, 1)

    def evict(self, incoming: Key) -> Key | None:
        """See `Policy`."""
        if not self._filled:
            return None
        lowest = (self._filled & -self._filled).bit_length() - 1
        victim = next(iter(self._queues[lowest]))
        self._take(victim)
        return victim

    def _use(self, key: Key) -> None:
        self._put(key, min(self._take(key) + 1, MAX_COUNT))

    def _take(self, key: Key) -> int:
        count = self._count.pop(key)
        queue = self._queues[count]
        del queue[key]
        if not queue:
            self._filled &= ~(1 << count)
        return count

    def _put(self, key: Key, place: int) -> None:
        self._count[key] = place
        self._queues[place][key] = None
        self._filled |= 1 << place
