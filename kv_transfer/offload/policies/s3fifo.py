"""Three queues (Yang, Zhang, Qiu, Yue, Vigfusson: FIFO queues are all you need for cache eviction, SOSP 2023,
algorithm 1): new keys stand in a small one, those used again there move to the main one, and a ghost queue remembers
what the small one gave up.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from .base import Key, PinningPolicy

SMALL_SHARE = 0.1
MAX_USES = 3
_MOVES_ABOVE = 1


class _Place(NamedTuple):
    small: bool
    uses: int


class S3FIFO(PinningPolicy[_Place]):
    """See `Policy`. Scans leave by the small queue and do not touch what is used.

    Args:
        capacity: keys that the tier has room for.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._small_capacity = SMALL_SHARE * capacity
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghost: OrderedDict[Key, None] = OrderedDict()
        self._ghost_capacity = max(1, capacity - int(self._small_capacity))

    def __len__(self) -> int:
        return len(self._small) + len(self._main) + len(self._pinned)

    def __contains__(self, key: Key) -> bool:
        return key in self._small or key in self._main or key in self._pinned

    def insert(self, key: Key) -> None:
        """See `Policy`."""
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def insert_pinned(self, key: Key) -> None:
        """See `Policy`."""
        self._pinned[key] = _Place(key not in self._ghost, 0)
        self._ghost.pop(key, None)

    def evict(self, incoming: Key) -> Key | None:
        """See `Policy`. Keys of the main queue are passed over `MAX_USES` times at most."""
        if self._small and (len(self._small) >= self._small_capacity or not self._main):
            victim = self._evict_small()
            if victim is not None:
                return victim
        return self._evict_main()

    def _evict_small(self) -> Key | None:
        while self._small:
            key, uses = self._small.popitem(last=False)
            if uses <= _MOVES_ABOVE:
                self._ghost[key] = None
                if len(self._ghost) > self._ghost_capacity:
                    self._ghost.popitem(last=False)
                return key
            self._main[key] = 0
        return None

    def _evict_main(self) -> Key | None:
        while self._main:
            key, uses = self._main.popitem(last=False)
            if uses == 0:
                return key
            self._main[key] = uses - 1
        return None

    def _use(self, key: Key) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, MAX_USES)

    def _take(self, key: Key) -> _Place:
        small = key in self._small
        return _Place(small, (self._small if small else self._main).pop(key))

    def _put(self, key: Key, place: _Place) -> None:
        (self._small if place.small else self._main)[key] = place.uses
