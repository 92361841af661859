"""How long KV takes to come from each tier. All figures are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_NEW_WEIGHT = 0.2
_DECLINED = 0.95


class LoadCost:
    """Running estimates of what a load takes: of each tier, how long until the first byte and how long for each byte.
    Pure bookkeeping.

    Args:
        num_tiers: how many there are.
        block_bytes: of a block.
        latency_s: of each tier, before anything is measured.
        s_per_byte: likewise.
    """

    def __init__(self, num_tiers: int, block_bytes: int, latency_s: float = 1e-3, s_per_byte: float = 1e-9) -> None:
        self._block_bytes = block_bytes
        self.latency_s = [latency_s] * num_tiers
        self.s_per_byte = [s_per_byte] * num_tiers

    def load_s(self, levels: Sequence[int]) -> float:
        """How long a load takes.

        Args:
            levels: for each block, the number of the tier that it comes from. Tiers load side by side.
        """
        return max((sum(self._parts(level, count)) for level, count in Counter(levels).items()), default=0.0)

    def loaded(self, levels: Sequence[int], seconds: float) -> None:
        """A load took so long. That tells about the tier which should have taken longest, and about whichever makes up
        most of its time."""
        counts = Counter(level for level in levels if level >= 0)
        if not counts:
            return
        level = max(counts, key=lambda level: sum(self._parts(level, counts[level])))
        latency_s, copy_s = self._parts(level, counts[level])
        if latency_s >= copy_s:
            self.latency_s[level] += _NEW_WEIGHT * (max(seconds - copy_s, 0.0) - latency_s)
        else:
            per_byte = max(seconds - latency_s, 0.0) / (counts[level] * self._block_bytes)
            self.s_per_byte[level] += _NEW_WEIGHT * (per_byte - self.s_per_byte[level])

    def declined(self, levels: Sequence[int]) -> None:
        """A load was predicted to take too long. What is not used is not measured: the estimates age, so that a tier
        that was slow for a while is tried again."""
        for level in set(levels):
            self.latency_s[level] *= _DECLINED
            self.s_per_byte[level] *= _DECLINED

    def _parts(self, level: int, num_blocks: int) -> tuple[float, float]:
        return self.latency_s[level], num_blocks * self._block_bytes * self.s_per_byte[level]
