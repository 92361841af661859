"""How kernels on a GPU read weights of four bits fast: as 16-bit words, each of four neighbouring columns, a quad.

A product needs each weight at half the precision of a register, so two are worked on at once: the same four bits of two
quads, which lie in one register as they were loaded, become two numbers by three instructions to five. Nothing moves
between threads: the first columns of all quads are one product, the second another, and so on, for which the columns of
x, which are few, are told apart instead.

Powers of two scale MXFP4's numbers before the product, exactly. Integers are multiplied as they are, also exactly, and
their scales multiply sums over a group: closer than `Packed.dequantize`, which rounds each weight to the inputs' type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import kernel, next_power_of_2, tl
from .schemes.int4 import Int4Weight
from .schemes.mxfp4 import BLOCK, Mxfp4Weight
from .schemes.packed import Packed

LEAST_DEPTH = 64
"""Columns of a step: of their quads tensor cores take 16 at least."""

_LEAST_EVEN = 128
"""Of smaller steps there would be so many that masks cost less."""

_MASKED = 32
"""Columns at the end that are there or not: 16 bytes of a row."""

PLAIN, BFLOAT16, FLOAT16 = 0, 1, 2
"""What makes numbers of quads: Triton's own operations, or instructions for pairs of one of the types."""


class Quads(NamedTuple):
    """The arguments for a weight, or for one of each expert, in the kernels' order."""

    codes: Tensor
    """int16, four columns each."""
    scales: Tensor
    zeros: Tensor
    """Or anything."""
    code_stride: int
    """From row to row, in quads."""
    scale_stride: int
    """Of the scales and zeros."""
    group: int
    """Columns of a scale."""


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    mxfp4: bool
    zeros: bool
    pairs: int
    """`PLAIN`, `BFLOAT16` or `FLOAT16`."""


def serves(weight: Packed) -> bool:
    """Whether kernels can read it so: four bits; integers in groups of so many neighbours that a step has one group."""
    if isinstance(weight, Int4Weight):
        wide = weight.group_size >= weight.columns or weight.group_size % LEAST_DEPTH == 0
        return weight.groups is None and wide and weight.columns % _MASKED == 0
    return isinstance(weight, Mxfp4Weight)


def quads(weight: Packed) -> Quads:
    """The arguments for a weight that `serves` accepts."""
    assert isinstance(weight, (Int4Weight, Mxfp4Weight))
    codes = weight.codes.view(torch.int16)
    zeros, group = weight.codes, BLOCK
    if isinstance(weight, Int4Weight):
        group = weight.group_size
        zeros = weight.codes if weight.zeros is None else weight.zeros
    return Quads(codes, weight.scales, zeros, codes.stride(-2), weight.scales.stride(-2), group)


def expert_strides(weight: Packed) -> tuple[int, int, int]:
    """From an expert to the next in each of a `Quads`' tensors."""
    codes, scales, zeros = (tensor.stride(0) for tensor in quads(weight)[:3])
    return codes, scales, zeros


def kind(weight: Packed, x: Tensor) -> Kind:
    """What a kernel is compiled for that multiplies with inputs of x's type on its device."""
    mxfp4 = isinstance(weight, Mxfp4Weight)
    return Kind(mxfp4, isinstance(weight, Int4Weight) and weight.zeros is not None, pairs(x, mxfp4))


def pairs(x: Tensor, mxfp4: bool) -> int:
    """What makes numbers of quads. In float16 MXFP4's scales may leave the range before they are multiplied."""
    if x.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
        return PLAIN
    if x.dtype == torch.float16:
        return PLAIN if mxfp4 else FLOAT16
    return BFLOAT16 if x.dtype == torch.bfloat16 else PLAIN


def step_depth(weight: Packed, wanted: int, parts: int) -> int:
    """Columns that one of ``parts`` works on in a step: ``wanted``, or the half or quarter … of it with which no step
    has two groups of integers, and steps divide the columns, unless they would have few."""
    most = min(wanted, max(LEAST_DEPTH, next_power_of_2(weight.columns)))
    if isinstance(weight, Int4Weight) and weight.group_size < weight.columns:
        while weight.group_size % most:
            most //= 2
    depth = most
    while depth > LEAST_DEPTH and weight.columns % (depth * parts):
        depth //= 2
    even = weight.columns % (depth * parts) == 0
    return depth if even and depth * parts >= _LEAST_EVEN else most


