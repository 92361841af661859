"""Checksums of KV, to find bytes that changed on the way.

A sum is over elements, not over bytes where they happen to lie: those of some tokens in the layers of a layer group, in
the reader's dtype, with all the model's heads. So both ends compute it, each from its own blocks, whatever their sizes;
and when a reader's sum is right, its cache holds what the prefill worker computed, rounded to the reader's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from ..kernels import element_sums
from ..kernels.convert_runs import DTYPES, convert
from .layout import DTYPE_BYTES, KVGroup, KVLayout


def unit_of(ours: int, theirs: int) -> int:
    """Tokens of a checksum between two block sizes: whole blocks of both."""
    return math.lcm(ours, theirs)


class Checksums:
    """Sums over one cache. Blocks while it computes, about a second for a few gigabytes.

    Args:
        cache: [bytes] uint8, all of the blocks' memory.
        layout: of a block, with all the model's heads.
        groups: layers that share blocks.
    """

    def __init__(self, cache: np.ndarray, layout: KVLayout, groups: Sequence[KVGroup]) -> None:
        self._cache = cache
        self._layout = layout
        self._groups = tuple(groups)

    def of(
        self,
        tables: Sequence[Sequence[int]],
        layers: range,
        tokens: range,
        first_tokens: Sequence[int],
        unit: int,
        dtype: str,
    ) -> np.ndarray:
        """One sum for each unit of ``unit`` tokens that ``tokens`` have a part in: [units] uint64.

        Args:
            tables: for each KV group, the blocks from the sequence's first on; negative: none.
            layers: of the model.
            tokens: of the sequence.
            first_tokens: for each KV group, before which nothing is summed.
            unit: tokens.
            dtype: elements are rounded to it first.
        """
        first_unit = tokens.start // unit
        sums = np.zeros(-(-tokens.stop // unit) - first_unit, np.uint64)
        for group, table, first in zip(self._groups, tables, first_tokens, strict=True):
            places, needed = group.places(layers), range(max(tokens.start, first), tokens.stop)
            if len(places) == 0 or len(needed) == 0:
                continue
            size = self._layout.block_tokens
            start, stop = needed.start // size, -(-needed.stop // size)
            blocks = np.asarray(table[start:stop], np.int64)
            cache, layout = self._cache, self._layout
            if dtype != layout.dtype:
                # A copy of these places alone, in the other dtype.
                part = cache.reshape(-1, layout.num_layers, layout.layer_bytes)[blocks, places.start : places.stop]
                values = convert(torch.from_numpy(part.reshape(-1)).view(DTYPES[layout.dtype]), DTYPES[dtype])
                cache, blocks = values.view(torch.uint8).numpy(), np.arange(len(blocks))
                layout = msgspec.structs.replace(layout, num_layers=len(places), dtype=dtype)
                at = range(len(places))
            else:
                at = places
            numbers = np.array([group.layers[place] - layers.start for place in places], np.int64)
            row_bytes = layout.head_dim * DTYPE_BYTES[layout.dtype]
            positions, num_planes = np.arange(start, stop) * size, layout.num_parts * layout.num_kv_heads
            element_sums.native(
                cache, sums, blocks, np.maximum(positions, needed.start), np.minimum(positions + size, needed.stop),
                numbers, at.start, layout.num_layers, num_planes, size, row_bytes, unit, first_unit,
            )  # fmt: skip
        return sums
