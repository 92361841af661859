"""Attention of many prompts' new tokens over paged KV, on a GPU.

Tiles of queries meet tiles of keys, which are gathered through the block tables, with a running softmax (Dao 2023,
arXiv:2307.08691). All prompts of a step are one launch, whatever their lengths. Where there are few tiles of queries,
and contexts are long, each context is split over several programs, and the parts are put together by their
log-sum-exp: a short question after a long conversation has one tile for each key head, and a GPU has 132 processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import kernel, kernel_varying, next_power_of_2, num_processors, tl

_SPANS_AT_ONCE = 64
_LOG2_E = 1.4426950408889634
_LEAST_SPLIT_TOKENS = 512
_MAX_SPLITS = 32


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
    longest: int,
    step: int,
    least: int,
    scale: float,
    window: int,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of the last rows of each span over the blocks of its context, in one launch, or two.

    Args:
        q: [tokens, heads, head_dim] of a batch, rows of any stride.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim].
        layer: which layer.
        table: [spans, 4] int64, see `prefill_attention.Spans`.
        blocks: [entries] int64, likewise.
        rest: how many last rows of each span are wanted: what `prefill_attention.plan` leaves, as the kernel finds out.
        longest: tokens of the longest context of which rows are wanted.
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
    tiles = sum(-(-tokens // tile_tokens) for tokens in rest)
    seen = min(longest, window + tile_tokens) if window else longest
    splits = num_splits(kv_heads * tiles, seen, num_processors(q.device))
    parts = sums = out
    if splits > 1:
        parts = torch.empty(kv_heads, tiles, splits, rows, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(kv_heads, tiles, splits, rows, dtype=torch.float32, device=q.device)
    dim_block = max(16, next_power_of_2(head_dim))
    _paged_kernel[(kv_heads, tiles, splits)](
        q, cache[:, layer], table, blocks, q if sinks is None else sinks, out, parts, sums, len(rest),
        scale * _LOG2_E, window, q.stride(0), q.stride(1), cache.stride(0), *cache.stride()[2:5],
        _LOG2_E, sinks is not None, window > 0, splits > 1, step, least, block_tokens, group,
        head_dim, dim_block, rows, tile.keys, _SPANS_AT_ONCE, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(kv_heads, tiles, tile_tokens * group)](
            parts, sums, table, out, len(rest), window, splits, step, least, group, head_dim, dim_block, rows,
            next_power_of_2(splits), _SPANS_AT_ONCE, num_warps=1,
        )  # fmt: skip


def num_splits(programs: int, longest: int, processors: int) -> int:
    """Programs that share a context: as many as a GPU has room for, each with enough to do.

    Args:
        programs: that there would be with one for each context.
        longest: tokens that one of them would see.
        processors: of the GPU.
    """
    return max(1, min(processors // programs, longest // _LEAST_SPLIT_TOKENS, _MAX_SPLITS))


@kernel
def _left(first, tokens, context, window, STEP: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a span: its first row, and number of rows, that `plan` leaves to the kernel."""
    taken = tokens * 0
    if STEP > 0:
        fresh = (tokens >= LEAST) & (tokens == context) & ((window == 0) | (window >= tokens))
        taken = tl.where(fresh, tokens - tokens % STEP, 0)
    return first + taken, tokens - taken


