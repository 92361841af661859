"""Blocks whose KV heads lie in several ranks' memory, as blocks of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..layout import KVLayout


class RankBlocks(NamedTuple):
    """The blocks of one rank."""

    heads: range
    """Of the model's KV heads, those that it has."""
    array: np.ndarray
    """[num_blocks * block_bytes of the rank] uint8."""


class SplitBlocks:
    """See `BlockMemory`. What is read looks as if one rank had all heads, so that workers of any number of ranks find
    what others have stored. Ranks that have the same heads have the same bytes.

    Args:
        layout: of whole blocks.
        ranks: all of a worker's.
    """

    def __init__(self, layout: KVLayout, ranks: Sequence[RankBlocks]) -> None:
        self.block_bytes = layout.block_bytes
        planes = layout.num_planes  # of a block: keys and values of each layer
        self._shape = planes, layout.num_kv_heads, layout.plane_bytes // layout.num_kv_heads
        self._parts = [
            (slice(rank.heads.start, rank.heads.stop), rank.array.reshape(-1, planes, len(rank.heads), self._shape[2]))
            for rank in ranks
        ]
        self._sources = list({part[0].start: part for part in self._parts}.values())

    def read(self, blocks: Sequence[int], targets: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        for block, target in zip(blocks, targets, strict=True):
            whole = target.reshape(self._shape)
            for heads, array in self._sources:
                whole[:, heads] = array[block]

    def write(self, blocks: Sequence[int], sources: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        for block, source in zip(blocks, sources, strict=True):
            whole = source.reshape(self._shape)
            for heads, array in self._parts:
                array[block] = whole[:, heads]
