"""Adaptive replacement (Megiddo, Modha: ARC, a self-tuning, low overhead replacement cache, FAST 2003).

The paper's procedure, cut where a tier needs it: what a miss in full memory does first is `evict`, what it does then is
`insert`. Names are the paper's: T1 and T2 are keys that were used once and more often, B1 and B2 those that left them,
p is how much of the memory is T1's.
"""

from __future__ import annotations

from collections import OrderedDict

from .base import Key, PinningPolicy

_Queue = OrderedDict[Key, None]


class ARC(PinningPolicy[_Queue]):
    """See `Policy`. Between least recently and least frequently used, whichever would have kept more.

    Args:
        capacity: keys that the tier has room for.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._t1: _Queue = OrderedDict()
        self._t2: _Queue = OrderedDict()
        self._b1: _Queue = OrderedDict()
        self._b2: _Queue = OrderedDict()
        self._p = 0.0
        self._adapted_to: Key | None = None

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2) + len(self._pinned)

    def __contains__(self, key: Key) -> bool:
        return key in self._t1 or key in self._t2 or key in self._pinned

    def insert(self, key: Key) -> None:
        """See `Policy`."""
        self._adapt(key)
        self._adapted_to = None
        if key in self._b1 or key in self._b2:
            self._b1.pop(key, None)
            self._b2.pop(key, None)
            self._t2[key] = None
        else:
            self._t1[key] = None
        while self._b1 and len(self._t1) + len(self._b1) > self._capacity:
            self._b1.popitem(last=False)
        while self._b2 and len(self._t1) + len(self._t2) + len(self._b1) + len(self._b2) > 2 * self._capacity:
            self._b2.popitem(last=False)

    def evict(self, incoming: Key) -> Key | None:
        """See `Policy`."""
        self._adapt(incoming)
        of_t1 = len(self._t1) > self._p or (incoming in self._b2 and len(self._t1) == self._p)
        if self._t1 and (of_t1 or not self._t2):
            victim, _none = self._t1.popitem(last=False)
            self._b1[victim] = None
        elif self._t2:
            victim, _none = self._t2.popitem(last=False)
            self._b2[victim] = None
        else:
            return None
        return victim

    def _adapt(self, key: Key) -> None:
        if self._adapted_to == key:
            return
        self._adapted_to = key
        if key in self._b1:
            self._p = min(self._p + max(len(self._b2) / len(self._b1), 1.0), self._capacity)
        elif key in self._b2:
            self._p = max(self._p - max(len(self._b1) / len(self._b2), 1.0), 0.0)

    def _use(self, key: Key) -> None:
        self._take(key)
        self._t2[key] = None

    def _take(self, key: Key) -> _Queue:
        queue = self._t1 if key in self._t1 else self._t2
        del queue[key]
        return queue

    def _put(self, key: Key, place: _Queue) -> None:
        place[key] = None
