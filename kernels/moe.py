"""Mixture of experts: softmax routing to the top k, gated experts, weighted sum (Fedus et al., arXiv:2101.03961)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import activation, linear
from .activation import silu_mul
from .compiled import compiled, compiled_parallel, num_threads, prange
from .linear import dot_rows, wide
from .on_gpu import kernel, next_power_of_2, tl
from .widen import bits_of

MAX_COMPILED_EXPERT = 1 << 20
CHUNK_ROWS = 128
"""Rows that an expert works on at a time: its inputs and outputs stay in a core's cache."""


_PLACED = 32


def route(x: Tensor, router: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights.

    Args:
        x: [tokens, hidden].
        router: [experts, hidden].
        top_k: experts a token.
        renormalize: make the chosen weights sum to one.

    Returns:
        (weights [tokens, top_k] float32, experts [tokens, top_k] int64).
    """
    logits = torch.nn.functional.linear(x, router)
    weights, experts = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def reference(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """Route, run each expert over its tokens, and sum.

    Args:
        x: [tokens, hidden].
        router: [experts, hidden].
        gate_up: [experts, 2 · inner, hidden].
        down: [experts, hidden, inner].
        top_k: experts a token.
        renormalize: make the chosen weights sum to one.

    Returns:
        [tokens, hidden], dtype of ``x``.
    """
    return _grouped(x, router, gate_up, down, top_k, renormalize, linear.reference)


def _grouped(
    x: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    renormalize: bool,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Sort the tokens by expert, and run each expert over its slice."""
    weights, experts = route(x, router, top_k, renormalize)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    source = order // top_k
    gathered = x[source]
    scale = weights.flatten()[order].to(x.dtype).unsqueeze(1)
    result = torch.empty_like(gathered)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=router.shape[0]).tolist()):
        if count:
            part = slice(start, start + count)
            inner = activation.reference(product(gathered[part], gate_up[expert], None))
            result[part] = product(inner, down[expert], None)
            start += count
    return torch.zeros_like(x).index_add_(0, source, result * scale)


