"""Mixture of experts on a GPU, for many tokens: pairs of token and expert, sorted by expert, in grouped products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear
from .activation import gated_tile, unit_constants
from .expert_weights import ExpertWeights
from .on_gpu import kernel, kernel_varying, next_power_of_2, tl
from .schemes.packed import Weight

_PLACED = 32
_MAX_AT_ONCE = 128
"""Pairs that one program routes and sorts."""


class Tile(NamedTuple):
    """How a grouped product is cut.

    Args:
        rows: pairs of a program.
        columns: outputs of a program.
        depth: inputs of a step.
        warps: of a program.
        stages: steps in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Entry(NamedTuple):
    """Up to how many pairs an expert two tiles serve, of as many rows: for gate and up, and for down."""

    max_pairs: int
    gate_up: Tile
    down: Tile


TILES = (
    Entry(8, Tile(16, 32, 128, 4, 3), Tile(16, 64, 64, 4, 5)),
    Entry(64, Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 3)),
    Entry(128, Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
    Entry(1 << 40, Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3)),
)
"""The first entry that is large enough serves. By an H100, for 128 experts of 2048 × 768, bfloat16."""

_FLOAT32 = Entry(1 << 40, Tile(32, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2))
"""Twice the bytes, and no tensor cores: the table's larger tiles do not fit into shared memory."""


class Products(NamedTuple):
    """How weights of a kind are multiplied.

    Args:
        tiles: the first that is large enough serves.
        float32: serves this type.
        multiply: as `_multiply`.
    """

    tiles: tuple[Entry, ...]
    float32: Entry
    multiply: Callable[..., None]

    def entry(self, pairs: int, experts: int, dtype: torch.dtype) -> Entry:
        """The tiles for so many pairs of all experts."""
        if dtype == torch.float32:
            return self.float32
        return next(entry for entry in self.tiles if pairs <= entry.max_pairs * experts)


