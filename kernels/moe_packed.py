"""Mixture of quantised experts on a GPU: pairs of token and expert, sorted by expert, in grouped products that
dequantise in registers. An expert's weights are read once for all of its tokens, packed; those of four bits, while an
expert has few tokens, as `packed_quads` reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import moe_sorted, packed_quads
from .activation import gated_tile, unit_constants
from .expert_weights import ExpertWeights
from .moe_sorted import Entry, Products, Tile, _Sorted, _tile, add_both, bias_of
from .on_gpu import follows, kernel, next_power_of_2, tl
from .packed_quads import add_quads, finish, load_few, prefetch
from .packed_tile import expert_strides, kind, packed_tile, source
from .schemes.packed import Packed


class ByColumns(Tile):
    """Of weights that `packed_quads.serves` accepts; of others, a `Tile`. Warps share the columns: ``depth`` is what
    each has of a step."""


class ByRows(Tile):
    """Likewise. Warps share the rows, and the weight is the left factor."""


TILES = (
    Entry(8, Tile(16, 32, 128, 4, 3), Tile(16, 64, 128, 4, 3)),
    Entry(64, Tile(32, 32, 128, 4, 3), Tile(32, 64, 128, 4, 3)),
    Entry(1 << 40, Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
)
"""The first entry that is large enough serves. Estimates: none was measured."""

QUADS = (
    Entry(16, ByRows(16, 64, 256, 4, 3), ByRows(16, 128, 128, 4, 5)),
    Entry(64, ByRows(32, 64, 128, 4, 3), ByRows(32, 64, 128, 4, 3)),
    *TILES[2:],
)
"""Likewise where `packed_quads` serves gate, up and down. Measured on an H100 with Qwen3-30B-A3B in MXFP4; 17 pairs an
expert and more are estimates."""

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
    return moe_sorted.fused(x, router, gate_up, down, top_k, renormalize, entry, _products(gate_up, down))


def fused_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, entry: Entry | None = None
) -> Tensor:
    """`moe.reference_experts` of quantised ones; ``entry`` instead of the table's."""
    return moe_sorted.fused_experts(x, weights, ids, experts, entry, _products(*experts.packed()))


def fused_each(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, expected: int) -> Tensor:
    """`moe.fused_each` of quantised experts."""
    return moe_sorted.fused_each(x, weights, ids, experts, expected, _products(*experts.packed()))