def native(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """`reference` for float32 on a CPU. Small weights may be bfloat16."""
    if gate_up[0].numel() > MAX_COMPILED_EXPERT:
        return _grouped(x, router, gate_up, down, top_k, renormalize, wide)
    out = np.empty(x.shape, np.float32)
    arrays = x.numpy(), bits_of(router), bits_of(gate_up), bits_of(down), top_k, renormalize, out
    if num_threads() == 1:
        moe_rows(*arrays)
    else:
        _moe_parallel(*arrays, num_threads())
    return torch.from_numpy(out)


def fused(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """`reference` on a GPU: pairs of token and expert, sorted by expert, in two grouped products.

    The host never waits for the routing.
    """
    tokens, hidden = x.shape
    experts, inner = len(router), down.shape[2]
    if not tokens:
        return torch.empty_like(x)
    pairs = tokens * top_k
    gate_up_tile, down_tile = _tiles(pairs, experts)
    rows = gate_up_tile.rows
    block = next_power_of_2(experts)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    chosen, ranks, order = (torch.empty(pairs, dtype=torch.int32, device=x.device) for _ in range(3))
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    starts, ends = torch.empty_like(counts), torch.empty_like(counts)
    logits = torch.nn.functional.linear(x, router)
    _route_kernel[(tokens,)](
        logits, weights, chosen, ranks, counts, experts, block, top_k, next_power_of_2(top_k), renormalize, num_warps=1
    )
    _place_kernel[(-(-pairs // _PLACED),)](
        chosen, ranks, counts, order, starts, ends, pairs, experts, block, rows, _PLACED
    )  # fmt: skip
    num_tiles = min(pairs, pairs // rows + experts)
    activated = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    result = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    table = order, starts, counts, ends, experts, block
    _gate_up_kernel[(num_tiles, -(-inner // gate_up_tile.columns))](
        x, gate_up, activated, *table, top_k, hidden, inner, x.stride(0), gate_up.stride(0),
        rows, gate_up_tile.columns, gate_up_tile.depth, num_warps=gate_up_tile.warps, num_stages=gate_up_tile.stages,
    )  # fmt: skip
    _down_kernel[(num_tiles, -(-hidden // down_tile.columns))](
        activated, down, weights, result, *table, hidden, inner, down.stride(0),
        rows, down_tile.columns, down_tile.depth, num_warps=down_tile.warps, num_stages=down_tile.stages,
    )  # fmt: skip
    return result.view(tokens, top_k, hidden).sum(1)


class _Tile(NamedTuple):
    """How a grouped product is cut: pairs and outputs of a program, inputs of a step, and Triton's options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tiles(pairs: int, experts: int) -> tuple[_Tile, _Tile]:
    """For gate and up, and for down; as many rows in both. Tuned on an H100 for 128 experts of 2048 × 768, bfloat16."""
    if pairs <= 8 * experts:
        return _Tile(16, 32, 128, 4, 3), _Tile(16, 64, 64, 4, 5)
    if pairs <= 64 * experts:
        return _Tile(32, 64, 128, 4, 3), _Tile(32, 64, 128, 4, 3)
    if pairs <= 128 * experts:
        return _Tile(64, 64, 64, 4, 3), _Tile(64, 64, 64, 4, 3)
    return _Tile(128, 128, 64, 8, 4), _Tile(128, 256, 64, 8, 3)


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
    weight = tl.zeros((SLOTS,), tl.float32)
    expert = tl.zeros((SLOTS,), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.minimum(tl.argmax(share, axis=0), experts - 1)  # in range even where all is NaN
        weight = tl.where(slot == k, tl.max(share, axis=0), weight)
        expert = tl.where(slot == k, best, expert)
        share = tl.where(at == best, -1.0, share)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, axis=0)
    inside = slot < TOP_K
    rank = tl.atomic_add(counts + expert, 1, mask=inside)
    tl.store(weights + token * TOP_K + slot, weight, mask=inside)
    tl.store(chosen + token * TOP_K + slot, expert, mask=inside)
    tl.store(ranks + token * TOP_K + slot, rank, mask=inside)


@kernel
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
    inside = pair < pairs
    expert = tl.load(chosen + pair, mask=inside, other=0)
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
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, gate_up, activated, order, starts, counts, ends, experts, EXPERTS: tl.constexpr, top_k, hidden, inner,
    x_stride, expert_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
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
    dtype = activated.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype)
    value = (gate * tl.sigmoid(gate)).to(dtype) * up
    tl.store(
        activated + row[:, None] * inner + column[None, :], value, mask=inside[:, None] & (column < inner)[None, :]
    )


@kernel
def _down_kernel(  # type: ignore[no-untyped-def]
    activated, down, weights, result, order, starts, counts, ends, experts, EXPERTS: tl.constexpr, hidden, inner,
    expert_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
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
    scaled = total * tl.load(weights + pair, mask=inside, other=0.0)[:, None]
    place = result + pair.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(place, scaled.to(result.dtype.element_ty), mask=inside[:, None] & (column < hidden)[None, :])


@compiled
def _route(
    x: np.ndarray, router: np.ndarray, top_k: int, renormalize: bool, chosen: np.ndarray, weights: np.ndarray
) -> None:
    """chosen, weights [tokens, top_k]: each token's experts, likeliest first."""
    tokens, experts = len(x), len(router)
    logits = np.empty((tokens, experts), np.float32)
    dot_rows(x, router, logits)
    for t in range(tokens):
        top = logits[t].max()
        total = np.float32(0)
        for e in range(experts):
            logits[t, e] = math.exp(logits[t, e] - top)
            total += logits[t, e]
        picked = np.float32(0)
        for k in range(top_k):
            best = 0
            for e in range(1, experts):
                if logits[t, e] > logits[t, best]:
                    best = e
            chosen[t, k] = best
            weights[t, k] = logits[t, best] / total
            picked += weights[t, k]
            logits[t, best] = -1
        if renormalize:
            for k in range(top_k):
                weights[t, k] /= picked


@compiled
def _sort(chosen: np.ndarray, num_experts: int, starts: np.ndarray, place: np.ndarray, source: np.ndarray) -> None:
    """Order (token, choice) pairs by expert.

    Args:
        chosen: [tokens, top_k] experts.
        num_experts: how many there are.
        starts: [experts + 1] where each expert's pairs begin.
        place: [tokens, top_k] where each pair went.
        source: [tokens · top_k] the token of each place.
    """
    tokens, top_k = chosen.shape
    starts[:] = 0
    for t in range(tokens):
        for k in range(top_k):
            starts[chosen[t, k] + 1] += 1
    for e in range(num_experts):
        starts[e + 1] += starts[e]
    cursor = starts[:-1].copy()
    for t in range(tokens):
        for k in range(top_k):
            at = cursor[chosen[t, k]]
            cursor[chosen[t, k]] += 1
            place[t, k] = at
            source[at] = t


@compiled
def _run_experts(
    x: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    starts: np.ndarray,
    source: np.ndarray,
    first: int,
    last: int,
    result: np.ndarray,
) -> None:
    """result[i] = the expert's output for place i, for first ≤ i < last."""
    double, hidden = gate_up.shape[1], gate_up.shape[2]
    chunk = min(last - first, CHUNK_ROWS)
    rows = np.empty((chunk, hidden), np.float32)
    both = np.empty((chunk, double), np.float32)
    inner = np.empty((chunk, double // 2), np.float32)
    for e in range(len(gate_up)):
        low, high = max(starts[e], first), min(starts[e + 1], last)
        while low < high:
            count = min(high - low, chunk)
            for i in range(count):
                rows[i] = x[source[low + i]]
            dot_rows(rows[:count], gate_up[e], both[:count])
            silu_mul(both[:count], count, inner[:count])
            dot_rows(inner[:count], down[e], result[low : low + count])
            low += count


@compiled
def _combine(
    result: np.ndarray, place: np.ndarray, weights: np.ndarray, first: int, last: int, out: np.ndarray
) -> None:
    """out[t] = Σₖ weights[t, k] · result[place[t, k]] for first ≤ t < last."""
    for t in range(first, last):
        out[t] = weights[t, 0] * result[place[t, 0]]
        for k in range(1, place.shape[1]):
            row, scale = result[place[t, k]], weights[t, k]
            for j in range(len(row)):
                out[t, j] += scale * row[j]


@compiled
def moe_rows(
    x: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    renormalize: bool,
    out: np.ndarray,
) -> None:
    """`native` over arrays, by one thread; ``out`` [tokens, hidden] may not be ``x``."""
    tokens = len(x)
    chosen, place = np.empty((tokens, top_k), np.int64), np.empty((tokens, top_k), np.int64)
    weights = np.empty((tokens, top_k), np.float32)
    starts, source = np.empty(len(router) + 1, np.int64), np.empty(tokens * top_k, np.int64)
    result = np.empty((tokens * top_k, x.shape[1]), np.float32)
    _route(x, router, top_k, renormalize, chosen, weights)
    _sort(chosen, len(router), starts, place, source)
    _run_experts(x, gate_up, down, starts, source, 0, tokens * top_k, result)
    _combine(result, place, weights, 0, tokens, out)


@compiled_parallel
def _moe_parallel(
    x: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    renormalize: bool,
    out: np.ndarray,
    parts: int,
) -> None:
    tokens = len(x)
    chosen, place = np.empty((tokens, top_k), np.int64), np.empty((tokens, top_k), np.int64)
    weights = np.empty((tokens, top_k), np.float32)
    starts, source = np.empty(len(router) + 1, np.int64), np.empty(tokens * top_k, np.int64)
    result = np.empty((tokens * top_k, x.shape[1]), np.float32)
    for part in prange(parts):
        # Whole tiles of four rows, so that a token's sums do not depend on the number of threads.
        low = tokens * part // parts // 4 * 4
        high = tokens if part == parts - 1 else tokens * (part + 1) // parts // 4 * 4
        _route(x[low:high], router, top_k, renormalize, chosen[low:high], weights[low:high])
    _sort(chosen, len(router), starts, place, source)
    pairs = tokens * top_k
    for part in prange(parts):
        _run_experts(x, gate_up, down, starts, source, pairs * part // parts, pairs * (part + 1) // parts, result)
    for part in prange(parts):
        _combine(result, place, weights, tokens * part // parts, tokens * (part + 1) // parts, out)