def fused(
    x: Tensor,
    router: Tensor,
    gate_up: Weight,
    down: Weight,
    top_k: int,
    renormalize: bool,
    entry: Entry | None = None,
    products: Products | None = None,
) -> Tensor:
    """`moe.reference` for at least one token; ``entry`` instead of the table's; ``products`` of other weights than
    plain ones."""
    tokens, experts = len(x), len(router)
    pairs, products = tokens * top_k, products or PLAIN
    entry = entry or products.entry(pairs, experts, x.dtype)
    table = _sort(linear.fused(x, router), top_k, renormalize, entry.gate_up.rows)
    result = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=x.device)
    num_tiles = min(pairs, pairs // entry.gate_up.rows + experts)
    products.multiply(x, ExpertWeights(gate_up, down), table, top_k, num_tiles, entry, result)
    return result.view(tokens, top_k, -1).sum(1)


def fused_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: ExpertWeights,
    entry: Entry | None = None,
    products: Products | None = None,
) -> Tensor:
    """`moe.reference_experts` on a GPU; ``entry`` and ``products`` as in `fused`."""
    tokens, top_k = ids.shape
    pairs, count = tokens * top_k, len(experts)
    if not pairs:
        return torch.zeros_like(x)
    products = products or PLAIN
    entry = entry or products.entry(pairs, count, x.dtype)
    table = _sort_chosen(weights, ids, count, entry.gate_up.rows)
    # Pairs that are nobody's stay zero.
    result = torch.zeros(pairs, x.shape[1], dtype=x.dtype, device=x.device)
    num_tiles = min(pairs, pairs // entry.gate_up.rows + count)
    products.multiply(x, experts, table, top_k, num_tiles, entry, result)
    return result.view(tokens, top_k, -1).sum(1)


def fused_each(
    x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, expected: int, products: Products | None = None
) -> Tensor:
    """`moe.fused_each`, always [tokens, top_k, hidden]; ``products`` as in `fused`."""
    tokens, top_k = ids.shape
    pairs, count, products = tokens * top_k, len(experts), products or PLAIN
    entry = products.entry(expected * top_k, count, x.dtype)
    table = _sort_chosen(weights, ids, count, entry.gate_up.rows)
    result = torch.empty(tokens, top_k, x.shape[1], dtype=x.dtype, device=x.device)
    num_tiles = min(pairs, pairs // entry.gate_up.rows + count)
    products.multiply(x, experts, table, top_k, num_tiles, entry, result)
    return result


def fused_batched(
    x: Tensor, counts: Tensor, experts: ExpertWeights, entry: Entry | None = None, products: Products | None = None
) -> Tensor:
    """`moe.reference_batched` on a GPU; ``entry`` and ``products`` as in `fused`. Its launches do not depend on the
    counts, so that a CUDA graph can record it."""
    num_experts, rows, hidden = x.shape
    pairs, products = num_experts * rows, products or PLAIN
    result = torch.empty_like(x)
    if not pairs:
        return result
    entry = entry or products.entry(pairs, num_experts, x.dtype)
    tile, counts = entry.gate_up.rows, counts.int()
    table = _Sorted(
        torch.ones(pairs, dtype=torch.float32, device=x.device),
        torch.arange(pairs, dtype=torch.int32, device=x.device),
        torch.arange(0, pairs, rows, dtype=torch.int32, device=x.device),
        counts,
        ((counts + tile - 1) // tile).cumsum(0, dtype=torch.int32),
    )
    num_tiles = num_experts * -(-rows // tile)
    products.multiply(x.view(pairs, hidden), experts, table, 1, num_tiles, entry, result)
    return result


def _multiply(
    x: Tensor, own: ExpertWeights, sorted_pairs: _Sorted, top_k: int, num_tiles: int, entry: Entry, result: Tensor
) -> None:
    """result[pair] = the weighted output of the pair's expert for the pair's token, one of ``top_k`` of x [tokens,
    hidden]; ``result`` is [pairs, hidden] in any shape. Pairs that are in no expert's part are left alone."""
    gate_up, down = own.plain()
    hidden, experts, inner = x.shape[1], len(own), down.shape[2]
    gate_up_tile, down_tile = entry.gate_up, entry.down
    rows = gate_up_tile.rows
    weights, order, starts, counts, ends = sorted_pairs
    activated = torch.empty(len(order), inner, dtype=x.dtype, device=x.device)
    table = order, starts, counts, ends, experts, next_power_of_2(experts)
    _gate_up_kernel[(num_tiles, -(-inner // gate_up_tile.columns))](
        x, gate_up, *bias_of(own.gate_up_bias, x), activated, *table, top_k, hidden, inner, x.stride(0),
        gate_up.stride(0), *unit_constants(own.activation), rows, gate_up_tile.columns, gate_up_tile.depth,
        num_warps=gate_up_tile.warps, num_stages=gate_up_tile.stages,
    )  # fmt: skip
    _down_kernel[(num_tiles, -(-hidden // down_tile.columns))](
        activated, down, *bias_of(own.down_bias, x), weights, result, *table, hidden, inner, down.stride(0), rows,
        down_tile.columns, down_tile.depth, num_warps=down_tile.warps, num_stages=down_tile.stages,
    )  # fmt: skip


def bias_of(bias: Tensor | None, other: Tensor) -> tuple[Tensor, bool]:
    """What kernels take for a bias: without one, ``other`` in its place, and that it is none."""
    return (other, False) if bias is None else (bias, True)


PLAIN = Products(TILES, _FLOAT32, _multiply)
"""Of weights that are not quantised."""


class _Sorted(NamedTuple):
    """Pairs by expert.

    Args:
        weights: [tokens, top_k] float32.
        order: [pairs] int32, the pairs of the first expert, then of the next.
        starts: [experts] int32, where each one's pairs begin.
        counts: [experts] int32, how many there are.
        ends: [experts] int32, where each one's tiles end.
    """

    weights: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor
    ends: Tensor


def _sort(logits: Tensor, top_k: int, renormalize: bool, rows: int) -> _Sorted:
    tokens, experts = logits.shape
    pairs = tokens * top_k

    def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    table = _Sorted(make(tokens, top_k, dtype=torch.float32), make(pairs), make(experts), make(experts), make(experts))
    weights, order, starts, counts, ends = table
    block, slots = next_power_of_2(experts), next_power_of_2(top_k)
    padded = next_power_of_2(tokens)
    if padded * slots <= _MAX_AT_ONCE and block <= 2 * _MAX_AT_ONCE:
        _route_and_sort_kernel[(1,)](
            logits, weights, order, starts, counts, ends, tokens, experts, block, top_k, slots, renormalize, padded,
            rows, num_warps=8 if padded * slots * block > 1 << 13 else 4,
        )  # fmt: skip
        return table
    chosen, ranks = make(pairs), make(pairs)
    counts.zero_()
    _route_kernel[(tokens,)](
        logits, weights, chosen, ranks, counts, experts, block, top_k, slots, renormalize, num_warps=1
    )
    _place_kernel[(-(-pairs // _PLACED),)](
        chosen, ranks, counts, order, starts, ends, pairs, experts, block, rows, _PLACED
    )  # fmt: skip
    return table


def _sort_chosen(weights: Tensor, ids: Tensor, experts: int, rows: int) -> _Sorted:
    """`_sort` of pairs whose experts are known; negative ones are in nobody's part."""
    pairs, block = ids.numel(), next_power_of_2(experts)
    chosen = ids.to(torch.int32).contiguous()

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    order, ranks, starts, ends = make(pairs), make(pairs), make(experts), make(experts)
    counts = torch.zeros(experts, dtype=torch.int32, device=ids.device)
    grid = (-(-pairs // _PLACED),)
    _count_kernel[grid](chosen, ranks, counts, pairs, _PLACED)
    _place_kernel[grid](chosen, ranks, counts, order, starts, ends, pairs, experts, block, rows, _PLACED)
    return _Sorted(weights.contiguous(), order, starts, counts, ends)


@kernel_varying("pairs")
def _count_kernel(chosen, ranks, counts, pairs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many pairs each expert has, and each pair's place among them, in the order of arrival."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + pair, mask=pair < pairs, other=-1)
    tl.store(ranks + pair, tl.atomic_add(counts + expert, 1, mask=expert >= 0), mask=expert >= 0)


@kernel
def _route_kernel(  # type: ignore[no-untyped-def]
    logits, weights, chosen, ranks, counts, experts, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token: its experts, their weights, and its place among each one's tokens, in the order of arrival."""
    token = tl.program_id(0)
    at, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    value = tl.load(logits + token * experts + at, mask=at < experts, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - tl.max(value, axis=0))
    share = share / tl.sum(share, axis=0)
    broken = tl.sum(share, axis=0) != tl.sum(share, axis=0)
    # Where numbers are none, the threads of a program would not agree on the largest.
    share = tl.where(broken, 1.0, share)
    weight = tl.zeros((SLOTS,), tl.float32)
    expert = tl.zeros((SLOTS,), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(share, axis=0)
        weight = tl.where(slot == k, tl.max(share, axis=0), weight)
        expert = tl.where(slot == k, best, expert)
        share = tl.where(at == best, -1.0, share)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, axis=0)
    weight = tl.where(broken, float("nan"), weight)
    inside = slot < TOP_K
    rank = tl.atomic_add(counts + expert, 1, mask=inside)
    tl.store(weights + token * TOP_K + slot, weight, mask=inside)
    tl.store(chosen + token * TOP_K + slot, expert, mask=inside)
    tl.store(ranks + token * TOP_K + slot, rank, mask=inside)


@kernel_varying("tokens")
def _route_and_sort_kernel(  # type: ignore[no-untyped-def]
    logits, weights, order, starts, counts, ends, tokens, experts, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Few tokens, by one program: what `_route_kernel` and `_place_kernel` do by many."""
    token, at, slot = tl.arange(0, TOKENS), tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    there = (token < tokens)[:, None]
    value = tl.load(logits + token[:, None] * experts + at[None, :], mask=there & (at < experts)[None, :], other=0.0)
    value = tl.where((at < experts)[None, :], value.to(tl.float32), float("-inf"))
    share = tl.exp(value - tl.max(value, axis=1)[:, None])
    share = share / tl.sum(share, axis=1)[:, None]
    broken = (tl.sum(share, axis=1) != tl.sum(share, axis=1))[:, None]
    share = tl.where(broken, 1.0, share)
    weight = tl.zeros((TOKENS, SLOTS), tl.float32)
    expert = tl.full((TOKENS, SLOTS), EXPERTS, tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(share, axis=1)
        weight = tl.where((slot == k)[None, :], tl.max(share, axis=1)[:, None], weight)
        expert = tl.where((slot == k)[None, :] & there, best[:, None], expert)
        share = tl.where(at[None, :] == best[:, None], -1.0, share)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, axis=1)[:, None]
    weight = tl.where(broken, float("nan"), weight)
    pair = token[:, None] * TOP_K + slot[None, :]
    tl.store(weights + pair, weight, mask=there & (slot < TOP_K)[None, :])
    # Slots that no pair has stand behind all experts.
    flat: tl.constexpr = TOKENS * SLOTS
    of, place = tl.reshape(expert, (flat,)), tl.arange(0, flat)
    before = (of[:, None] < of[None, :]) | ((of[:, None] == of[None, :]) & (place[:, None] < place[None, :]))
    tl.store(order + tl.sum(before.to(tl.int32), axis=0), tl.reshape(pair, (flat,)), mask=of < EXPERTS)
    count = tl.sum((of[:, None] == at[None, :]).to(tl.int32), axis=0)
    tl.store(counts + at, count, mask=at < experts)
    tl.store(starts + at, tl.cumsum(count, axis=0) - count, mask=at < experts)
    tl.store(ends + at, tl.cumsum((count + ROWS - 1) // ROWS, axis=0), mask=at < experts)


@kernel_varying("pairs")
def _place_kernel(  # type: ignore[no-untyped-def]
    chosen, ranks, counts, order, starts, ends, pairs, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort pairs by expert, and say where each expert's pairs and tiles begin and end."""
    at = tl.arange(0, EXPERTS)
    count = tl.load(counts + at, mask=at < experts, other=0)
    if tl.program_id(0) == 0:
        tl.store(starts + at, tl.cumsum(count, axis=0) - count, mask=at < experts)
        tl.store(ends + at, tl.cumsum((count + ROWS - 1) // ROWS, axis=0), mask=at < experts)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + pair, mask=pair < pairs, other=-1)
    inside = expert >= 0
    start = tl.sum(tl.where(at[None, :] < expert[:, None], count[None, :], 0), axis=1)
    tl.store(order + start + tl.load(ranks + pair, mask=inside, other=0), pair, mask=inside)


@kernel
def _tile(  # type: ignore[no-untyped-def]
    order, starts, counts, ends, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    """Of this program: its expert, its rows of the sorted pairs, which of them exist, and the pairs."""
    tile = tl.program_id(0)
    at = tl.arange(0, EXPERTS)
    bounds = tl.load(ends + at, mask=at < experts, other=1 << 30)
    expert = tl.sum((bounds <= tile).to(tl.int32), axis=0)
    before = tl.max(tl.where(bounds <= tile, bounds, 0), axis=0)
    held = tl.minimum(expert, experts - 1)
    first = tl.load(starts + held)
    row = (tile - before) * ROWS + tl.arange(0, ROWS)
    inside = (row < tl.load(counts + held)) & (expert < experts)
    return held.to(tl.int64), first + row, inside, tl.load(order + first + row, mask=inside, other=0)


@kernel
def add_both(gate, up, bias, column, inner):  # type: ignore[no-untyped-def]
    """Sums and an expert's bias, gate first."""
    held = column < inner
    gate += tl.load(bias + column, mask=held, other=0.0).to(tl.float32)[None, :]
    up += tl.load(bias + inner + column, mask=held, other=0.0).to(tl.float32)[None, :]
    return gate, up


@kernel
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, gate_up, bias, BIAS: tl.constexpr, activated, order, starts, counts, ends, experts, EXPERTS: tl.constexpr, top_k,
    hidden, inner, x_stride, expert_stride, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(ends + experts - 1):
        return
    expert, row, inside, pair = _tile(order, starts, counts, ends, experts, EXPERTS, ROWS)
    column, depth = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    source = x + (pair // top_k).to(tl.int64)[:, None] * x_stride
    weight = gate_up + expert * expert_stride + column[:, None] * hidden
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, hidden, DEPTH):
        at = k + depth[None, :]
        a = tl.load(source + at, mask=inside[:, None] & (at < hidden), other=0.0)
        held = (column < inner)[:, None] & (at < hidden)
        gate += tl.dot(a, tl.trans(tl.load(weight + at, mask=held, other=0.0)), input_precision="ieee")
        up += tl.dot(a, tl.trans(tl.load(weight + inner * hidden + at, mask=held, other=0.0)), input_precision="ieee")
    if BIAS:
        gate, up = add_both(gate, up, bias + expert * 2 * inner, column, inner)
    value = gated_tile(gate, up, activated.dtype.element_ty, LIMIT, ALPHA)
    tl.store(
        activated + row[:, None] * inner + column[None, :], value, mask=inside[:, None] & (column < inner)[None, :]
    )


@kernel
def _down_kernel(  # type: ignore[no-untyped-def]
    activated, down, bias, BIAS: tl.constexpr, weights, result, order, starts, counts, ends, experts,
    EXPERTS: tl.constexpr, hidden, inner, expert_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(ends + experts - 1):
        return
    expert, row, inside, pair = _tile(order, starts, counts, ends, experts, EXPERTS, ROWS)
    column, depth = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, inner, DEPTH):
        at = k + depth[None, :]
        a = tl.load(activated + row[:, None] * inner + at, mask=inside[:, None] & (at < inner), other=0.0)
        held = (column < hidden)[:, None] & (at < inner)
        w = tl.load(down + expert * expert_stride + column[:, None] * inner + at, mask=held, other=0.0)
        total += tl.dot(a, tl.trans(w), input_precision="ieee")
    if BIAS:
        total += tl.load(bias + expert * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    scaled = total * tl.load(weights + pair, mask=inside, other=0.0)[:, None]
    place = result + pair.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(place, scaled.to(result.dtype.element_ty), mask=inside[:, None] & (column < hidden)[None, :])
