"""Where the generations of blocks that were read land: a small region, lent out slot by slot."""

from __future__ import annotations

import numpy as np

from .memory import Buffer

_SLOTS = 1 << 17


class Fence:
    """Slots of 8 bytes for reads that are under way at a time.

    Attributes:
        buffer: what a transport writes to.
        num_free: slots that nobody has.
    """

    def __init__(self, num_slots: int = _SLOTS) -> None:
        self.buffer = Buffer(num_slots * 8)
        self._values: np.ndarray = self.buffer.array.view(np.uint64)
        self._free = np.arange(num_slots - 1, -1, -1, dtype=np.int64)
        self.num_free = num_slots

    def take(self, count: int) -> np.ndarray:
        """Up to ``count`` slots, ascending: [≤ count] int64; fewer, or none, when others are in use."""
        taken = min(count, self.num_free)
        slots = np.sort(self._free[self.num_free - taken : self.num_free])
        self.num_free -= taken
        return slots

    def give_back(self, slots: np.ndarray) -> np.ndarray:
        """End a read into slots. Returns what it wrote: [slots] uint64."""
        values: np.ndarray = self._values[slots]
        self._free[self.num_free : self.num_free + len(slots)] = slots[::-1]
        self.num_free += len(slots)
        return values
