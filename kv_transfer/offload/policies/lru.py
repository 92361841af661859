"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict

from .base import Key, PinningPolicy


class LRU(PinningPolicy[None]):
    """See `Policy`. The key whose last use is longest ago goes first.

    Args:
        capacity: not needed.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._queue: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue) + len(self._pinned)

    def __contains__(self, key: Key) -> bool:
        return key in self._queue or key in self._pinned

    def insert(self, key: Key) -> None:
        """See `Policy`."""
        self._queue[key] = None

    def insert_pinned(self, key: Key) -> None:
        """See `Policy`."""
        self._pinned[key] = None

    def evict(self, incoming: Key) -> Key | None:
        """See `Policy`."""
        return self._queue.popitem(last=False)[0] if self._queue else None

    def _use(self, key: Key) -> None:
        self._queue.move_to_end(key)

    def _take(self, key: Key) -> None:
        del self._queue[key]

    def _put(self, key: Key, place: None) -> None:
        self._queue[key] = None
