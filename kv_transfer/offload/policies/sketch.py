"""How often keys occurred lately, in a few bytes a key: a count-min sketch (Cormode, Muthukrishnan, 2005) whose counts
are halved after every sample (Einziger, Friedman, Manes: TinyLFU, a highly efficient cache admission policy, 2017)."""

from __future__ import annotations

import struct

from .base import Key

MAX_COUNT = 15
_SAMPLE_PER_KEY = 10
_HALVED = bytes(count >> 1 for count in range(256))
_hashes = struct.Struct("<4I").unpack_from


class FrequencySketch:
    """Counts up to `MAX_COUNT`, never too low within a sample. Owned by one thread.

    Args:
        capacity: keys of the tier; the sample is ten times as many.
    """

    def __init__(self, capacity: int) -> None:
        width = 1 << max(6, (4 * capacity - 1).bit_length())
        self._mask = width - 1
        self._rows = [bytearray(width) for _ in range(4)]
        self._sample = _SAMPLE_PER_KEY * capacity
        self._added = 0

    def add(self, key: Key) -> None:
        """Count one occurrence. Amortised O(1): a halving looks at every count, once a sample."""
        mask = self._mask
        for row, hash_ in zip(self._rows, _hashes(key), strict=True):
            place = hash_ & mask
            count = row[place]
            if count < MAX_COUNT:
                row[place] = count + 1
        self._added += 1
        if self._added >= self._sample:
            self._rows = [row.translate(_HALVED) for row in self._rows]
            self._added //= 2

    def estimate(self, key: Key) -> int:
        """About how often a key occurred."""
        mask = self._mask
        hashes: tuple[int, int, int, int] = _hashes(key)
        a, b, c, d = hashes
        rows = self._rows
        return min(rows[0][a & mask], rows[1][b & mask], rows[2][c & mask], rows[3][d & mask])
