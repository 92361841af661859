"""Attention of many prompts' new tokens over paged KV, on a GPU.

Tiles of queries meet tiles of keys, which are gathered through the block tables, with a running softmax (Dao 2023,
arXiv:2307.08691). All prompts of a step are one launch, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import kernel, kernel_varying, next_power_of_2, tl

_SPANS_AT_ONCE = 64
_LOG2_E = 1.4426950408889634


class _Tile(NamedTuple):
    """How the paged kernel is cut: rows are tokens × the query heads that share a key head."""

    rows: int
    keys: int
    warps: int
    stages: int


_TILE = _Tile(rows=128, keys=64, warps=8, stages=3)
_TILE_OF_LARGE_HEADS = _Tile(rows=64, keys=32, warps=8, stages=2)
"""More than 128 dimensions a head."""
_TILE_OF_FLOAT32 = _Tile(rows=32, keys=16, warps=8, stages=2)


def attend(
    q: Tensor,
    cache: Tensor,
    layer: int,
    table: Tensor,
    blocks: Tensor,
    rest: Sequence[int],
    step: int,
    least: int,
    scale: float,
    window: int,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of the last rows of each span over the blocks of its context, in one launch.

    Args:
        q: [tokens, heads, head_dim] of a batch, rows of any stride.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim].
        layer: which layer.
        table: [spans, 4] int64, see `prefill_attention.Spans`.
        blocks: [entries] int64, likewise.
        rest: how many last rows of each span are wanted: what `prefill_attention.plan` leaves, as the kernel finds out.
        step: as `prefill_attention.plan`'s.
        least: as `prefill_attention.plan`'s.
        scale: of the scores.
        window: tokens that a token sees, itself included; 0: all.
        sinks: [heads] or None.
        out: [tokens, heads, head_dim], contiguous; these rows are written.
    """
    heads, head_dim = q.shape[1:]
    kv_heads, block_tokens = cache.shape[3], cache.shape[4]
    group = heads // kv_heads
    tile = _TILE_OF_FLOAT32 if q.dtype == torch.float32 else _TILE if head_dim <= 128 else _TILE_OF_LARGE_HEADS
    rows = max(tile.rows, next_power_of_2(group))
    tile_tokens = rows // group
    _paged_kernel[(kv_heads, sum(-(-tokens // tile_tokens) for tokens in rest))](
        q, cache[:, layer], table, blocks, q if sinks is None else sinks, out, len(rest),
        scale * _LOG2_E, window, q.stride(0), q.stride(1), cache.stride(0), *cache.stride()[2:5],
        _LOG2_E, sinks is not None, window > 0, step, least, block_tokens, group,
        head_dim, max(16, next_power_of_2(head_dim)), rows, tile.keys, _SPANS_AT_ONCE, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


@kernel
def _left(first, tokens, context, window, STEP: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a span: its first row, and number of rows, that `plan` leaves to the kernel."""
    taken = tokens * 0
    if STEP > 0:
        fresh = (tokens >= LEAST) & (tokens == context) & ((window == 0) | (window >= tokens))
        taken = tl.where(fresh, tokens - tokens % STEP, 0)
    return first + taken, tokens - taken


@kernel_varying("blocks", "num_spans")
def _paged_kernel(  # type: ignore[no-untyped-def]
    q, cache, table, blocks, sinks, out, num_spans, scale, window, q_stride, q_head_stride, block_stride,
    kv_stride, head_stride, token_stride, LOG2_E: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    STEP: tl.constexpr, LEAST: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """A key head and a tile of a span's tokens. ``scale`` counts in powers of two."""
    head = tl.program_id(0)
    tile_tokens: tl.constexpr = ROWS // GROUP
    # Which span this tile is of: tiles are numbered through all of them.
    tile = tl.program_id(1)
    span = 0
    before = 0
    passed = 0
    for base in range(0, num_spans, SPANS):
        index = base + tl.arange(0, SPANS)
        there = index < num_spans
        tokens = tl.load(table + index * 4 + 1, mask=there, other=0).to(tl.int32)
        context = tl.load(table + index * 4 + 2, mask=there, other=0).to(tl.int32)
        _, left = _left(tokens, tokens, context, window, STEP, LEAST)
        tiles = (left + tile_tokens - 1) // tile_tokens
        ends = passed + tl.cumsum(tiles, axis=0)
        over = there & (ends <= tile)
        span += tl.sum(over.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(over, ends, 0), axis=0))
        passed += tl.sum(tiles, axis=0)
    first_row, tokens = tl.load(table + span * 4).to(tl.int32), tl.load(table + span * 4 + 1).to(tl.int32)
    context = tl.load(table + span * 4 + 2).to(tl.int32)
    start, tokens = _left(first_row, tokens, context, window, STEP, LEAST)
    block_table = blocks + tl.load(table + span * 4 + 3)
    # The last tiles are the longest: they go first.
    first = ((tokens + tile_tokens - 1) // tile_tokens - 1 - (tile - before)) * tile_tokens
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    token, member = first + row // GROUP, row % GROUP
    row_held = (row < tile_tokens * GROUP) & (token < tokens)
    held = row_held[:, None] & (dim < HEAD_DIM)[None, :]
    place = (start + token).to(tl.int64)
    query_head = head * GROUP + member
    query = tl.load(q + (place * q_stride + query_head * q_head_stride)[:, None] + dim[None, :], mask=held, other=0.0)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        top = tl.load(sinks + query_head, mask=row_held, other=0.0).to(tl.float32) * LOG2_E
        total += 1.0
    acc = tl.zeros((ROWS, DIM), tl.float32)
    keys = cache + head * head_stride
    before = context - tokens
    position = before + token
    # Keys in [low, high) are seen by some token of the tile, those in [low_all, high_all) by all.
    high = before + tl.minimum(first + tile_tokens, tokens)
    high_all = before + first + 1
    low = 0
    plain = 0
    if WINDOW:
        low = tl.maximum(high_all - window, 0)
        low_all = tl.maximum(high - window, low)
        plain = low + tl.cdiv(low_all - low, KEYS) * KEYS
        top, total, acc = _attend_tiles(
            query, position, top, total, acc, keys, block_table, low, tl.minimum(plain, high), high, scale, window,
            block_stride, kv_stride, token_stride, True, WINDOW, BLOCK_TOKENS, HEAD_DIM, DIM, KEYS,
        )  # fmt: skip
    masked = plain + tl.maximum(high_all - plain, 0) // KEYS * KEYS
    top, total, acc = _attend_tiles(
        query, position, top, total, acc, keys, block_table, plain, masked, high, scale, window,
        block_stride, kv_stride, token_stride, False, WINDOW, BLOCK_TOKENS, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    top, total, acc = _attend_tiles(
        query, position, top, total, acc, keys, block_table, masked, high, high, scale, window,
        block_stride, kv_stride, token_stride, True, WINDOW, BLOCK_TOKENS, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    target = out + (place * tl.num_programs(0) * GROUP + query_head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=held)


@kernel
def _attend_tiles(  # type: ignore[no-untyped-def]
    query, position, top, total, acc, keys, block_table, begin, end, high, scale, window, block_stride, kv_stride,
    token_stride, MASK: tl.constexpr, WINDOW: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys ``begin`` … ``end``, of which those from ``high`` on are not there."""
    key, dim = tl.arange(0, KEYS), tl.arange(0, DIM)
    for at in range(begin, end, KEYS):
        token = at + key
        inside = token < high
        block = tl.load(block_table + token // BLOCK_TOKENS, mask=inside, other=0)
        place = keys + block * block_stride + token % BLOCK_TOKENS * token_stride
        loaded = inside[:, None] & (dim < HEAD_DIM)[None, :]
        key_tile = tl.load(place[:, None] + dim[None, :], mask=loaded, other=0.0).to(query.dtype)
        value_tile = tl.load(place[:, None] + kv_stride + dim[None, :], mask=loaded, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key_tile), input_precision="ieee")
        if MASK:
            seen = token[None, :] <= position[:, None]
            if WINDOW:
                seen &= token[None, :] > position[:, None] - window
            # Scaled first: fused with the subtraction below, the scaling of a row without any key would not cancel.
            scores = tl.where(seen, scores * scale, -1e30)
            highest = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - highest[:, None])
        else:
            highest = tl.maximum(top, tl.max(scores, axis=1) * scale)
            weights = tl.exp2(scores * scale - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(query.dtype), value_tile, acc * fade[:, None], input_precision="ieee")
        top = highest
    return top, total, acc
