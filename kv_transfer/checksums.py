"""Checksums of KV, to find bytes that changed on the way.

A sum is over elements, not over bytes where they happen to lie: those of some tokens in the layers of a layer group, in
the reader's dtype, with all the model's heads. So both ends compute it, each from its own blocks, whatever their sizes,
and whichever ranks, hosts or GPUs hold them; and when a reader's sum is right, its cache holds what the prefill worker
computed, rounded to the reader's dtype.

A worker's first rank sums what all of them hold: it maps the others' memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from ..kernels import element_sums, on_gpu
from ..kernels.convert_runs import DTYPES, convert
from .ends import End
from .layout import DTYPE_BYTES, KVGroup, KVLayout
from .sum_queue import Part, Pending, SumQueue


def unit_of(ours: int, theirs: int) -> int:
    """Tokens of a checksum between two block sizes: whole blocks of both."""
    return math.lcm(ours, theirs)


class Held(NamedTuple):
    """What a rank holds, as the first rank reaches it."""

    heads: range
    """Of the model's KV heads."""
    memory: np.ndarray | int
    """The blocks: [bytes] uint8, or an address that the first rank's GPU reads."""


class Checksums:
    """Sums over one worker's cache.

    Args:
        ranks: all of them; heads are the same, or none is.
        layout: of a rank's blocks.
        num_heads: of the model.
        groups: layers that share blocks.
        queue: computes them where memory is GPUs'; None on the host, where whoever starts sums computes them, about a
            second for a few gigabytes.
    """

    def __init__(
        self,
        ranks: Sequence[Held],
        layout: KVLayout,
        num_heads: int,
        groups: Sequence[KVGroup],
        queue: SumQueue | None = None,
    ) -> None:
        self._ranks = list(ranks)
        self._layout = layout
        self._num_heads = num_heads
        self._groups = tuple(groups)
        self._queue = queue
        starts = [held.heads.start for held in ranks]
        self._like = [starts.index(start) for start in starts]
        """For each rank, the first that holds the same heads."""

    def start(
        self,
        tables: Sequence[Sequence[int]],
        layers: range,
        tokens: range,
        first_tokens: Sequence[int],
        unit: int,
        dtype: str,
        *,
        copies: bool,
        behind_steps: bool,
    ) -> Pending:
        """Begin one sum for each unit of ``unit`` tokens that ``tokens`` have a part in.

        Args:
            tables: for each KV group, the blocks from the sequence's first on; negative: none.
            layers: of the model.
            tokens: of the sequence.
            first_tokens: for each KV group, before which nothing is summed.
            unit: tokens.
            dtype: elements are rounded to it first.
            copies: sum also the ranks that hold the heads of another.
            behind_steps: on GPUs, when the calling thread's stream has computed what it was given; else at once.

        Raises:
            RuntimeError: a GPU does not take them.
        """
        first_unit = tokens.start // unit
        parts = []
        for group, table, first in zip(self._groups, tables, first_tokens, strict=True):
            places, needed = group.places(layers), range(max(tokens.start, first), tokens.stop)
            if len(places) == 0 or len(needed) == 0:
                continue
            size = self._layout.block_tokens
            begin, end = needed.start // size, -(-needed.stop // size)
            positions = np.arange(begin, end, dtype=np.int64) * size
            of_blocks = (
                np.asarray(table[begin:end], np.int64),
                np.maximum(positions, needed.start),
                np.minimum(positions + size, needed.stop),
            )
            numbers = np.array([group.layers[place] - layers.start for place in places], np.int64)
            for rank, held in enumerate(self._ranks):
                if copies or self._like[rank] == rank:
                    planes, all_planes = self._planes(held.heads)
                    where = rank, held.memory, self._layout, places, numbers, planes, all_planes
                    parts.append(Part(*where, *of_blocks, unit, first_unit, dtype))
        num_units = -(-tokens.stop // unit) - first_unit
        if self._queue is not None:
            return self._queue.start(parts, len(self._ranks), num_units, behind_steps=behind_steps)
        sums = np.zeros((len(self._ranks), num_units), np.uint64)
        for part in parts:
            _add(part, sums[part.rank])
        return _Computed(sums)

    def total(self, sums: np.ndarray) -> np.ndarray:
        """The sums over all the model's heads: [units] uint64.

        Args:
            sums: [ranks, units], as `start` has them.
        """
        total: np.ndarray = sums[np.unique(self._like)].sum(axis=0, dtype=np.uint64)
        return total

    def right(self, sums: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Which units are as they must be, in each rank: [units] bool.

        Args:
            sums: [ranks, units], as `start` has them with ``copies``.
            expected: [units] uint64, over all the model's heads.
        """
        right: np.ndarray = (self.total(sums) == expected) & (sums == sums[self._like]).all(axis=0)
        return right

    def warm_up(self) -> None:
        """Have the kernel compiled. Blocks for some seconds the first time."""
        layers = range(sum(len(group.layers) for group in self._groups))
        tables, firsts = [[0]] * len(self._groups), [0] * len(self._groups)
        unit, dtype = self._layout.block_tokens, self._layout.dtype
        self.start(tables, layers, range(1), firsts, unit, dtype, copies=True, behind_steps=True).result()

    def close(self) -> None:
        """Wait for sums that are under way. Idempotent."""
        if self._queue is not None:
            self._queue.close()

    def _planes(self, heads: range) -> tuple[np.ndarray, int]:
        """The numbers that a rank's planes of a layer have among all, and how many there are."""
        parts = np.arange(self._layout.num_parts, dtype=np.int64) * self._num_heads
        planes = np.add.outer(parts, np.arange(heads.start, heads.stop, dtype=np.int64)).ravel()
        return planes, self._layout.num_parts * self._num_heads


def why_no_sums(ends: Sequence[End]) -> str:
    """Why the KV of a worker's ranks cannot be summed by the first of them, or ""."""
    if any(end.blocks is None for end in ends):
        return f"the first of {len(ends)} ranks reaches the KV of the others only where kv.checksums is on"
    if ends[0].memory == "cuda" and not on_gpu.AVAILABLE:
        return "KV in GPUs' memory is summed by Triton, which is not installed"
    return ""


def sums_of_ranks(
    ends: Sequence[End], layout: KVLayout, groups: Sequence[KVGroup], notify: Callable[[], None]
) -> Checksums:
    """Sums over what a worker's ranks hold, for which there is no reason why not.

    Args:
        ends: the ranks'.
        layout: of a rank's blocks.
        groups: layers that share blocks.
        notify: see `SumQueue`.
    """
    ranks = [Held(end.heads, end.blocks) for end in ends if end.blocks is not None]
    queue = SumQueue(ends[0].device, notify) if ends[0].memory == "cuda" else None
    return Checksums(ranks, layout, max(end.heads.stop for end in ends), groups, queue)


class _Computed:
    """Sums that are there."""

    def __init__(self, sums: np.ndarray) -> None:
        self._sums = sums

    def query(self) -> bool:
        return True

    def result(self) -> np.ndarray:
        return self._sums


def _add(part: Part, sums: np.ndarray) -> None:
    """Add a part of the host's memory to its sums, [units] uint64."""
    cache, layout, blocks, at = part.memory, part.layout, part.blocks, part.places
    assert isinstance(cache, np.ndarray)
    if part.dtype != layout.dtype:
        # A copy of these places alone, in the other dtype.
        copied = cache.reshape(-1, layout.num_layers, layout.layer_bytes)[blocks, at.start : at.stop]
        values = convert(torch.from_numpy(copied.reshape(-1)).view(DTYPES[layout.dtype]), DTYPES[part.dtype])
        cache, blocks = values.view(torch.uint8).numpy(), np.arange(len(blocks))
        layout = msgspec.structs.replace(layout, num_layers=len(at), dtype=part.dtype)
        at = range(len(at))
    element_sums.native(
        cache, sums, blocks, part.starts, part.stops, part.layers, at.start, layout.num_layers, part.planes,
        part.all_planes, layout.block_tokens, layout.head_dim * DTYPE_BYTES[layout.dtype], part.unit, part.first_unit,
    )  # fmt: skip