@kernel
def load_few(  # type: ignore[no-untyped-def]
    source, inside, k, columns, EVEN: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr
):
    """The inputs that `add_quads` takes for the step from ``k`` on: of rows, [TOKENS, 1], of which some are inside."""
    if PARTS == 1:
        at = k + tl.arange(0, DEPTH)[None, :]
        place, there = source + at, inside
    else:
        at = k + tl.arange(0, PARTS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
        place, there = source[None, :, :] + at, inside[None, :, :]
    if EVEN:
        few = tl.load(place, mask=there, other=0.0)
    else:
        few = tl.load(place, mask=there & (at < columns), other=0.0)
    return few


@kernel
def add_quads(  # type: ignore[no-untyped-def]
    total, x, codes, scales, zeros, code_stride, scale_stride, group, row, k, columns, MXFP4: tl.constexpr,
    ZEROS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One step: ``DEPTH`` columns from ``k`` on for each of the parts, of rows ``row``, int64, which exist.

    With one part, whose warps share the rows, the weight is the left factor: x is [TOKENS, DEPTH], ``total`` [ROWS,
    TOKENS]. With several, each has a warp: x is [PARTS, TOKENS, DEPTH], ``total`` [PARTS, TOKENS, ROWS]. Columns of x
    that do not exist are zero. `finish` makes sums of the totals."""
    QUADS: tl.constexpr = DEPTH // 4
    if PARTS == 1:
        at = k // 4 + tl.arange(0, QUADS)[None, :]
        place = codes + row[:, None] * code_stride + at
    else:
        at = k // 4 + tl.arange(0, PARTS)[:, None, None] * QUADS + tl.arange(0, QUADS)[None, None, :]
        place = codes + row[None, :, None] * code_stride + at
    if EVEN:
        quad = tl.load(place)
    else:
        quad = tl.load(place, mask=at // 8 * 32 < columns, other=0)  # 16 bytes at a time
    if MXFP4:
        scale = _powers(scales, scale_stride, row, k, columns, PAIRS, EVEN, PARTS, ROWS, DEPTH)
        w0, w1, w2, w3 = _mxfp4(quad, scale, x.dtype, PAIRS)
        part = total
    else:
        w0, w1, w2, w3 = _int4(quad, x.dtype, PAIRS)
        part = tl.zeros_like(total)
    if PARTS == 1:
        even, odd = tl.split(tl.reshape(x, (TOKENS, QUADS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        part = tl.dot(w0, tl.trans(x0), part, input_precision="ieee")
        part = tl.dot(w1, tl.trans(x1), part, input_precision="ieee")
        part = tl.dot(w2, tl.trans(x2), part, input_precision="ieee")
        part = tl.dot(w3, tl.trans(x3), part, input_precision="ieee")
    else:
        even, odd = tl.split(tl.reshape(x, (PARTS, TOKENS, QUADS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        part = tl.dot(x0, tl.trans(w0, (0, 2, 1)), part, input_precision="ieee")
        part = tl.dot(x1, tl.trans(w1, (0, 2, 1)), part, input_precision="ieee")
        part = tl.dot(x2, tl.trans(w2, (0, 2, 1)), part, input_precision="ieee")
        part = tl.dot(x3, tl.trans(w3, (0, 2, 1)), part, input_precision="ieee")
    if MXFP4:
        total = part
    elif PARTS == 1:
        start = row * scale_stride + k // group
        scale = tl.load(scales + start)[:, None].to(tl.float32)
        if ZEROS:
            # A zero point is the same for a whole group: what it takes away is a sum of the inputs.
            zero = 8.0 - tl.load(zeros + start)[:, None].to(tl.float32)
            ones = tl.full((16, QUADS), 1.0, x.dtype)
            sums = tl.dot(ones, tl.trans(x0), input_precision="ieee")
            sums = tl.dot(ones, tl.trans(x1), sums, input_precision="ieee")
            sums = tl.dot(ones, tl.trans(x2), sums, input_precision="ieee")
            sums = tl.dot(ones, tl.trans(x3), sums, input_precision="ieee")
            part += zero * tl.max(sums, axis=0)[None, :]
        total += scale * part
    else:
        index = tl.minimum(k + tl.arange(0, PARTS) * DEPTH, columns - 1) // group
        start = row[None, None, :] * scale_stride + index[:, None, None]
        scale = tl.load(scales + start).to(tl.float32)
        if ZEROS:
            zero = 8.0 - tl.load(zeros + start).to(tl.float32)
            ones = tl.full((PARTS, QUADS, 16), 1.0, x.dtype)
            sums = tl.dot(x0, ones, input_precision="ieee")
            sums = tl.dot(x1, ones, sums, input_precision="ieee")
            sums = tl.dot(x2, ones, sums, input_precision="ieee")
            sums = tl.dot(x3, ones, sums, input_precision="ieee")
            part += zero * tl.max(sums, axis=2)[:, :, None]
        total += scale * part
    return total


@kernel
def finish(total, MXFP4: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[TOKENS, ROWS] of what `add_quads` has summed."""
    total = tl.trans(total) if PARTS == 1 else tl.sum(total, axis=0)
    return total * 4611686018427387904.0 if MXFP4 and PAIRS == 1 else total  # 2^62: see `_powers`


@kernel
def prefetch(place):  # type: ignore[no-untyped-def]
    """Ask for the lines of memory that addresses are in, so that they are in the L2 cache when they are read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@kernel
def _powers(  # type: ignore[no-untyped-def]
    scales, scale_stride, row, k, columns, PAIRS: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """MXFP4's scale of each quad."""
    COUNT: tl.constexpr = DEPTH // 32
    if PARTS == 1:
        at = k // 32 + tl.arange(0, COUNT)[None, :]
        place = scales + row[:, None] * scale_stride + at
    else:
        at = k // 32 + tl.arange(0, PARTS)[:, None, None] * COUNT + tl.arange(0, COUNT)[None, None, :]
        place = scales + row[None, :, None] * scale_stride + at
    if EVEN:
        scale = tl.load(place)
    else:
        scale = tl.load(place, mask=at * 32 < columns, other=0)
    if PAIRS == 1:
        # The numbers come 2^-126 times too small. Of what makes up for it, 2^62 waits for the sum, so that scales from
        # 2^-62 to 2^63 stay in range.
        power = ((tl.minimum(scale, 190).to(tl.int16) + 64) << 7).to(tl.bfloat16, bitcast=True)
    else:
        power = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    if PARTS == 1:
        power = tl.reshape(tl.broadcast_to(power[:, :, None], (ROWS, COUNT, 8)), (ROWS, DEPTH // 4))
    else:
        spread = tl.broadcast_to(power[:, :, :, None], (PARTS, ROWS, COUNT, 8))
        power = tl.reshape(spread, (PARTS, ROWS, DEPTH // 4))
    return power


@kernel
def _mxfp4(quad, power, dtype: tl.constexpr, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The four numbers of each quad, but for 2^62 of the sum if by pairs."""
    if PAIRS == 1:
        # Exponent and fraction go to the lowest of a bfloat16's exponent and the highest of its fraction.
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sign, size, none;
            mov.b32 none, 0x80008000;
            shl.b32 sign, $4, 12;
            shl.b32 size, $4, 6;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 size, size, 0x01C001C0, sign, 0xEA;
            fma.rn.bf16x2 $0, size, $5, none;
            shl.b32 sign, $4, 8;
            shl.b32 size, $4, 2;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 size, size, 0x01C001C0, sign, 0xEA;
            fma.rn.bf16x2 $1, size, $5, none;
            shl.b32 sign, $4, 4;
            shr.b32 size, $4, 2;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 size, size, 0x01C001C0, sign, 0xEA;
            fma.rn.bf16x2 $2, size, $5, none;
            shr.b32 size, $4, 6;
            and.b32 sign, $4, 0x80008000;
            lop3.b32 size, size, 0x01C001C0, sign, 0xEA;
            fma.rn.bf16x2 $3, size, $5, none;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r", [quad, power], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        w0 = _e2m1(quad << 12, power, dtype)
        w1 = _e2m1(quad << 8, power, dtype)
        w2 = _e2m1(quad << 4, power, dtype)
        w3 = _e2m1(quad, power, dtype)
    return w0, w1, w2, w3


@kernel
def _e2m1(bits, power, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number in the four highest bits: as a float16, whose exponent's bias is 14 more."""
    half = (bits & -32768) | ((bits >> 3) & 0x0E00)
    return (half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0 * power).to(dtype)


@kernel
def _int4(quad, dtype: tl.constexpr, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The four numbers of each quad, less 8."""
    if PAIRS == 1:
        # The last bits of a bfloat16 of 128, less 136.
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, one, less;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            lop3.b32 t, $4, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, t, one, less;
            shr.b32 t, $4, 4;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $1, t, one, less;
            shr.b32 t, $4, 8;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $2, t, one, less;
            shr.b32 t, $4, 12;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $3, t, one, less;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [quad], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True,
            pack=2,
        )  # fmt: skip
    elif PAIRS == 2:
        # The last bits of a float16 of 1024, less 1032; the second and fourth, 16 times as large, are made small.
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, high, eight, small, less;
            shr.b32 high, $4, 8;
            mov.b32 eight, 0x64086408;
            mov.b32 small, 0x2C002C00;
            mov.b32 less, 0xD480D480;
            lop3.b32 t, $4, 0x000F000F, 0x64006400, 0xEA;
            sub.rn.f16x2 $0, t, eight;
            lop3.b32 t, $4, 0x00F000F0, 0x64006400, 0xEA;
            fma.rn.f16x2 $1, t, small, less;
            lop3.b32 t, high, 0x000F000F, 0x64006400, 0xEA;
            sub.rn.f16x2 $2, t, eight;
            lop3.b32 t, high, 0x00F000F0, 0x64006400, 0xEA;
            fma.rn.f16x2 $3, t, small, less;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [quad], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        w0 = ((quad & 15) - 8).to(dtype)
        w1 = (((quad >> 4) & 15) - 8).to(dtype)
        w2 = (((quad >> 8) & 15) - 8).to(dtype)
        w3 = (((quad >> 12) & 15) - 8).to(dtype)
    return w0, w1, w2, w3
