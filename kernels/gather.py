"""Copy many byte ranges between two places that a GPU can reach, by few programs; elements may change type on the way.

A link between two GPUs is kept busy by the bytes that are under way: about 64 KiB for each of sixteen programs. Ranges
are therefore cut into *rows* of equal size, and a program reads as many rows at once as make up a tile, whatever ranges
they are of: ranges of 4 KiB travel like ranges of a megabyte.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .on_gpu import kernel_varying, tl

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Types that elements may have, by the names that KV layouts use."""

_FP8_LIMIT = 448.0
"""The largest float8_e4m3fn; what is larger becomes that, not NaN."""
_ROW_BYTES = (4096, 512)
"""Of the source. A row of the smaller is one load of 16 bytes by each thread of a warp."""
_ALIGNMENT = 16
_RAW_BYTES = {"words": 8, "bytes": 1}
_TRITON_NAMES = {"words": "int64", "bytes": "uint8", "fp8_e4m3": "float8e4nv"}
_MAX_TILE_ELEMENTS = 1 << 15
_FEW_PIECES = 1 << 16


class Plan(NamedTuple):
    """What a launch takes of the GPU, and how much each program reads at a time."""

    programs: int = 16
    warps: int = 32
    tile_bytes: int = 64 << 10


class Rows(NamedTuple):
    """Ranges, cut for the kernel by `lay_out`."""

    lists: np.ndarray
    """[2 or 3, pieces] int64: where each piece is at the source and at the target, in bytes, and, where pieces are not
    all of ``parts`` whole rows, its elements."""
    parts: int
    """Rows of a piece."""
    width: int
    """Elements of a row."""
    aligned: bool
    """Whether every row begins at a multiple of 16 bytes, at both ends."""
    source_dtype: str
    """Of `DTYPES`; "words" of 8 bytes, or "bytes", if elements are copied as they are."""
    target_dtype: str


def reference(
    source: Tensor,
    target: Tensor,
    source_offsets: np.ndarray,
    target_offsets: np.ndarray,
    sizes: np.ndarray,
    source_dtype: str = "",
    target_dtype: str = "",
) -> None:
    """Copy ranges of elements from ``source`` to ``target``, converting them. They lie inside, and do not overlap.

    Numbers are rounded to nearest, as `torch.Tensor.to` does it; those that are too large for fp8_e4m3 become ±448,
    infinities too, and NaN stays NaN.

    Args:
        source: [bytes] uint8.
        target: [bytes] uint8, another buffer.
        source_offsets: [ranges] int64, whole elements from an address that is a multiple of 16.
        target_offsets: [ranges] int64, likewise; the target's bytes are sizes · its element / the source's element.
        sizes: [ranges] int64, bytes at the source.
        source_dtype: of `DTYPES`, or "", as ``target_dtype``, for bytes that are copied as they are.
        target_dtype: likewise.
    """
    for s, t, n in zip(source_offsets.tolist(), target_offsets.tolist(), sizes.tolist(), strict=True):
        taken = source[s : s + n]
        if source_dtype != target_dtype:
            # A range may begin at an odd address, where a view of another type may not.
            values = taken.clone().view(DTYPES[source_dtype])
            if target_dtype == "fp8_e4m3":
                values = values.float().clamp(-_FP8_LIMIT, _FP8_LIMIT)
            taken = values.to(DTYPES[target_dtype]).view(torch.uint8)
        target[t : t + len(taken)] = taken


