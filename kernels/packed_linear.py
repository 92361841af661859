"""``x @ weight.T + bias`` with a quantised weight, which stays packed in memory.

On a GPU a decode step waits for weights to arrive, and packed they are a half or a quarter: kernels dequantise in
registers, whatever the number of rows; but for many rows `fp8_linear` serves some FP8 weights. `QuadTile` is for few
rows and weights of four bits that `packed_quads` serves; of others `Gemv` multiplies elementwise, `Tile` by tensor
cores. As in `small_linear`, sums are float32 and in the same order every time. Where tensor cores multiply, weights are
rounded to the type of the inputs first, as `reference` does, but for the integers of quads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import fp8_linear, packed_quads
from .on_gpu import follows, kernel_varying, next_power_of_2, tl
from .packed_quads import add_quads, finish, load_few, prefetch
from .packed_tile import kind, packed_tile, source
from .schemes.fp8 import Fp8Weight
from .schemes.packed import Packed
from .small_linear import sum_splits


class Gemv(NamedTuple):
    """Elementwise products; see `small_linear.Gemv`."""

    tokens: int
    rows: int
    depth: int
    warps: int


class Tile(NamedTuple):
    """Tensor cores.

    Args:
        tokens: rows of x of one program, 16 at least.
        rows: of the weight, of one program.
        depth: columns in a step.
        splits: programs that share the columns.
        warps: of a program.
        stages: steps in flight.
    """

    tokens: int
    rows: int
    depth: int
    splits: int
    warps: int
    stages: int


class QuadTile(NamedTuple):
    """Tensor cores, of weights that `packed_quads.serves` accepts.

    Args:
        tokens: rows of x of one program, 16 at least.
        rows: of the weight, of one program.
        depth: columns in a step: of each warp if they share the columns, else of all.
        by_columns: whether a program's warps share the columns; else they share the rows, and the weight is the left
            factor, which Hopper's wide instructions take from registers if it has 64 rows and more.
        splits: programs that share the columns.
        warps: of a program.
        stages: steps in flight, and one.
        ahead: lines of 128 bytes of each row that a program asks for before the kernel before it has ended; 0, or a
            power of two.
    """

    tokens: int
    rows: int
    depth: int
    by_columns: bool
    splits: int
    warps: int
    stages: int
    ahead: int


Plan = Gemv | Tile | QuadTile


class Entry(NamedTuple):
    """Up to how many rows of x, and rows of the weight, a plan serves."""

    max_tokens: int
    max_outputs: int
    plan: Gemv | Tile


class QuadEntry(NamedTuple):
    """Likewise, and up to how many columns of the weight."""

    max_tokens: int
    max_outputs: int
    max_inputs: int
    plan: QuadTile


_ANY = 1 << 40

PLANS = (
    Entry(1, _ANY, Gemv(1, 4, 1024, 4)),
    Entry(2, _ANY, Gemv(2, 4, 1024, 4)),
    Entry(16, 8192, Tile(16, 32, 128, 4, 4, 3)),
    Entry(16, _ANY, Tile(16, 64, 128, 1, 4, 3)),
    Entry(32, _ANY, Tile(32, 64, 128, 1, 4, 3)),
    Entry(64, _ANY, Tile(64, 64, 128, 1, 4, 3)),
    Entry(_ANY, _ANY, Tile(128, 128, 64, 1, 8, 3)),
)
"""The first entry that is large enough serves. Estimates: none was measured."""

QUADS = (
    QuadEntry(16, 4096, 8192, QuadTile(16, 128, 128, False, 16, 4, 3, 8)),
    QuadEntry(16, 8192, 8192, QuadTile(16, 128, 128, False, 8, 4, 3, 8)),
    QuadEntry(16, 8192, _ANY, QuadTile(16, 128, 128, False, 16, 4, 3, 0)),
    QuadEntry(16, _ANY, _ANY, QuadTile(16, 32, 128, True, 1, 4, 3, 8)),
    QuadEntry(32, 4096, 8192, QuadTile(32, 256, 128, False, 8, 8, 3, 8)),
    QuadEntry(32, 8192, 8192, QuadTile(32, 128, 128, False, 8, 4, 3, 0)),
    QuadEntry(32, 8192, _ANY, QuadTile(32, 128, 256, False, 8, 4, 3, 8)),
    QuadEntry(32, _ANY, _ANY, QuadTile(32, 64, 256, False, 1, 4, 3, 8)),
)
"""Likewise for weights of four bits that `packed_quads` serves; where none is large enough, `PLANS`. Measured on an
H100 with Qwen3-8B's products in MXFP4 and GPTQ: the plan that is least behind the best of both, and of all rows."""

