"""Mixture of experts: softmax routing to the top k, gated experts, weighted sum (Fedus et al. 2021, arXiv:2101.03961)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from . import activation, linear
from .activation import silu_mul
from .compiled import compiled, compiled_parallel, num_threads
from .linear import dot_rows, wide

MAX_COMPILED_TOKENS = 32
MAX_COMPILED_EXPERT = 1 << 20


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
    """`reference` for float32 on a CPU."""
    if x.shape[0] > MAX_COMPILED_TOKENS or gate_up[0].numel() > MAX_COMPILED_EXPERT:
        return _grouped(x, router, gate_up, down, top_k, renormalize, wide)
    parts = min(num_threads(), len(x) * top_k)
    out = np.zeros((parts, *x.shape), np.float32)
    arrays = x.numpy(), router.numpy(), gate_up.numpy(), down.numpy(), top_k, renormalize, out
    if parts == 1:
        _moe(*arrays)
        return torch.from_numpy(out[0])
    _moe_parallel(*arrays)
    return torch.from_numpy(out.sum(axis=0))


@compiled
def _route(
    x: np.ndarray, router: np.ndarray, top_k: int, renormalize: bool, chosen: np.ndarray, weights: np.ndarray
) -> None:
    """chosen, weights [tokens, top_k]: each token's experts, likeliest first."""
    tokens, experts = len(x), len(router)
    logits = np.empty((tokens, experts), np.float32)
    dot_rows(x, tokens, router, logits)
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
def _run_experts(
    x: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    chosen: np.ndarray,
    weights: np.ndarray,
    part: int,
    parts: int,
    out: np.ndarray,
) -> None:
    """out [tokens, hidden] += the weighted outputs of every ``parts``-th of the experts that have tokens."""
    tokens, hidden = x.shape
    experts, double = gate_up.shape[0], gate_up.shape[1]
    top_k = chosen.shape[1]
    rows = np.empty((tokens, hidden), np.float32)
    source = np.empty(tokens, np.int64)
    scale = np.empty(tokens, np.float32)
    both = np.empty((tokens, double), np.float32)
    inner = np.empty((tokens, double // 2), np.float32)
    result = np.empty((tokens, hidden), np.float32)
    active = 0
    for e in range(experts):
        count = 0
        for t in range(tokens):
            for k in range(top_k):
                if chosen[t, k] == e:
                    source[count] = t
                    scale[count] = weights[t, k]
                    count += 1
        if count == 0:
            continue
        active += 1
        if active % parts != part:
            continue
        for i in range(count):
            rows[i] = x[source[i]]
        dot_rows(rows, count, gate_up[e], both)
        silu_mul(both, count, inner)
        dot_rows(inner, count, down[e], result)
        for i in range(count):
            for j in range(hidden):
                out[source[i], j] += scale[i] * result[i, j]


@compiled
def _moe(
    x: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    renormalize: bool,
    out: np.ndarray,
) -> None:
    chosen = np.empty((len(x), top_k), np.int64)
    weights = np.empty((len(x), top_k), np.float32)
    _route(x, router, top_k, renormalize, chosen, weights)
    _run_experts(x, gate_up, down, chosen, weights, 0, 1, out[0])


@compiled_parallel
def _moe_parallel(
    x: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    renormalize: bool,
    out: np.ndarray,
) -> None:
    chosen = np.empty((len(x), top_k), np.int64)
    weights = np.empty((len(x), top_k), np.float32)
    _route(x, router, top_k, renormalize, chosen, weights)
    for part in numba.prange(len(out)):
        _run_experts(x, gate_up, down, chosen, weights, part, len(out), out[part])
