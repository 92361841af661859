"""Attention of one new token a sequence over its paged KV (Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled, compiled_parallel, num_threads, prange
from .exponential import exp_inplace
from .on_gpu import follow, follows, kernel_varying, next_power_of_2, num_processors, tl

_KEY_TILE = 64
_MIN_SPLIT_TOKENS = 128
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 6
_NEVER = np.float32(-1e30)


def reference(
    q: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each sequence's last token attends to its whole context.

    Args:
        q: [sequences, heads, head_dim].
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim] of any dtype; heads are grouped over kv_heads.
        layer: which layer.
        block_tables: [sequences, max_blocks] int64, block numbers in order; what lies before the window or beyond the
            context is ignored.
        context_lens: [sequences] int64, tokens in the cache, the new one included.
        scale: of the scores.
        window: tokens that a token sees, itself included; 0: all.
        sinks: [heads] logits beside those of the tokens, with no value of their own (Xiao et al. 2023,
            arXiv:2309.17453), or None.

    Returns:
        [sequences, heads, head_dim], dtype of ``q``.
    """
    out = torch.empty_like(q)
    kv_heads, block_tokens, head_dim = cache.shape[3:]
    for i, length in enumerate(context_lens.tolist()):
        first = max(length - window, 0) if window else 0
        skipped = first // block_tokens
        blocks = block_tables[i, skipped : -(-length // block_tokens)]
        kv = cache[blocks, layer].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        kv = kv[:, :, first - skipped * block_tokens : length - skipped * block_tokens]
        k, v = kv.to(torch.float32)
        grouped = q[i].float().view(kv_heads, -1, head_dim)
        logits = grouped @ k.transpose(1, 2) * scale
        if sinks is not None:
            logits = torch.cat((logits, sinks.float().view(kv_heads, -1, 1)), dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : k.shape[1]]
        out[i] = (weights @ v).view(-1, head_dim).to(q.dtype)
    return out


def native(
    q: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference` for float32 on a CPU."""
    out = np.empty(q.shape, np.float32)
    sink_array = np.empty(0, np.float32) if sinks is None else sinks.numpy()
    tables, lengths = block_tables.numpy(), context_lens.numpy()
    arrays = q.numpy(), cache.numpy(), layer, tables, lengths, scale, window, sink_array, out
    if len(q) > 1 and num_threads() > 1:
        _decode_parallel(*arrays, num_threads())
    else:
        attend_rows(*arrays)
    return torch.from_numpy(out)


def fused(
    q: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference` on a GPU; an empty context gives zeros.

    When there are few sequences, each context is split over several programs, and the parts are put together by their
    log-sum-exp (Dao et al. 2023, flash decoding).
    """
    sequences, heads, head_dim = q.shape
    kv_heads, block_tokens = cache.shape[3], cache.shape[4]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not sequences:
        return out
    longest = block_tables.shape[1] * block_tokens
    if window:
        longest = min(longest, window)
    programs = sequences * kv_heads
    splits = min(-(-_PROGRAMS_PER_PROCESSOR * num_processors(q.device) // programs), -(-longest // _MIN_SPLIT_TOKENS))
    splits = max(1, min(splits, _MAX_SPLITS))
    parts = out
    if splits > 1:
        parts = torch.empty(sequences, heads, splits, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    dim_block = max(16, next_power_of_2(head_dim))
    # All heads of a sequence before the next one's: where long contexts come first, short ones fill the last gaps.
    _decode_kernel[(kv_heads, sequences, splits)](
        q, cache[:, layer], block_tables, context_lens, q if sinks is None else sinks, parts, sums, scale, window,
        q.stride(0), q.stride(1), block_tables.stride(0), cache.stride(0), *cache.stride()[2:5], splits,
        sinks is not None, block_tokens, heads // kv_heads, head_dim, dim_block,
        max(16, next_power_of_2(heads // kv_heads)), _KEY_TILE, num_warps=4, num_stages=3, **follows(q.device),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(sequences, heads)](
            parts, sums, out, splits, head_dim, next_power_of_2(splits), dim_block, **follows(q.device)
        )
    return out


@kernel_varying("table_stride", "splits")
def _decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, block_tables, context_lens, sinks, parts, sums, scale, window, q_stride, q_head_stride,
    table_stride, block_stride, kv_stride, head_stride, token_stride, splits, SINKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    follow(FOLLOW)
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(context_lens + sequence).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    # Whole tiles for each split.
    share = tl.cdiv(tl.cdiv(length - first, splits), TILE) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    row, dim, key = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    heads = tl.num_programs(0) * GROUP
    held = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        q + sequence * q_stride + (head * GROUP + row)[:, None] * q_head_stride + dim[None, :], mask=held, other=0.0
    )
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:  # they count once
        sink = tl.load(sinks + head * GROUP + row, mask=row < GROUP, other=0.0).to(tl.float32)
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)
    sum_of_values = tl.zeros((ROWS, DIM), tl.float32)
    for at in range(begin, end, TILE):
        token = at + key
        inside = token < end
        block = tl.load(block_tables + sequence * table_stride + token // BLOCK_TOKENS, mask=inside, other=0)
        place = cache + block * block_stride + head * head_stride + token % BLOCK_TOKENS * token_stride
        loaded = inside[:, None] & (dim < HEAD_DIM)[None, :]
        keys = tl.load(place[:, None] + dim[None, :], mask=loaded, other=0.0).to(query.dtype)
        values = tl.load(place[:, None] + kv_stride + dim[None, :], mask=loaded, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -1e30)
        highest = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - highest[:, None])
        fade = tl.exp(top - highest)
        total = total * fade + tl.sum(weights, axis=1)
        sum_of_values = sum_of_values * fade[:, None]
        sum_of_values += tl.dot(weights.to(query.dtype), values, input_precision="ieee")
        top = highest
    place = (sequence * heads + head * GROUP + row) * splits + split
    # A split without tokens weighs nothing: its sum is e to the minus infinity.
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(sums + place, tl.where(total > 0, top + tl.log(divisor), float("-inf")), mask=row < GROUP)
    normed = sum_of_values / divisor[:, None]
    tl.store(parts + place[:, None] * HEAD_DIM + dim[None, :], normed.to(parts.dtype.element_ty), mask=held)


@kernel_varying("splits")
def _combine_kernel(  # type: ignore[no-untyped-def]
    parts, sums, out, splits, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, FOLLOW: tl.constexpr
):
    follow(FOLLOW)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM)
    there = split < splits
    logs = tl.load(sums + row * splits + split, mask=there, other=float("-inf"))
    top = tl.max(logs, axis=0)
    weights = tl.exp(logs - tl.where(top == float("-inf"), 0.0, top))
    held = there[:, None] & (dim < HEAD_DIM)[None, :]
    values = tl.load(parts + (row * splits + split)[:, None] * HEAD_DIM + dim[None, :], mask=held, other=0.0)
    total = tl.sum(weights, axis=0)
    value = tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dim, value.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


@compiled_parallel
def _decode_parallel(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    scale: float,
    window: int,
    sinks: np.ndarray,
    out: np.ndarray,
    parts: int,
) -> None:
    for part in prange(parts):
        start, stop = len(q) * part // parts, len(q) * (part + 1) // parts
        if start < stop:
            tables, lengths = block_tables[start:stop], context_lens[start:stop]
            attend_rows(q[start:stop], cache, layer, tables, lengths, scale, window, sinks, out[start:stop])


@compiled
def attend_rows(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    scale: float,
    window: int,
    sinks: np.ndarray,
    out: np.ndarray,
) -> None:
    """`native` over arrays, by one thread; ``sinks`` [heads], or empty for none."""
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
                    sink = sinks[h * group + start + g] if len(sinks) > 0 else _NEVER
                    _softmax(scores[g, first:length], np.float32(scale), sink, bits)
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
def _softmax(x: np.ndarray, scale: np.float32, sink: np.float32, bits: np.ndarray) -> None:
    """x ← softmax(scale · x) with one more logit, whose share is left out; scale > 0."""
    top = sink / scale
    for t in range(len(x)):
        top = max(top, x[t])
    for t in range(len(x)):
        x[t] = (x[t] - top) * scale
    exp_inplace(x, bits)
    total = np.float32(0) if sink == _NEVER else np.exp(sink - top * scale)
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