_FLOAT32 = Tile(32, 32, 32, 1, 4, 2)
"""No tensor cores, and twice the shared memory."""


def reference(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The product with the dequantised weight, by torch. Inputs are not rounded, even where the scheme would let FP8
    units round them: this is closer.

    Args:
        x: [tokens, inputs], any floating dtype.
        weight: [outputs, inputs].
        bias: [outputs] or None.

    Returns:
        [tokens, outputs], dtype of ``x``.
    """
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)


def fused(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`reference` on a GPU; where `fp8_linear` serves, of rounded inputs."""
    if not len(x):
        return x.new_empty(0, weight.rows)
    if isinstance(weight, Fp8Weight) and fp8_linear.serves(x, weight):
        return fp8_linear.multiply(x, weight, bias)
    return multiply(x, weight, bias, plan_of(x, weight))


def plan_of(x: Tensor, weight: Packed) -> Plan:
    """How to multiply. In float32 there are no tensor cores to feed."""
    if x.dtype != torch.float32 and packed_quads.serves(weight):
        for entry in QUADS:
            if len(x) <= entry.max_tokens and weight.rows <= entry.max_outputs and weight.columns <= entry.max_inputs:
                return entry.plan
    return plan_for(len(x), weight.rows, x.dtype)


def plan_for(tokens: int, outputs: int, dtype: torch.dtype) -> Gemv | Tile:
    """How to multiply with any weight."""
    entries = (entry for entry in PLANS if tokens <= entry.max_tokens and outputs <= entry.max_outputs)
    plan = next(entries).plan
    return _FLOAT32 if isinstance(plan, Tile) and dtype == torch.float32 else plan


def multiply(x: Tensor, weight: Packed, bias: Tensor | None, plan: Plan) -> Tensor:
    """`reference` by a plan, for at least one row."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if isinstance(plan, QuadTile):
        return _multiply_quads(x, weight, bias, plan)
    tokens, inputs = x.shape
    outputs = weight.rows
    depth = min(plan.depth, max(32, next_power_of_2(inputs)))
    given, how = source(weight), kind(weight, depth)
    biased = bias is not None, x if bias is None else bias
    blocks, groups = -(-outputs // plan.rows), -(-tokens // plan.tokens)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if isinstance(plan, Gemv):
        _gemv_kernel[(blocks, groups)](
            x, *given, biased[1], out, tokens, outputs, inputs, x.stride(0), biased[0], *how, plan.tokens, plan.rows,
            depth, num_warps=plan.warps,
        )  # fmt: skip
        return out
    splits = min(plan.splits, -(-inputs // depth))
    target = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device) if splits > 1 else out
    _tile_kernel[(blocks, groups, splits)](
        x, *given, biased[1], target, tokens, outputs, inputs, x.stride(0), biased[0] and splits == 1, *how,
        plan.tokens, plan.rows, depth, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if splits > 1:
        total = target.sum(0)
        out = (total if bias is None else total + bias).to(x.dtype)
    return out


def _multiply_quads(x: Tensor, weight: Packed, bias: Tensor | None, plan: QuadTile) -> Tensor:
    tokens, inputs = x.shape
    outputs = weight.rows
    parts = plan.warps if plan.by_columns else 1
    depth = packed_quads.step_depth(weight, plan.depth, parts)
    steps = -(-inputs // (depth * parts))
    splits = min(plan.splits, steps)
    blocks, groups = -(-outputs // plan.rows), -(-tokens // plan.tokens)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    target = out
    if splits > 1:
        target = torch.empty(splits, tokens, blocks * plan.rows, dtype=torch.float32, device=x.device)
    _quad_kernel[(blocks, groups, splits)](
        x, *packed_quads.quads(weight), x if bias is None else bias, target, tokens, outputs, inputs, x.stride(0),
        target.shape[-1], bias is not None and splits == 1, *packed_quads.kind(weight, x),
        inputs % (depth * parts) == 0, parts, plan.tokens, plan.rows, depth, plan.ahead, num_warps=plan.warps,
        num_stages=plan.stages, **follows(x.device),
    )  # fmt: skip
    if splits > 1:
        sum_splits(target, bias, out, plan.rows)
    return out


@kernel_varying("tokens")
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, bias, out, tokens, outputs, inputs,
    x_stride, BIAS: tl.constexpr, KIND: tl.constexpr, SPREAD: tl.constexpr, COUNT: tl.constexpr, ZEROS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(column, outputs - 1).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    second = tl.minimum(first + TOKENS - 1, tokens - 1)
    total_0 = tl.zeros((ROWS, DEPTH), tl.float32)
    total_1 = total_0
    for k in range(0, inputs, DEPTH):
        at = k + tl.arange(0, DEPTH)
        weight = packed_tile(
            codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, row, k, inputs, KIND, SPREAD,
            COUNT, ZEROS, ROWS, DEPTH,
        )  # fmt: skip
        total_0 += weight * tl.load(x + first.to(tl.int64) * x_stride + at, mask=at < inputs, other=0.0).to(tl.float32)
        if TOKENS > 1:
            other = tl.load(x + second.to(tl.int64) * x_stride + at, mask=at < inputs, other=0.0)
            total_1 += weight * other.to(tl.float32)
    for i in tl.static_range(TOKENS):
        total = tl.sum(total_0 if i == 0 else total_1, axis=1)
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)
        inside = (column < outputs) & (first + i < tokens)
        tl.store(out + (first + i).to(tl.int64) * outputs + column, total.to(out.dtype.element_ty), mask=inside)


@kernel_varying("tokens")
def _tile_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, bias, out, tokens, outputs, inputs,
    x_stride, BIAS: tl.constexpr, KIND: tl.constexpr, SPREAD: tl.constexpr, COUNT: tl.constexpr, ZEROS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(column, outputs - 1).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[:, None]
    share = tl.cdiv(tl.cdiv(inputs, DEPTH), tl.num_programs(2)) * DEPTH
    begin = tl.program_id(2) * share
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(begin, tl.minimum(begin + share, inputs), DEPTH):
        at = k + tl.arange(0, DEPTH)[None, :]
        a = tl.load(x + token.to(tl.int64)[:, None] * x_stride + at, mask=there & (at < inputs), other=0.0)
        b = packed_tile(
            codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, row, k, inputs, KIND, SPREAD,
            COUNT, ZEROS, ROWS, DEPTH,
        )  # fmt: skip
        total += tl.dot(a, tl.trans(b.to(x.dtype.element_ty)), input_precision="ieee")
    if BIAS:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    place = out + (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there & (column < outputs)[None, :])


@kernel_varying("tokens")
def _quad_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, code_stride, scale_stride, group, bias, out, tokens, outputs, inputs, x_stride, out_stride,
    BIAS: tl.constexpr, MXFP4: tl.constexpr, ZEROS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(column, outputs - 1).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    share = tl.cdiv(tl.cdiv(inputs, DEPTH * PARTS), tl.num_programs(2)) * (DEPTH * PARTS)
    begin = tl.program_id(2) * share
    if FOLLOW:
        # The weight, unlike x, is there already: its first lines come while the kernel before ends.
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            line = tl.minimum(begin // 4 + tl.arange(0, AHEAD) * 64, tl.minimum(begin + share, inputs) // 4 - 1)
            prefetch(codes + row[:, None] * code_stride + line[None, :])
        tl.extra.cuda.gdc_wait()
    there = (token < tokens)[:, None]
    source = x + token.to(tl.int64)[:, None] * x_stride
    if PARTS == 1:
        total = tl.zeros((ROWS, TOKENS), tl.float32)
    else:
        total = tl.zeros((PARTS, TOKENS, ROWS), tl.float32)
    for k in range(begin, tl.minimum(begin + share, inputs), DEPTH * PARTS):
        few = load_few(source, there, k, inputs, EVEN, PARTS, DEPTH)
        total = add_quads(
            total, few, codes, scales, zeros, code_stride, scale_stride, group, row, k, inputs, MXFP4, ZEROS, PAIRS,
            EVEN, PARTS, TOKENS, ROWS, DEPTH,
        )  # fmt: skip
    result = finish(total, MXFP4, PAIRS, PARTS)
    if BIAS:
        result += tl.load(bias + row).to(tl.float32)[None, :]
    place = out + (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=there & (column < out_stride)[None, :])