@kernel
def _find(  # type: ignore[no-untyped-def]
    tile, table, num_spans, window, STEP: tl.constexpr, LEAST: tl.constexpr, TILE_TOKENS: tl.constexpr,
    SPANS: tl.constexpr,
):  # fmt: skip
    """Which span a tile is of, its first row and number of rows, those of its context, and which of its rows is the
    tile's first. Tiles are numbered through all spans."""
    span = 0
    before = 0
    passed = 0
    for base in range(0, num_spans, SPANS):
        index = base + tl.arange(0, SPANS)
        there = index < num_spans
        tokens = tl.load(table + index * 4 + 1, mask=there, other=0).to(tl.int32)
        context = tl.load(table + index * 4 + 2, mask=there, other=0).to(tl.int32)
        _, left = _left(tokens, tokens, context, window, STEP, LEAST)
        tiles = (left + TILE_TOKENS - 1) // TILE_TOKENS
        ends = passed + tl.cumsum(tiles, axis=0)
        over = there & (ends <= tile)
        span += tl.sum(over.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(over, ends, 0), axis=0))
        passed += tl.sum(tiles, axis=0)
    first_row, tokens = tl.load(table + span * 4).to(tl.int32), tl.load(table + span * 4 + 1).to(tl.int32)
    context = tl.load(table + span * 4 + 2).to(tl.int32)
    start, tokens = _left(first_row, tokens, context, window, STEP, LEAST)
    # The last tiles are the longest: they go first.
    first = ((tokens + TILE_TOKENS - 1) // TILE_TOKENS - 1 - (tile - before)) * TILE_TOKENS
    return span, start, tokens, context, first


@kernel_varying("blocks", "num_spans")
def _paged_kernel(  # type: ignore[no-untyped-def]
    q, cache, table, blocks, sinks, out, parts, sums, num_spans, scale, window, q_stride, q_head_stride, block_stride,
    kv_stride, head_stride, token_stride, LOG2_E: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT: tl.constexpr, STEP: tl.constexpr, LEAST: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """A key head and a tile of a span's tokens, or a part of the context of these. ``scale`` counts in powers of
    two."""
    head = tl.program_id(0)
    tile_tokens: tl.constexpr = ROWS // GROUP
    span, start, tokens, context, first = _find(
        tl.program_id(1), table, num_spans, window, STEP, LEAST, tile_tokens, SPANS
    )
    block_table = blocks + tl.load(table + span * 4 + 3)
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
        sink = tl.load(sinks + query_head, mask=row_held, other=0.0).to(tl.float32) * LOG2_E
        counts = tl.program_id(2) == 0  # once
        top = tl.where(counts, sink, top)
        total += tl.where(counts, 1.0, 0.0)
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
    masked = plain + tl.maximum(high_all - plain, 0) // KEYS * KEYS
    begin = low
    end = high
    if SPLIT:  # whole tiles for each
        share = tl.cdiv(tl.cdiv(high - low, tl.num_programs(2)), KEYS) * KEYS
        begin = low + tl.program_id(2) * share
        end = tl.minimum(begin + share, high)
    if WINDOW:
        top, total, acc = _attend_tiles(
            query, position, top, total, acc, keys, block_table, begin, tl.minimum(plain, end), high, scale, window,
            block_stride, kv_stride, token_stride, True, WINDOW, BLOCK_TOKENS, HEAD_DIM, DIM, KEYS,
        )  # fmt: skip
    top, total, acc = _attend_tiles(
        query, position, top, total, acc, keys, block_table, tl.maximum(plain, begin), tl.minimum(masked, end), high,
        scale, window, block_stride, kv_stride, token_stride, False, WINDOW, BLOCK_TOKENS, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    top, total, acc = _attend_tiles(
        query, position, top, total, acc, keys, block_table, tl.maximum(masked, begin), end, high, scale, window,
        block_stride, kv_stride, token_stride, True, WINDOW, BLOCK_TOKENS, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    if SPLIT:
        part = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        part = part * ROWS + row
        # A part of which a row sees nothing weighs nothing.
        divisor = tl.where(total > 0, total, 1.0)
        tl.store(sums + part, tl.where(total > 0, top + tl.log2(divisor), float("-inf")))
        tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], acc / divisor[:, None], mask=held)
    else:
        target = out + (place * tl.num_programs(0) * GROUP + query_head)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=held)


@kernel_varying("num_spans", "splits")
def _join_kernel(  # type: ignore[no-untyped-def]
    parts, sums, table, out, num_spans, window, splits, STEP: tl.constexpr, LEAST: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """A row of a tile, from the parts of its context."""
    head, row = tl.program_id(0), tl.program_id(2)
    tile_tokens: tl.constexpr = ROWS // GROUP
    _, start, tokens, _, first = _find(tl.program_id(1), table, num_spans, window, STEP, LEAST, tile_tokens, SPANS)
    token = first + row // GROUP
    if token < tokens:
        split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM)
        there = split < splits
        part = ((head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * splits + split) * ROWS + row
        logs = tl.load(sums + part, mask=there, other=float("-inf"))
        weights = tl.exp2(logs - tl.max(logs, axis=0))
        held = (there & (logs > float("-inf")))[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=held, other=0.0)
        value = tl.sum(values * weights[:, None], axis=0) / tl.sum(weights, axis=0)
        place = ((start + token).to(tl.int64) * tl.num_programs(0) + head) * GROUP + row % GROUP
        tl.store(out + place * HEAD_DIM + dim, value.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


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