def fused_batched(x: Tensor, counts: Tensor, experts: ExpertWeights, entry: Entry | None = None) -> Tensor:
    """`moe.reference_batched` of quantised experts; ``entry`` instead of the table's."""
    return moe_sorted.fused_batched(x, counts, experts, entry, _products(*experts.packed()))


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
    if _by_quads(entry.gate_up, gate_up):
        parts, depth, even = _steps(gate_up, entry.gate_up)
        plan = entry.gate_up
        _gate_up_quads_kernel[(num_tiles, -(-inner // plan.columns))](
            x, *packed_quads.quads(gate_up), *packed_quads.expert_strides(gate_up), *bias_of(own.gate_up_bias, x),
            activated, *table, top_k, hidden, inner, x.stride(0), *unit_constants(own.activation),
            *packed_quads.kind(gate_up, x), even, parts, rows, plan.columns, depth, num_warps=plan.warps,
            num_stages=plan.stages, **follows(x.device),
        )  # fmt: skip
    else:
        plan, depth = entry.gate_up, min(entry.gate_up.depth, max(32, next_power_of_2(hidden)))
        _gate_up_kernel[(num_tiles, -(-inner // plan.columns))](
            x, *source(gate_up), *expert_strides(gate_up), *bias_of(own.gate_up_bias, x), activated, *table, top_k,
            hidden, inner, x.stride(0), *unit_constants(own.activation), *kind(gate_up, depth), rows, plan.columns,
            depth, num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    plan = entry.down
    if _by_quads(plan, down):
        parts, depth, even = _steps(down, plan)
        _down_quads_kernel[(num_tiles, -(-hidden // plan.columns))](
            activated, *packed_quads.quads(down), *packed_quads.expert_strides(down), *bias_of(own.down_bias, x),
            weights, result, *table, hidden, inner, *packed_quads.kind(down, x), even, parts, rows, plan.columns,
            depth, _by_quads(entry.gate_up, gate_up), num_warps=plan.warps, num_stages=plan.stages,
            **follows(x.device),
        )  # fmt: skip
    else:
        depth = min(plan.depth, max(32, next_power_of_2(inner)))
        _down_kernel[(num_tiles, -(-hidden // plan.columns))](
            activated, *source(down), *expert_strides(down), *bias_of(own.down_bias, x), weights, result, *table,
            hidden, inner, *kind(down, depth), rows, plan.columns, depth, num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip


def _by_quads(plan: Tile, weight: Packed) -> bool:
    return isinstance(plan, (ByColumns, ByRows)) and packed_quads.serves(weight)


def _steps(weight: Packed, plan: Tile) -> tuple[int, int, bool]:
    """Warps that share the columns, each one's columns in a step, and whether steps divide all."""
    parts = plan.warps if isinstance(plan, ByColumns) else 1
    depth = packed_quads.step_depth(weight, plan.depth, parts)
    return parts, depth, weight.columns % (depth * parts) == 0


_PACKED = Products(TILES, _FLOAT32, _multiply)
_QUADS = Products(QUADS, _FLOAT32, _multiply)


def _products(gate_up: Packed, down: Packed) -> Products:
    return _QUADS if packed_quads.serves(gate_up) and packed_quads.serves(down) else _PACKED


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


@kernel
def _gate_up_quads_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, code_stride, scale_stride, group, expert_codes, expert_scales, expert_zeros, bias,
    BIAS: tl.constexpr, activated, order, starts, counts, ends, experts, EXPERTS: tl.constexpr, top_k, hidden, inner,
    x_stride, LIMIT: tl.constexpr, ALPHA: tl.constexpr, MXFP4: tl.constexpr, ZEROS: tl.constexpr, PAIRS: tl.constexpr,
    EVEN: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    if FOLLOW:
        # In this order: so the next kernel's programs find the table.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) >= tl.load(ends + experts - 1):
        return
    expert, row, inside, pair = _tile(order, starts, counts, ends, experts, EXPERTS, ROWS)
    codes += expert * expert_codes
    scales += expert * expert_scales
    zeros += expert * expert_zeros
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = tl.minimum(column, inner - 1).to(tl.int64)
    source = x + (pair // top_k).to(tl.int64)[:, None] * x_stride
    if PARTS == 1:
        gate = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        gate = tl.zeros((PARTS, ROWS, COLUMNS), tl.float32)
    up = gate
    for k in range(0, hidden, DEPTH * PARTS):
        few = load_few(source, inside[:, None], k, hidden, EVEN, PARTS, DEPTH)
        gate = add_quads(
            gate, few, codes, scales, zeros, code_stride, scale_stride, group, held, k, hidden, MXFP4, ZEROS, PAIRS,
            EVEN, PARTS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        up = add_quads(
            up, few, codes, scales, zeros, code_stride, scale_stride, group, held + inner, k, hidden, MXFP4, ZEROS,
            PAIRS, EVEN, PARTS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    one, other = finish(gate, MXFP4, PAIRS, PARTS), finish(up, MXFP4, PAIRS, PARTS)
    if BIAS:
        one, other = add_both(one, other, bias + expert * 2 * inner, column, inner)
    value = gated_tile(one, other, activated.dtype.element_ty, LIMIT, ALPHA)
    place = activated + row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(place, value, mask=inside[:, None] & (column < inner)[None, :])


@kernel
def _down_quads_kernel(  # type: ignore[no-untyped-def]
    activated, codes, scales, zeros, code_stride, scale_stride, group, expert_codes, expert_scales, expert_zeros, bias,
    BIAS: tl.constexpr, weights, result, order, starts, counts, ends, experts, EXPERTS: tl.constexpr, hidden, inner,
    MXFP4: tl.constexpr, ZEROS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    if FOLLOW and not AHEAD:
        tl.extra.cuda.gdc_wait()
    if tl.program_id(0) >= tl.load(ends + experts - 1):
        return
    expert, row, inside, pair = _tile(order, starts, counts, ends, experts, EXPERTS, ROWS)
    codes += expert * expert_codes
    scales += expert * expert_scales
    zeros += expert * expert_zeros
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = tl.minimum(column, hidden - 1).to(tl.int64)
    if FOLLOW and AHEAD:
        # `_gate_up_quads_kernel` began after the table was written: this program knows its expert already.
        line = tl.minimum(tl.arange(0, 4) * 64, inner // 4 - 1)
        prefetch(codes + held[:, None] * code_stride + line[None, :])
        tl.extra.cuda.gdc_wait()
    source = activated + row.to(tl.int64)[:, None] * inner
    if PARTS == 1:
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        total = tl.zeros((PARTS, ROWS, COLUMNS), tl.float32)
    for k in range(0, inner, DEPTH * PARTS):
        few = load_few(source, inside[:, None], k, inner, EVEN, PARTS, DEPTH)
        total = add_quads(
            total, few, codes, scales, zeros, code_stride, scale_stride, group, held, k, inner, MXFP4, ZEROS, PAIRS,
            EVEN, PARTS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    value = finish(total, MXFP4, PAIRS, PARTS)
    if BIAS:
        value += tl.load(bias + expert * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    scaled = value * tl.load(weights + pair, mask=inside, other=0.0)[:, None]
    place = result + pair.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(place, scaled.to(result.dtype.element_ty), mask=inside[:, None] & (column < hidden)[None, :])
