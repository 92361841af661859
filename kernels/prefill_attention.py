"""Attention of several new tokens of one sequence over its paged KV, which already holds those tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled, compiled_parallel, num_threads, prange
from .exponential import exp_inplace
from .linear import dot_rows

_QUERY_TILE = 32
_KEY_TILE = 128
_NEVER = np.float32(-1e30)


def reference(
    q: Tensor, cache: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, window: int
) -> Tensor:
    """The last ``len(q)`` tokens of a context attend to what precedes them, and to themselves.

    Args:
        q: [tokens, heads, head_dim], the context's last tokens.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim].
        layer: which layer.
        block_table: [blocks of the context] int64, in order.
        context_len: tokens in the cache, the new ones included.
        scale: of the scores.
        window: tokens that a token sees, itself included; 0: all.

    Returns:
        [tokens, heads, head_dim], dtype of ``q``.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = cache.shape[3]
    mask = _causal_mask(len(q), context_len, window, q.device)
    kv = cache[block_table, layer].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :context_len]
    kv = kv.to(q.dtype)
    if not q.is_cuda:  # there the fused kernel wants as many key heads as query heads
        kv = kv.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1, -1).reshape(2, heads, context_len, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        kv[0].unsqueeze(0),
        kv[1].unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.is_cuda and heads != kv_heads,
    )
    return out[0].transpose(0, 1)


def native(
    q: Tensor, cache: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, window: int
) -> Tensor:
    """`reference` for float32 on a CPU: tiles of queries against tiles of keys with a running softmax (Dao et al. 2022,
    arXiv:2205.14135), read straight from the blocks."""
    out = np.empty(q.shape, np.float32)
    arrays = q.numpy(), cache.numpy(), layer, block_table.numpy(), context_len, scale, window, out
    if num_threads() == 1:
        for item in range(_num_items(q.shape[0], cache.shape[3])):
            _tile(*arrays, item)
    else:
        _tiles(*arrays, _num_items(q.shape[0], cache.shape[3]))
    return torch.from_numpy(out)


def _num_items(tokens: int, kv_heads: int) -> int:
    return kv_heads * -(-tokens // _QUERY_TILE)


@compiled_parallel
def _tiles(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_table: np.ndarray,
    context_len: int,
    scale: float,
    window: int,
    out: np.ndarray,
    items: int,
) -> None:
    for item in prange(items):
        # Neighbours in the loop go to one thread: spread the late, long tiles.
        spread = item // 2 if item % 2 == 0 else items - 1 - item // 2
        _tile(q, cache, layer, block_table, context_len, scale, window, out, spread)


@compiled
def _tile(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_table: np.ndarray,
    context_len: int,
    scale: float,
    window: int,
    out: np.ndarray,
    item: int,
) -> None:
    """One tile of queries, of all heads that share a key head."""
    tokens, heads, head_dim = q.shape
    kv_heads, block_tokens = cache.shape[3], cache.shape[4]
    group = heads // kv_heads
    h = item % kv_heads
    start = item // kv_heads * _QUERY_TILE
    stop = min(start + _QUERY_TILE, tokens)
    first_position = context_len - tokens
    rows = (stop - start) * group
    queries = np.empty((rows, head_dim), np.float32)
    for t in range(start, stop):
        for g in range(group):
            for i in range(head_dim):
                queries[(t - start) * group + g, i] = q[t, h * group + g, i] * np.float32(scale)
    key_memory = np.empty(_KEY_TILE * head_dim, np.float32)
    value_memory = np.empty(head_dim * _KEY_TILE, np.float32)
    score_memory = np.empty(rows * _KEY_TILE, np.float32)
    part = np.empty((rows, head_dim), np.float32)
    total = np.zeros((rows, head_dim), np.float32)
    top = np.full(rows, _NEVER, np.float32)
    norm = np.zeros(rows, np.float32)
    bits = np.empty(_KEY_TILE, np.int32)
    low = max(0, first_position + start - window + 1) if window > 0 else 0
    low -= low % _KEY_TILE
    for at in range(low, first_position + stop, _KEY_TILE):
        count = min(_KEY_TILE, first_position + stop - at)
        # Whole vectors; what lies beyond the context is masked below.
        width = (count + 15) // 16 * 16
        keys = key_memory[: width * head_dim].reshape(width, head_dim)
        values = value_memory[: head_dim * width].reshape(head_dim, width)
        scores = score_memory[: rows * width].reshape(rows, width)
        for t in range(count):
            block, offset = block_table[(at + t) // block_tokens], (at + t) % block_tokens
            for i in range(head_dim):
                keys[t, i] = cache[block, layer, 0, h, offset, i]
                values[i, t] = cache[block, layer, 1, h, offset, i]
        for t in range(count, width):
            for i in range(head_dim):
                keys[t, i] = 0
                values[i, t] = 0
        dot_rows(queries, keys, scores)
        for r in range(rows):
            position = first_position + start + r // group
            row = scores[r]
            for t in range(max(0, position + 1 - at), width):
                row[t] = _NEVER
            if window > 0:
                for t in range(min(max(0, position - window + 1 - at), width)):
                    row[t] = _NEVER
            highest = top[r]
            for t in range(width):
                highest = max(highest, row[t])
            for t in range(width):
                row[t] -= highest
            exp_inplace(row, bits)
            fade = np.float32(np.exp(top[r] - highest))
            added = np.float32(0)
            for t in range(width):
                added += row[t]
            norm[r] = norm[r] * fade + added
            top[r] = highest
            for i in range(head_dim):
                total[r, i] *= fade
        dot_rows(scores, values, part)
        for r in range(rows):
            for i in range(head_dim):
                total[r, i] += part[r, i]
    for r in range(rows):
        for i in range(head_dim):
            out[start + r // group, h * group + r % group, i] = total[r, i] / norm[r]


def _causal_mask(num_new: int, context_len: int, window: int, device: torch.device) -> Tensor | None:
    """Which of a context's tokens its last ``num_new`` see: [num_new, context_len] bool, or None for plain causal."""
    if num_new == context_len and (window == 0 or window >= context_len):
        return None
    query = torch.arange(context_len - num_new, context_len, device=device).unsqueeze(1)
    key = torch.arange(context_len, device=device)
    mask = key <= query
    if window:
        mask &= key > query - window
    return mask
