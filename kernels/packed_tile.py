"""How kernels on a GPU read quantised weights: a tile of codes becomes numbers in registers.

What scales a step's columns share is known when a kernel is compiled, so that most steps load one for each row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .on_gpu import kernel, tl
from .schemes.fp8 import Fp8Weight
from .schemes.int4 import Int4Weight
from .schemes.mxfp4 import BLOCK
from .schemes.packed import Packed

FP8, INT4, MXFP4 = 0, 1, 2
ONE, SEVERAL, BY_COLUMN, BY_TABLE = 0, 1, 2, 3
"""Scales of a row in one step: one; several, each of equally many neighbours; of groups of any size; in any order."""


class Source(NamedTuple):
    """What `packed_tile` is called with, in its order: first its pointers and strides, then what it is compiled for.

    Args:
        codes: first of the tensors.
        scales: likewise.
        zeros: likewise, or anything.
        groups: likewise.
        code_stride: from row to row of the codes.
        scale_stride: of the scales and zeros.
        group: columns of a scale.
        row_block: rows of a scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    code_stride: int
    scale_stride: int
    group: int
    row_block: int


class Kind(NamedTuple):
    """What `packed_tile` is compiled for.

    Args:
        kind: `FP8`, `INT4` or `MXFP4`.
        spread: how scales go with columns.
        num_scales: of a row in a step, of `SEVERAL`; else 1.
        zeros: whether each group has a zero point.
    """

    kind: int
    spread: int
    num_scales: int
    zeros: bool


def source(weight: Packed) -> Source:
    """The arguments for a weight, or for one of each expert."""
    codes, scales, zeros, groups, row_block = weight.codes, weight.scales, weight.codes, weight.codes, 1
    if isinstance(weight, Fp8Weight):
        group, row_block = weight.column_block, weight.row_block
    elif isinstance(weight, Int4Weight):
        group = weight.group_size
        zeros = codes if weight.zeros is None else weight.zeros
        groups = codes if weight.groups is None else weight.groups
    else:
        group = BLOCK
    return Source(codes, scales, zeros, groups, codes.stride(-2), scales.stride(-2), group, row_block)


def expert_strides(weight: Packed) -> tuple[int, int, int, int]:
    """From an expert to the next in each of a `Source`'s tensors."""
    codes, scales, zeros, groups = (tensor.stride(0) for tensor in source(weight)[:4])
    return codes, scales, zeros, groups


def kind(weight: Packed, depth: int) -> Kind:
    """What a kernel is compiled for that reads ``depth`` columns, a power of two, in a step."""
    group = source(weight).group
    if isinstance(weight, Int4Weight) and weight.groups is not None:
        spread = BY_TABLE
    elif group >= weight.columns or group % depth == 0:
        spread = ONE
    else:
        spread = SEVERAL if depth % group == 0 else BY_COLUMN
    count = depth // group if spread == SEVERAL else 1
    if isinstance(weight, Int4Weight):
        return Kind(INT4, spread, count, weight.zeros is not None)
    return Kind(FP8 if isinstance(weight, Fp8Weight) else MXFP4, spread, count, False)


@kernel
def packed_tile(  # type: ignore[no-untyped-def]
    codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, row, k, columns, KIND: tl.constexpr,
    SPREAD: tl.constexpr, COUNT: tl.constexpr, ZEROS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, DEPTH] float32: columns from ``k`` on of rows ``row``, int64, which exist. Anything finite beyond the last
    column."""
    if KIND == 0:
        at = k + tl.arange(0, DEPTH)
        place = codes + row[:, None] * code_stride + at[None, :]
        number = tl.load(place, mask=(at < columns)[None, :], other=0.0).to(tl.float32)
    else:
        pair = k // 2 + tl.arange(0, DEPTH // 2)
        place = codes + row[:, None] * code_stride + pair[None, :]
        both = tl.load(place, mask=(pair * 2 < columns)[None, :], other=0)
        code = tl.interleave(both & 15, both >> 4)
        if KIND == 1:
            number = code.to(tl.float32)
        else:
            # As a float16, whose bias is 14 more.
            bits = ((code.to(tl.uint16) & 7) << 9) | ((code.to(tl.uint16) & 8) << 12)
            number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    start = row // row_block * scale_stride
    scale = _by_column(scales, groups, start, group, k, columns, SPREAD, COUNT, ROWS, DEPTH)
    if KIND == 2:
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    if ZEROS:
        number -= _by_column(zeros, groups, start, group, k, columns, SPREAD, COUNT, ROWS, DEPTH).to(tl.float32)
    elif KIND == 1:
        number -= 8.0
    return number * scale.to(tl.float32)


@kernel
def _by_column(  # type: ignore[no-untyped-def]
    values, groups, start, group, k, columns, SPREAD: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """What each column of a step has of a row's values, which begin at ``start``: [ROWS, DEPTH] or [ROWS, 1]."""
    if SPREAD == 0:
        part = tl.load(values + start + k // group)[:, None]
    elif SPREAD == 1:
        index = k // group + tl.arange(0, COUNT)
        there = (index * group < columns)[None, :]
        few = tl.load(values + start[:, None] + index[None, :], mask=there, other=0)
        part = tl.reshape(tl.broadcast_to(few[:, :, None], (ROWS, COUNT, DEPTH // COUNT)), (ROWS, DEPTH))
    else:
        at = tl.minimum(k + tl.arange(0, DEPTH), columns - 1)
        index = tl.load(groups + at) if SPREAD == 3 else at // group
        part = tl.load(values + start[:, None] + index[None, :])
    return part
