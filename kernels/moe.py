"""Mixture of experts: routing, gated experts, weighted sum (Fedus et al., arXiv:2101.03961).

In two forms: with softmax routing to the top k inside, which saves launches, or from the routing's outcome on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import activation, linear, moe_few, moe_sorted, packed_linear
from .activation import silu_mul
from .compiled import compiled, compiled_parallel, num_threads, prange
from .expert_weights import Expert, ExpertWeights
from .linear import dot_rows, wide
from .routing import Routing, route
from .schemes.packed import Packed, Weight
from .widen import bits_of

MAX_COMPILED_EXPERT = 1 << 20
CHUNK_ROWS = 128
"""Rows that an expert works on at a time: its inputs and outputs stay in a core's cache."""


def reference(x: Tensor, router: Tensor, gate_up: Weight, down: Weight, top_k: int, renormalize: bool) -> Tensor:
    """Route by softmax, run each expert over its tokens, and sum. Of quantised experts one is dequantised at a time.

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
    weights, ids = _softmax_route(x, router, top_k, renormalize)
    return reference_experts(x, weights, ids, ExpertWeights(gate_up, down))


def reference_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> Tensor:
    """Run each expert over the tokens that were routed to it, and sum: the part that comes after routing.

    Args:
        x: [tokens, hidden].
        weights: [tokens, top_k] float32.
        ids: [tokens, top_k] integers, rows of the experts' tensors; negative ones count as nothing.
        experts: the weights.

    Returns:
        [tokens, hidden], dtype of ``x``.
    """
    return _grouped(x, weights, ids, experts, _multiply)


def reference_batched(x: Tensor, counts: Tensor, experts: ExpertWeights) -> Tensor:
    """Each expert's output for rows of its own.

    Args:
        x: [experts, rows, hidden].
        counts: [experts] integers, how many of each one's rows are tokens; the others may be anything.
        experts: the weights.

    Returns:
        [experts, rows, hidden]; rows that are no tokens are undefined.
    """
    out = torch.empty_like(x)
    for index, count in enumerate(counts.tolist()):
        out[index, :count] = _expert(x[index, :count], experts.expert(index), experts.activation, _multiply)
    return out


_Product = Callable[..., Tensor]


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Packed):
        return packed_linear.reference(x, weight, bias)
    return linear.reference(x, weight, bias)


def _softmax_route(x: Tensor, router: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    return route(torch.nn.functional.linear(x, router), Routing("softmax", top_k, renormalize))


def _expert(x: Tensor, expert: Expert, gated: str, product: _Product) -> Tensor:
    inner = activation.GATED[gated](product(x, expert.gate_up, expert.gate_up_bias))
    return product(inner, expert.down, expert.down_bias)


def _grouped(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, product: _Product) -> Tensor:
    """Sort the tokens by expert, and run each expert over its slice."""
    flat = ids.flatten()
    nobody, *counts = torch.bincount(flat.clamp(min=-1) + 1).tolist() or [0]
    order = flat.argsort(stable=True)[nobody:]
    source = order // max(1, ids.shape[1])
    gathered = x[source]
    scale = weights.flatten()[order].to(x.dtype).unsqueeze(1)
    result = torch.empty_like(gathered)
    start = 0
    for index, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            result[part] = _expert(gathered[part], experts.expert(index), experts.activation, product)
            start += count
    return torch.zeros_like(x).index_add_(0, source, result * scale)


def native(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """`reference` for float32 on a CPU. Small weights may be bfloat16."""
    if gate_up[0].numel() > MAX_COMPILED_EXPERT:
        weights, ids = _softmax_route(x, router.float(), top_k, renormalize)
        return _grouped(x, weights, ids, ExpertWeights(gate_up, down), wide)
    out = np.empty(x.shape, np.float32)
    arrays = x.numpy(), bits_of(router), bits_of(gate_up), bits_of(down), top_k, renormalize, out
    if num_threads() == 1:
        moe_rows(*arrays)
    else:
        _moe_parallel(*arrays, num_threads())
    return torch.from_numpy(out)


def native_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> Tensor:
    """`reference_experts` for float32 on a CPU: SiLU without biases. Small weights may be bfloat16."""
    gate_up, down = experts.plain()
    if gate_up[0].numel() > MAX_COMPILED_EXPERT:
        return _grouped(x, weights, ids, experts, wide)
    out = np.empty(x.shape, np.float32)
    _experts_parallel(x.numpy(), weights.numpy(), ids.numpy(), bits_of(gate_up), bits_of(down), out, num_threads())
    return torch.from_numpy(out)


def fused(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """`reference` on a GPU. The host never waits for the routing."""
    if not len(x):
        return torch.empty_like(x)
    if moe_few.serves(len(x), len(router), top_k):
        return moe_few.fused(x, router, gate_up, down, top_k, renormalize)
    return moe_sorted.fused(x, router, gate_up, down, top_k, renormalize)


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> Tensor:
    """`reference_experts` on a GPU. The host never waits."""
    if len(x) and experts.ordinary and moe_few.serves(len(x), len(experts), ids.shape[1]):
        return moe_few.fused_experts(x, weights, ids, experts)
    return moe_sorted.fused_experts(x, weights, ids, experts)


def fused_each(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, expected: int) -> Tensor:
    """`fused_experts` for those who sum up as they send on, and who have rows for more tokens than come.

    Args:
        x: [tokens, hidden].
        weights: [tokens, top_k] float32.
        ids: [tokens, top_k] int32, as in `fused_experts`.
        experts: the weights.
        expected: how many of the tokens there will be about.

    Returns:
        [tokens, top_k, hidden], each choice's weighted outcome, or their sums, [tokens, hidden]; undefined for choices
        that are negative, and for tokens without others.
    """
    if experts.ordinary and moe_few.serves(len(x), len(experts), ids.shape[1]):
        return moe_few.fused_experts(x, weights, ids, experts)
    return moe_sorted.fused_each(x, weights, ids, experts, expected)


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
        chosen: [tokens, top_k] experts; those that are negative go nowhere.
        num_experts: how many there are.
        starts: [experts + 1] where each expert's pairs begin.
        place: [tokens, top_k] where each pair went, or −1.
        source: [tokens · top_k] the token of each place.
    """
    tokens, top_k = chosen.shape
    starts[:] = 0
    for t in range(tokens):
        for k in range(top_k):
            if chosen[t, k] >= 0:
                starts[chosen[t, k] + 1] += 1
    for e in range(num_experts):
        starts[e + 1] += starts[e]
    cursor = starts[:-1].copy()
    for t in range(tokens):
        for k in range(top_k):
            if chosen[t, k] < 0:
                place[t, k] = -1
                continue
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
    """out[t] = Σₖ weights[t, k] · result[place[t, k]], over places that are none of −1, for first ≤ t < last."""
    for t in range(first, last):
        begun = False
        for k in range(place.shape[1]):
            if place[t, k] < 0:
                continue
            row, scale = result[place[t, k]], weights[t, k]
            if begun:
                for j in range(len(row)):
                    out[t, j] += scale * row[j]
            else:
                for j in range(len(row)):
                    out[t, j] = scale * row[j]
                begun = True
        if not begun:
            out[t] = 0


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


@compiled_parallel
def _experts_parallel(
    x: np.ndarray,
    weights: np.ndarray,
    chosen: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    out: np.ndarray,
    parts: int,
) -> None:
    tokens, top_k = chosen.shape
    place = np.empty((tokens, top_k), np.int64)
    starts, source = np.empty(len(gate_up) + 1, np.int64), np.empty(tokens * top_k, np.int64)
    result = np.empty((tokens * top_k, x.shape[1]), np.float32)
    _sort(chosen, len(gate_up), starts, place, source)
    pairs = starts[-1]
    for part in prange(parts):
        _run_experts(x, gate_up, down, starts, source, pairs * part // parts, pairs * (part + 1) // parts, result)
    for part in prange(parts):
        _combine(result, place, weights, tokens * part // parts, tokens * (part + 1) // parts, out)