def lay_out(
    source_offsets: np.ndarray,
    target_offsets: np.ndarray,
    sizes: np.ndarray,
    source_dtype: str = "",
    target_dtype: str = "",
) -> Rows:
    """Cut ranges into rows. Pure; arguments as in `reference`, each size > 0."""
    if not len(sizes):
        return Rows(np.empty((2, 0), np.int64), 1, 1, False, "", "")
    bits = int(np.bitwise_or.reduce(source_offsets) | np.bitwise_or.reduce(target_offsets))
    if source_dtype == target_dtype:
        aligned = (bits | int(np.bitwise_or.reduce(sizes))) % _ALIGNMENT == 0
        source_dtype = target_dtype = "words" if aligned else "bytes"
    else:
        aligned = bits % _ALIGNMENT == 0
    element, target_element = _element_bytes(source_dtype), _element_bytes(target_dtype)
    largest = int(sizes.max())
    unit = largest if largest == sizes.min() else int(np.gcd.reduce(sizes))
    row_bytes = next((size for size in _ROW_BYTES if unit % size == 0), 0)
    equal = aligned and row_bytes > 0 and int(sizes.sum()) // unit <= max(4 * len(sizes), _FEW_PIECES)
    if not equal:
        unit = row_bytes = _ROW_BYTES[0]
    if equal and unit == largest:  # one piece each
        starts = np.stack([source_offsets, target_offsets])
        return Rows(starts, unit // row_bytes, row_bytes // element, aligned, source_dtype, target_dtype)
    counts = -(-sizes // unit)
    done = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * unit
    lists = [
        np.repeat(source_offsets, counts) + done,
        np.repeat(target_offsets, counts) + done // element * target_element,
    ]
    if not equal:
        lists.append(np.minimum(np.repeat(sizes, counts) - done, unit) // element)
    return Rows(np.stack(lists), unit // row_bytes, row_bytes // element, aligned, source_dtype, target_dtype)


def fused(source: int, target: int, rows: Rows, lists: Tensor, plan: Plan = Plan()) -> None:
    """`reference` on a GPU, by one kernel on the current stream. Does not wait for it.

    Args:
        source: address that the GPU can read, of a peer's memory too; a multiple of 16.
        target: address that the GPU can write; a multiple of 16.
        rows: of `lay_out`.
        lists: ``rows.lists``, on the GPU.
        plan: how. What its programs take of the GPU, others cannot use.
    """
    num_lists, num_pieces = rows.lists.shape
    if not num_pieces:
        return
    element = _element_bytes(rows.source_dtype)
    tile_rows = min(plan.tile_bytes // element, _MAX_TILE_ELEMENTS) // rows.width
    _gather_kernel[(plan.programs,)](
        source, target, lists, num_pieces, num_pieces * rows.parts, rows.parts,
        _triton_type(rows.source_dtype), _triton_type(rows.target_dtype), element, _element_bytes(rows.target_dtype),
        num_lists == 2, rows.aligned, rows.source_dtype == "words", max(tile_rows, 1), rows.width,
        _FP8_LIMIT if rows.target_dtype == "fp8_e4m3" else 0.0, num_warps=plan.warps,
    )  # fmt: skip


@kernel_varying("source", "target", "lists", "pieces", "rows", "parts")
def _gather_kernel(  # type: ignore[no-untyped-def]
    source, target, lists, pieces, rows, parts,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, SOURCE_BYTES: tl.constexpr, TARGET_BYTES: tl.constexpr,
    EQUAL: tl.constexpr, ALIGNED: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    each = tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + each
        there = row < rows
        piece = row // parts
        done = (row % parts).to(tl.int64) * WIDTH  # bytes of one range may exceed 32 bits
        start = tl.load(lists + piece, mask=there, other=0) + done * SOURCE_BYTES
        place = tl.load(lists + pieces + piece, mask=there, other=0) + done * TARGET_BYTES
        taken = (source + start).to(tl.pointer_type(SOURCE))
        given = (target + place).to(tl.pointer_type(TARGET))
        if ALIGNED:
            taken, given = tl.multiple_of(taken, [16]), tl.multiple_of(given, [16])
        if EQUAL:
            inside = there[:, None] & (at >= 0)[None, :]
        else:
            count = tl.load(lists + 2 * pieces + piece, mask=there, other=0)
            if PAIRS:
                count = tl.multiple_of(count, [2])  # so that two words are read by one load
            inside = at[None, :] < count[:, None]
        values = tl.load(taken[:, None] + at[None, :], mask=inside)
        if SOURCE != TARGET:
            values = values.to(tl.float32)
            if LIMIT > 0:
                values = tl.clamp(values, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            values = values.to(TARGET)
        tl.store(given[:, None] + at[None, :], values, mask=inside)


def _element_bytes(dtype: str) -> int:
    return _RAW_BYTES[dtype] if dtype in _RAW_BYTES else DTYPES[dtype].itemsize


def _triton_type(dtype: str) -> Any:
    return getattr(tl, _TRITON_NAMES.get(dtype, dtype))
