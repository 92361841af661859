"""Mixture of quantised experts on a GPU: pairs of token and expert, sorted by expert, in grouped products that
dequantise in registers. An expert's weights are read once for all of its tokens, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from . import moe_sorted
from .activation import gated_tile, unit_constants
from .expert_weights import ExpertWeights
from .moe_sorted import Entry, Products, Tile, _Sorted, _tile, add_both, bias_of
from .on_gpu import kernel, next_power_of_2, tl
from .packed_tile import expert_strides, kind, packed_tile, source
from .schemes.packed import Packed

TILES = (
    Entry(8, Tile(16, 32, 128, 4, 3), Tile(16, 64, 128, 4, 3)),
    Entry(64, Tile(32, 32, 128, 4, 3), Tile(32, 64, 128, 4, 3)),
    Entry(1 << 40, Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
)
"""The first entry that is large enough serves. Estimates: none was measured."""

_FLOAT32 = Entry(1 << 40, Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2))


def fused(
    x: Tensor,
    router: Tensor,
    gate_up: Packed,
    down: Packed,
    top_k: int,
    renormalize: bool,
    entry: Entry | None = None,
) -> Tensor:
    """`moe.reference` of quantised experts; ``entry`` instead of the table's. The host never waits for the routing."""
    if not len(x):
        return torch.empty_like(x)
    return moe_sorted.fused(x, router, gate_up, down, top_k, renormalize, entry, _PACKED)


def fused_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, entry: Entry | None = None
) -> Tensor:
    """`moe.reference_experts` of quantised ones; ``entry`` instead of the table's."""
    return moe_sorted.fused_experts(x, weights, ids, experts, entry, _PACKED)


def fused_each(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, expected: int) -> Tensor:
    """`moe.fused_each` of quantised experts."""
    return moe_sorted.fused_each(x, weights, ids, experts, expected, _PACKED)


def fused_batched(x: Tensor, counts: Tensor, experts: ExpertWeights, entry: Entry | None = None) -> Tensor:
    """`moe.reference_batched` of quantised experts; ``entry`` instead of the table's."""
    return moe_sorted.fused_batched(x, counts, experts, entry, _PACKED)


def _multiply(
    x: Tensor, own: ExpertWeights, sorted_pairs: _Sorted, top_k: int, num_tiles: int, entry: Entry, result: Tensor
) -> None:
    """As `moe_sorted._multiply`."""
    gate_up, down = own.packed()
    hidden, experts, inner = x.shape[1], len(own), down.columns
    rows = entry.gate_up.rows
    weights, order, starts, counts, ends = sorted_pairs
    activated = torch.empty(len(order), inner, dtype=x.dtype, device=x.device)
    table = order, starts, counts, ends, experts, next_power_of_2(experts)
    plan, depth = entry.gate_up, min(entry.gate_up.depth, max(32, next_power_of_2(hidden)))
    _gate_up_kernel[(num_tiles, -(-inner // plan.columns))](
        x, *source(gate_up), *expert_strides(gate_up), *bias_of(own.gate_up_bias, x), activated, *table, top_k, hidden,
        inner, x.stride(0), *unit_constants(own.activation), *kind(gate_up, depth), rows, plan.columns, depth,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    plan, depth = entry.down, min(entry.down.depth, max(32, next_power_of_2(inner)))
    _down_kernel[(num_tiles, -(-hidden // plan.columns))](
        activated, *source(down), *expert_strides(down), *bias_of(own.down_bias, x), weights, result, *table, hidden,
        inner, *kind(down, depth), rows, plan.columns, depth, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


_PACKED = Products(TILES, _FLOAT32, _multiply)


@kernel
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, expert_codes, expert_scales,
    expert_zeros, expert_groups, bias, BIAS: tl.constexpr, activated, order, starts, counts, ends, experts,
    EXPERTS: tl.constexpr, top_k, hidden, inner, x_stride, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    KIND: tl.constexpr, SPREAD: tl.constexpr, COUNT: tl.constexpr, ZEROS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(ends + experts - 1):
        return
    expert, row, inside, pair = _tile(order, starts, counts, ends, experts, EXPERTS, ROWS)
    codes += expert * expert_codes
    scales += expert * expert_scales
    zeros += expert * expert_zeros
    groups += expert * expert_groups
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = tl.minimum(column, inner - 1).to(tl.int64)
    source = x + (pair // top_k).to(tl.int64)[:, None] * x_stride
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, hidden, DEPTH):
        at = k + tl.arange(0, DEPTH)[None, :]
        a = tl.load(source + at, mask=inside[:, None] & (at < hidden), other=0.0)
        b = packed_tile(
            codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, held, k, hidden, KIND, SPREAD,
            COUNT, ZEROS, COLUMNS, DEPTH,
        )  # fmt: skip
        gate += tl.dot(a, tl.trans(b.to(x.dtype.element_ty)), input_precision="ieee")
        b = packed_tile(
            codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, held + inner, k, hidden, KIND,
            SPREAD, COUNT, ZEROS, COLUMNS, DEPTH,
        )  # fmt: skip
        up += tl.dot(a, tl.trans(b.to(x.dtype.element_ty)), input_precision="ieee")
    if BIAS:
        gate, up = add_both(gate, up, bias + expert * 2 * inner, column, inner)
    value = gated_tile(gate, up, activated.dtype.element_ty, LIMIT, ALPHA)
    place = activated + row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(place, value, mask=inside[:, None] & (column < inner)[None, :])


@kernel
def _down_kernel(  # type: ignore[no-untyped-def]
    activated, codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, expert_codes, expert_scales,
    expert_zeros, expert_groups, bias, BIAS: tl.constexpr, weights, result, order, starts, counts, ends, experts,
    EXPERTS: tl.constexpr, hidden, inner, KIND: tl.constexpr, SPREAD: tl.constexpr, COUNT: tl.constexpr,
    ZEROS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(ends + experts - 1):
        return
    expert, row, inside, pair = _tile(order, starts, counts, ends, experts, EXPERTS, ROWS)
    codes += expert * expert_codes
    scales += expert * expert_scales
    zeros += expert * expert_zeros
    groups += expert * expert_groups
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = tl.minimum(column, hidden - 1).to(tl.int64)
    source = activated + row.to(tl.int64)[:, None] * inner
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, inner, DEPTH):
        at = k + tl.arange(0, DEPTH)[None, :]
        a = tl.load(source + at, mask=inside[:, None] & (at < inner), other=0.0)
        b = packed_tile(
            codes, scales, zeros, groups, code_stride, scale_stride, group, row_block, held, k, inner, KIND, SPREAD,
            COUNT, ZEROS, COLUMNS, DEPTH,
        )  # fmt: skip
        total += tl.dot(a, tl.trans(b.to(activated.dtype.element_ty)), input_precision="ieee")
    if BIAS:
        total += tl.load(bias + expert * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    scaled = total * tl.load(weights + pair, mask=inside, other=0.0)[:, None]
    place = result + pair.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(place, scaled.to(result.dtype.element_ty), mask=inside[:, None] & (column < hidden)[None, :])
