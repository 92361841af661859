"""W-TinyLFU (Einziger, Friedman, Manes: TinyLFU, a highly efficient cache admission policy, 2017, section 4): a small
window takes every new key, and what leaves the window must have occurred more often than what it would push out of the
main part, which is a segmented LRU: on probation, and protected after a second use.
"""

from __future__ import annotations

from collections import OrderedDict

from .base import Key, PinningPolicy
from .sketch import FrequencySketch

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8

_Queue = OrderedDict[Key, None]


class TinyLFU(PinningPolicy[_Queue]):
    """See `Policy`. A key that occurs once passes through the window and leaves the rest alone.

    Args:
        capacity: keys that the tier has room for.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._window_capacity = max(1, int(WINDOW_SHARE * capacity))
        self._protected_capacity = int(PROTECTED_SHARE * (capacity - self._window_capacity))
        self._window: _Queue = OrderedDict()
        self._probation: _Queue = OrderedDict()
        self._protected: _Queue = OrderedDict()
        self._sketch = FrequencySketch(capacity)

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected) + len(self._pinned)

    def __contains__(self, key: Key) -> bool:
        return any(key in queue for queue in (self._window, self._probation, self._protected, self._pinned))

    def insert(self, key: Key) -> None:
        """See `Policy`."""
        self._sketch.add(key)
        self._put(key, self._window)

    def evict(self, incoming: Key) -> Key | None:
        """See `Policy`."""
        main = self._probation or self._protected
        if not main or (self._window and len(self._window) >= self._window_capacity):
            if not self._window:
                return None
            candidate, _none = self._window.popitem(last=False)
            if not main or self._sketch.estimate(candidate) <= self._sketch.estimate(next(iter(main))):
                return candidate
            victim, _none = main.popitem(last=False)
            self._probation[candidate] = None
            return victim
        return main.popitem(last=False)[0]

    def _use(self, key: Key) -> None:
        self._sketch.add(key)
        if key in self._window:
            self._window.move_to_end(key)
            return
        self._probation.pop(key, None)
        self._protected.pop(key, None)
        self._put(key, self._protected)

    def _take(self, key: Key) -> _Queue:
        queue = next(queue for queue in (self._window, self._probation, self._protected) if key in queue)
        del queue[key]
        return queue

    def _put(self, key: Key, place: _Queue) -> None:
        place[key] = None
        for queue, capacity in ((self._window, self._window_capacity), (self._protected, self._protected_capacity)):
            while len(queue) > capacity:
                late, _none = queue.popitem(last=False)
                self._probation[late] = None
