"""Products of few rows with a weight on a GPU: a decode step reads each weight once and waits for little else.

`Gemv` multiplies elementwise, without tensor cores: up to four rows are in registers while the weight passes by. `Tile`
pads the rows to 16 and more for tensor cores, and shares a row of the weight that is too long for one program among
several. Sums are float32 and always in the same order: the same arguments give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import follow, follows, kernel, kernel_varying, next_power_of_2, shared_memory_bytes, tl


class Gemv(NamedTuple):
    """Elementwise products.

    Args:
        tokens: rows of x that one program multiplies: 1, 2 or 4; more go to other programs, which read the weight anew.
        rows: of the weight, of one program.
        depth: columns of the weight in a step.
        warps: of a program.
        stages: steps in flight through shared memory; 1: loads go to registers.
    """

    tokens: int
    rows: int
    depth: int
    warps: int
    stages: int


class Tile(NamedTuple):
    """Tensor cores, for up to `MAX_TOKENS` rows.

    Args:
        rows: of the weight, of one program.
        depth: columns of the weight in a step.
        splits: programs that share the columns.
        warps: of a program.
        stages: steps in flight.
        weight_first: whether the weight is the left factor: of 64 rows and more, Hopper's wide instructions then
            take it from shared memory.
    """

    rows: int
    depth: int
    splits: int
    warps: int
    stages: int
    weight_first: bool


class Entry(NamedTuple):
    """Up to how many rows of x, and rows and columns of the weight, a plan serves; None: cuBLAS does."""

    max_tokens: int
    max_outputs: int
    max_inputs: int
    plan: Gemv | Tile | None


MAX_TOKENS = 64
_ANY = 1 << 40

PLANS = (
    # A router: so few outputs that each token gets programs of its own.
    Entry(16, 512, _ANY, Gemv(1, 1, 2048, 4, 1)),
    Entry(1, _ANY, _ANY, Gemv(1, 2, 2048, 8, 1)),
    Entry(2, 4096, 8192, Gemv(2, 2, 1024, 4, 1)),
    Entry(2, _ANY, _ANY, Gemv(2, 4, 1024, 4, 3)),
    Entry(16, 1024, _ANY, Tile(16, 128, 4, 4, 4, False)),
    Entry(16, 4096, 8192, Tile(32, 256, 1, 4, 4, False)),
    Entry(16, 4096, _ANY, Tile(64, 128, 4, 4, 4, True)),
    Entry(16, _ANY, _ANY, Tile(64, 256, 1, 4, 3, True)),
    Entry(32, 1024, _ANY, Tile(32, 128, 4, 4, 4, False)),
    Entry(32, 4096, 8192, None),
    Entry(32, 4096, _ANY, Tile(64, 128, 4, 4, 4, True)),
    Entry(32, 32768, _ANY, Tile(64, 128, 1, 4, 4, True)),
    Entry(32, _ANY, _ANY, Tile(128, 128, 1, 8, 3, True)),
    Entry(64, 8192, _ANY, None),
    Entry(64, 32768, _ANY, Tile(64, 128, 1, 4, 4, True)),
    Entry(64, _ANY, _ANY, Tile(128, 128, 1, 8, 3, True)),
)
"""The first entry that is large enough serves; where none is, cuBLAS. By an H100, bfloat16 and the shapes of Qwen3-8B
(`python -m tandem.bench.kernels linear`, 2026-11-21): 1.05 to 1.3 times as fast as cuBLAS."""


def plan_for(x: Tensor, weight: Tensor) -> Gemv | Tile | None:
    """How to multiply; None where cuBLAS is as fast.

    Args:
        x: [tokens, inputs].
        weight: [outputs, inputs]; of a gated product, both halves.
    """
    outputs, inputs = weight.shape
    for entry in PLANS:
        if len(x) <= entry.max_tokens and outputs <= entry.max_outputs and inputs <= entry.max_inputs:
            return entry.plan if _worthwhile(entry.plan, x.dtype) else None
    return None


def most_tokens(dtype: torch.dtype) -> int:
    """Up to how many rows of x there is a plan for large weights."""
    any_weight = [entry for entry in PLANS if entry.max_outputs == entry.max_inputs == _ANY]
    large = [entry for entry in any_weight if _worthwhile(entry.plan, dtype)]
    return max((entry.max_tokens for entry in large), default=0)


def _worthwhile(plan: Gemv | Tile | None, dtype: torch.dtype) -> bool:
    """In float32 a tile has no tensor cores to feed."""
    return plan is not None and (isinstance(plan, Gemv) or dtype != torch.float32)


def step_depth(inputs: int, wanted: int) -> int:
    """Columns of a step: ``wanted``, or the half or quarter … of it that divides ``inputs``. Not below 128: there masks
    cost less."""
    depth = min(wanted, max(16, next_power_of_2(inputs)))
    while inputs % depth and depth > 128:
        depth //= 2
    return depth


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Gemv | Tile, gated: bool = False) -> Tensor:
    """``x @ weight.T + bias``, or a gated unit of it.

    Args:
        x: [tokens, inputs]; at least one row, at most `MAX_TOKENS` for a `Tile`.
        weight: [outputs, inputs], dtype of ``x``; if ``gated``, the gate's rows and then as many for its factor.
        bias: [outputs] or None.
        plan: how.
        gated: return silu(gate) · factor of the two halves, each rounded to x's dtype as if it had been stored.

    Returns:
        [tokens, outputs], or half as many columns if ``gated``; dtype of ``x``.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, inputs = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    rows = max(2, plan.rows) if gated else plan.rows
    blocks = -(-len(weight) // rows)
    depth = step_depth(inputs, plan.depth)
    even = inputs % depth == 0
    biased = bias is not None, weight if bias is None else bias
    if isinstance(plan, Gemv):
        _gemv_kernel[(blocks, -(-tokens // plan.tokens))](
            x, weight, biased[1], out, tokens, outputs, inputs, x.stride(0), weight.stride(0), biased[0], gated, even,
            plan.tokens, rows, depth, plan.stages, num_warps=plan.warps, **follows(x.device),
        )  # fmt: skip
        return out
    padded = max(16, next_power_of_2(tokens))
    splits = min(plan.splits, -(-inputs // depth))
    room = shared_memory_bytes(x.device) // ((rows + padded) * depth * x.element_size())
    target = torch.empty(splits, tokens, blocks * rows, dtype=torch.float32, device=x.device) if splits > 1 else out
    _tile_kernel[(blocks, splits)](
        x, weight, biased[1], target, tokens, outputs, inputs, x.stride(0), weight.stride(0), splits, splits > 1,
        biased[0], gated, even, padded, rows, depth, plan.weight_first, num_warps=plan.warps,
        num_stages=max(1, min(plan.stages, room)), **follows(x.device),
    )  # fmt: skip
    if splits > 1:
        sum_splits(target, bias, out, rows, gated)
    return out


def sum_splits(parts: Tensor, bias: Tensor | None, out: Tensor, rows: int, gated: bool = False) -> None:
    """Add what programs have made that shared the columns of a weight, always in the same order.

    Args:
        parts: [splits, tokens, outputs, or twice as many if ``gated``, up to a multiple of ``rows``] float32.
        bias: of all outputs, or None.
        out: [tokens, outputs], which is written.
        rows: of the weight, of a program; a power of two.
        gated: as in `multiply`.
    """
    splits, tokens, width = parts.shape
    _sum_kernel[(width // rows, tokens)](
        parts, out if bias is None else bias, out, tokens, out.shape[1], splits, bias is not None, gated,
        next_power_of_2(splits), rows, num_warps=1, **follows(out.device),
    )  # fmt: skip


@kernel
def row_products(  # type: ignore[no-untyped-def]
    x, x_stride, last, row, inputs, EVEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Dot products of rows of a weight, given by their addresses, with ``TOKENS`` rows of x, the last repeated."""
    depth = tl.arange(0, DEPTH)
    total_0 = tl.zeros((ROWS, DEPTH), tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    for k in tl.range(0, inputs, DEPTH, num_stages=STAGES):
        at = k + depth
        if EVEN:
            weight = tl.load(row[:, None] + at[None, :]).to(tl.float32)
        else:
            weight = tl.load(row[:, None] + at[None, :], mask=(at < inputs)[None, :], other=0.0).to(tl.float32)
        total_0 += weight * _part(x, at, inputs, EVEN)
        if TOKENS > 1:
            total_1 += weight * _part(x + tl.minimum(1, last) * x_stride, at, inputs, EVEN)
        if TOKENS > 2:
            total_2 += weight * _part(x + tl.minimum(2, last) * x_stride, at, inputs, EVEN)
            total_3 += weight * _part(x + tl.minimum(3, last) * x_stride, at, inputs, EVEN)
    return tl.sum(total_0, axis=1), tl.sum(total_1, axis=1), tl.sum(total_2, axis=1), tl.sum(total_3, axis=1)


@kernel
def _part(x, at, inputs, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        part = tl.load(x + at)
    else:
        part = tl.load(x + at, mask=at < inputs, other=0.0)
    return part.to(tl.float32)[None, :]


@kernel
def weight_rows(block, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a weight that a program multiplies: neighbours, or pairs of a gate's and its factor's. The last is
    repeated beyond the end."""
    at = tl.arange(0, ROWS)
    if GATED:
        row = tl.minimum(block * (ROWS // 2) + at // 2, outputs - 1) + at % 2 * outputs
    else:
        row = tl.minimum(block * ROWS + at, outputs - 1)
    return row.to(tl.int64)


@kernel
def silu_pairs(total, dtype: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From [TOKENS, ROWS] pairs of gate and factor: silu(gate) · factor, [TOKENS, ROWS / 2] of ``dtype``."""
    gate, up = tl.split(tl.reshape(total.to(dtype), (TOKENS, ROWS // 2, 2)))
    wide = gate.to(tl.float32)
    return (wide * tl.sigmoid(wide)).to(dtype) * up


@kernel
def _store(  # type: ignore[no-untyped-def]
    total, bias, out, token, tokens, outputs, BIAS: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Finish [TOKENS, ROWS] sums: bias, gate, rounding."""
    block = tl.program_id(0)
    dtype: tl.constexpr = out.dtype.element_ty
    if BIAS:
        total += tl.load(bias + weight_rows(block, outputs, ROWS, GATED)).to(tl.float32)[None, :]
    if GATED:
        value = silu_pairs(total, dtype, TOKENS, ROWS)
        column = block * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        value = total.to(dtype)
        column = block * ROWS + tl.arange(0, ROWS)
    place = out + token.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(place, value, mask=(token < tokens)[:, None] & (column < outputs)[None, :])


@kernel_varying("tokens")
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, tokens, outputs, inputs, x_stride, weight_stride, BIAS: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    follow(FOLLOW)
    first = tl.program_id(1) * TOKENS
    row = weight + weight_rows(tl.program_id(0), outputs, ROWS, GATED) * weight_stride
    sums = row_products(
        x + first.to(tl.int64) * x_stride, x_stride, tokens - 1 - first, row, inputs, EVEN, TOKENS, ROWS, DEPTH, STAGES
    )
    for i in tl.static_range(TOKENS):
        _store(sums[i][None, :], bias, out, first + i + tl.arange(0, 1), tokens, outputs, BIAS, GATED, 1, ROWS)


@kernel_varying("tokens")
def _tile_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, tokens, outputs, inputs, x_stride, weight_stride, splits, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, WEIGHT_FIRST: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    follow(FOLLOW)
    token, depth = tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    source = x + token.to(tl.int64)[:, None] * x_stride
    row = weight + weight_rows(tl.program_id(0), outputs, ROWS, GATED)[:, None] * weight_stride
    # Whole steps for each split.
    share = tl.cdiv(tl.cdiv(inputs, DEPTH), splits) * DEPTH
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, inputs)
    there = (token < tokens)[:, None]
    if WEIGHT_FIRST:
        total = tl.zeros((ROWS, TOKENS), tl.float32)
    else:
        total = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(begin, end, DEPTH):
        at = k + depth[None, :]
        if EVEN:
            a = tl.load(source + at, mask=there, other=0.0)
            b = tl.load(row + at)
        else:
            a = tl.load(source + at, mask=there & (at < inputs), other=0.0)
            b = tl.load(row + at, mask=at < inputs, other=0.0)
        if WEIGHT_FIRST:
            total += tl.dot(b, tl.trans(a), input_precision="ieee")
        else:
            total += tl.dot(a, tl.trans(b), input_precision="ieee")
    if WEIGHT_FIRST:
        total = tl.trans(total)
    if SPLIT:
        width = tl.num_programs(0) * ROWS
        column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        place = out + (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * width + column[None, :]
        tl.store(place, total, mask=there)
    else:
        _store(total, bias, out, token, tokens, outputs, BIAS, GATED, TOKENS, ROWS)


@kernel_varying("tokens")
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts, bias, out, tokens, outputs, splits, BIAS: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """One token and block of outputs: the sum over splits."""
    follow(FOLLOW)
    split, at = tl.arange(0, SPLITS), tl.arange(0, ROWS)
    token = tl.program_id(1) + tl.arange(0, 1)
    width = tl.num_programs(0) * ROWS
    place = parts + (split * tokens + tl.program_id(1)).to(tl.int64)[:, None] * width + tl.program_id(0) * ROWS
    part = tl.load(place + at[None, :], mask=(split < splits)[:, None], other=0.0)
    _store(tl.sum(part, axis=0)[None, :], bias, out, token, tokens, outputs, BIAS, GATED, 1, ROWS)
