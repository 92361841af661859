"""Copy many byte ranges between two buffers in one call."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .compiled import AVAILABLE, compiled, move_bytes
from .on_gpu import kernel_varying, tl

_TILE_BYTES = 32 << 10
_WARPS = 16
"""A program with 32 KiB on their way keeps its share of the memory's bandwidth busy: few programs are enough."""


def reference(
    source: np.ndarray, target: np.ndarray, source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray
) -> None:
    """target[t : t + n] = source[s : s + n] for each range. Ranges must lie inside the buffers and not overlap.

    Args:
        source: [bytes] uint8.
        target: [bytes] uint8, another buffer.
        source_offsets: [ranges] int64.
        target_offsets: [ranges] int64.
        sizes: [ranges] int64, bytes each.
    """
    for s, t, n in zip(source_offsets.tolist(), target_offsets.tolist(), sizes.tolist(), strict=True):
        target[t : t + n] = source[s : s + n]


def native(
    source: np.ndarray, target: np.ndarray, source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray
) -> None:
    """`reference`, without the GIL."""
    if not AVAILABLE:
        reference(source, target, source_offsets, target_offsets, sizes)
        return
    _copy(_read_only(source), target, _read_only(source_offsets), _read_only(target_offsets), _read_only(sizes))


def fused(
    source: Tensor,
    target: Tensor,
    source_offsets: Tensor,
    target_offsets: Tensor,
    sizes: Tensor,
    word_bytes: int,
    programs: int,
) -> None:
    """`reference` on a GPU, by one kernel. Does not wait for it.

    Args:
        source: [bytes] uint8, or anything with ``data_ptr()``, ``dtype`` and ``element_size()`` that the device can
            read: a peer's memory too.
        target: [bytes] uint8, likewise.
        source_offsets: [ranges] int64, on the device.
        target_offsets: [ranges] int64, on the device.
        sizes: [ranges] int64, on the device.
        word_bytes: 1 or 8; both addresses, all offsets and all sizes are multiples of it.
        programs: how many there are at a time: what they take of the GPU, others cannot use.
    """
    if len(sizes):
        _copy_kernel[(programs,)](
            source, target, source_offsets, target_offsets, sizes, len(sizes), word_bytes == 8,
            _TILE_BYTES // word_bytes, num_warps=_WARPS,
        )  # fmt: skip


@kernel_varying("ranges")
def _copy_kernel(  # type: ignore[no-untyped-def]
    source, target, source_offsets, target_offsets, sizes, ranges, WORDS: tl.constexpr, TILE: tl.constexpr
):
    at = tl.arange(0, TILE)
    for i in range(tl.program_id(0), ranges, tl.num_programs(0)):
        start, to, size = tl.load(source_offsets + i), tl.load(target_offsets + i), tl.load(sizes + i)
        taken, given = source + start, target + to
        if WORDS:
            taken = tl.multiple_of(taken, 8).to(tl.pointer_type(tl.int64))
            given = tl.multiple_of(given, 8).to(tl.pointer_type(tl.int64))
            size = size // 8
        for first in range(0, size, TILE):
            there = first + at < size
            tl.store(given + first + at, tl.load(taken + first + at, mask=there), mask=there)


def _read_only(array: np.ndarray) -> np.ndarray:
    """Mapped memory and received frames are read-only, others are not: compile for one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


@compiled
def _copy(
    source: np.ndarray, target: np.ndarray, source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray
) -> None:
    for i in range(len(sizes)):
        move_bytes(target, target_offsets[i], source, source_offsets[i], sizes[i])
