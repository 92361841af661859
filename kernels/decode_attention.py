"""Attention of one new token a sequence over its paged KV (Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled, compiled_parallel, num_threads, prange
from .exponential import exp_inplace


def reference(
    q: Tensor, cache: Tensor, layer: int, block_tables: Tensor, context_lens: Tensor, scale: float, window: int
) -> Tensor:
    """Each sequence's last token attends to its whole context.

    Args:
        q: [sequences, heads, head_dim].
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim]; heads are grouped over kv_heads.
        layer: which layer.
        block_tables: [sequences, max_blocks] int64, block numbers in order; the rest is ignored.
        context_lens: [sequences] int64, tokens in the cache, the new one included.
        scale: of the scores.
        window: tokens that a token sees, itself included; 0: all.

    Returns:
        [sequences, heads, head_dim], dtype of ``q``.
    """
    out = torch.empty_like(q)
    kv_heads, block_tokens, head_dim = cache.shape[3:]
    for i, length in enumerate(context_lens.tolist()):
        blocks = block_tables[i, : -(-length // block_tokens)]
        kv = cache[blocks, layer].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :length]
        if window:
            kv = kv[:, :, -window:]
        k, v = kv.to(torch.float32)
        grouped = q[i].float().view(kv_heads, -1, head_dim)
        weights = torch.softmax(grouped @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).view(-1, head_dim).to(q.dtype)
    return out


def native(
    q: Tensor, cache: Tensor, layer: int, block_tables: Tensor, context_lens: Tensor, scale: float, window: int
) -> Tensor:
    """`reference` for float32 on a CPU."""
    out = np.empty(q.shape, np.float32)
    arrays = q.numpy(), cache.numpy(), layer, block_tables.numpy(), context_lens.numpy(), scale, window, out
    if len(q) > 1 and num_threads() > 1:
        _decode_parallel(*arrays, num_threads())
    else:
        attend_rows(*arrays)
    return torch.from_numpy(out)


@compiled_parallel
def _decode_parallel(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    scale: float,
    window: int,
    out: np.ndarray,
    parts: int,
) -> None:
    for part in prange(parts):
        start, stop = len(q) * part // parts, len(q) * (part + 1) // parts
        if start < stop:
            tables, lengths = block_tables[start:stop], context_lens[start:stop]
            attend_rows(q[start:stop], cache, layer, tables, lengths, scale, window, out[start:stop])


@compiled
def attend_rows(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    scale: float,
    window: int,
    out: np.ndarray,
) -> None:
    """`native` over arrays, by one thread."""
    sequences, heads, _ = q.shape
    kv_heads, block_tokens = cache.shape[3], cache.shape[4]
    group = heads // kv_heads
    longest = max(context_lens.max(), 1)
    scores = np.empty((4, longest), np.float32)
    bits = np.empty(longest, np.int32)
    for s in range(sequences):
        length = context_lens[s]
        first = max(0, length - window) if window > 0 else 0
        for h in range(kv_heads):
            # Four heads at a time share each key and value that is loaded.
            for start in range(0, group, 4):
                width = min(4, group - start)
                rows = q[s, h * group + start : h * group + start + width]
                to = out[s, h * group + start : h * group + start + width]
                for block in range(first // block_tokens, (length + block_tokens - 1) // block_tokens):
                    at = block * block_tokens
                    low, high = max(first - at, 0), min(block_tokens, length - at)
                    _dot_block(rows, cache[block_tables[s, block], layer, 0, h], low, high, at, scores)
                for g in range(width):
                    _softmax(scores[g, first:length], np.float32(scale), bits)
                to[:] = 0
                for block in range(first // block_tokens, (length + block_tokens - 1) // block_tokens):
                    at = block * block_tokens
                    low, high = max(first - at, 0), min(block_tokens, length - at)
                    _sum_block(scores, cache[block_tables[s, block], layer, 1, h], low, high, at, to)


@compiled
def _dot_block(q: np.ndarray, keys: np.ndarray, low: int, high: int, at: int, scores: np.ndarray) -> None:
    """scores[g, at + t] = q[g] · keys[t] for low ≤ t < high."""
    width, head_dim = q.shape
    if width == 4:
        for t in range(low, high):
            d0 = np.float32(0)
            d1 = np.float32(0)
            d2 = np.float32(0)
            d3 = np.float32(0)
            for i in range(head_dim):
                k = keys[t, i]
                d0 += q[0, i] * k
                d1 += q[1, i] * k
                d2 += q[2, i] * k
                d3 += q[3, i] * k
            scores[0, at + t] = d0
            scores[1, at + t] = d1
            scores[2, at + t] = d2
            scores[3, at + t] = d3
        return
    for g in range(width):
        for t in range(low, high):
            dot = np.float32(0)
            for i in range(head_dim):
                dot += q[g, i] * keys[t, i]
            scores[g, at + t] = dot


@compiled
def _softmax(x: np.ndarray, scale: np.float32, bits: np.ndarray) -> None:
    """x ← softmax(scale · x), scale > 0."""
    top = x[0]
    for t in range(len(x)):
        top = max(top, x[t])
    for t in range(len(x)):
        x[t] = (x[t] - top) * scale
    exp_inplace(x, bits)
    total = np.float32(0)
    for t in range(len(x)):
        total += x[t]
    inverse = np.float32(1) / total
    for t in range(len(x)):
        x[t] *= inverse


@compiled
def _sum_block(weights: np.ndarray, values: np.ndarray, low: int, high: int, at: int, to: np.ndarray) -> None:
    """to[g] += Σₜ weights[g, at + t] · values[t] over low ≤ t < high."""
    width, head_dim = to.shape
    if width == 4:
        to0, to1, to2, to3 = to[0], to[1], to[2], to[3]
        whole = high - (high - low) % 2
        for t in range(low, whole, 2):
            m, n = at + t, at + t + 1
            a0, a1, a2, a3 = weights[0, m], weights[1, m], weights[2, m], weights[3, m]
            b0, b1, b2, b3 = weights[0, n], weights[1, n], weights[2, n], weights[3, n]
            for i in range(head_dim):
                v, w = values[t, i], values[t + 1, i]
                to0[i] += a0 * v + b0 * w
                to1[i] += a1 * v + b1 * w
                to2[i] += a2 * v + b2 * w
                to3[i] += a3 * v + b3 * w
        if whole < high:
            for g in range(4):
                for i in range(head_dim):
                    to[g, i] += weights[g, at + whole] * values[whole, i]
        return
    whole = high - (high - low) % 4
    for g in range(width):
        for t in range(low, whole, 4):
            w0 = weights[g, at + t]
            w1 = weights[g, at + t + 1]
            w2 = weights[g, at + t + 2]
            w3 = weights[g, at + t + 3]
            for i in range(head_dim):
                to[g, i] += w0 * values[t, i] + w1 * values[t + 1, i] + w2 * values[t + 2, i] + w3 * values[t + 3, i]
        for t in range(whole, high):
            w0 = weights[g, at + t]
            for i in range(head_dim):
                to[g, i] += w0 * values[t, i]
