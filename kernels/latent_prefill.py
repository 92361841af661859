"""Attention of many prompts' new tokens over paged latents, on a GPU.

As `paged_prefill`, of one row for all heads that is key and value (see `latent_attention`): a tile of queries is of
neighbouring heads and tokens, and each row that it reads serves all of them. A running softmax (Dao 2023,
arXiv:2307.08691) keeps scores in registers. All prompts of a step are one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import kernel_varying, next_power_of_2, shared_memory_bytes, tl
from .prefill_attention import Spans

_SPANS_AT_ONCE = 64
_LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """How the kernel is cut.

    Args:
        rows: of queries, one for each head and token.
        keys: in a step.
        warps: of a program.
        stages: steps in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


TILE = Tile(64, 32, 8, 3)
"""Estimate for latents of 512: a row's mean in float32 takes half of the registers."""
_TILE_OF_LITTLE_MEMORY = Tile(32, 32, 4, 2)
_TILE_OF_FLOAT32 = Tile(16, 16, 4, 1)


def fused(
    q: Tensor, cache: Tensor, layer: int, spans: Spans, scale: float, rank: int, tile: Tile | None = None
) -> Tensor:
    """`latent_attention.reference_prefill` on a GPU; ``tile`` instead of the table's. Weights of a mean are rounded to
    the type of ``q``, and so are rows of another type."""
    tokens, heads, width = q.shape
    out = torch.empty(tokens, heads, rank, dtype=q.dtype, device=q.device)
    tile = tile or tile_for(q)
    num_tiles = sum(-(-(span.stop - span.start) * heads // tile.rows) for span in spans.each)
    if num_tiles:
        own = cache[:, layer, 0, 0]
        q = q.contiguous()
        _prefill_kernel[(num_tiles,)](
            q, own, spans.table, spans.blocks, out, len(spans.each), scale * _LOG2_E, own.stride(0), own.stride(1),
            cache.shape[4], heads, rank, max(16, next_power_of_2(rank)), width - rank,
            max(16, next_power_of_2(width - rank)), tile.rows, tile.keys, _SPANS_AT_ONCE, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return out


def tile_for(q: Tensor) -> Tile:
    """The tile for queries [tokens, heads, rank + rope_dim]: not all devices let a program have as much memory."""
    if q.dtype == torch.float32:
        return _TILE_OF_FLOAT32
    needed = (TILE.rows + (TILE.stages - 1) * TILE.keys) * q.shape[2] * q.element_size()
    return TILE if needed + 1024 <= shared_memory_bytes(q.device) else _TILE_OF_LITTLE_MEMORY


@kernel_varying("blocks", "num_spans")
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, cache, table, blocks, out, num_spans, scale, block_stride, token_stride, BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """A tile of a span's queries. ``scale`` counts in powers of two."""
    # Which span this tile is of: tiles are numbered through all of them.
    tile = tl.program_id(0)
    span = 0
    before = 0
    passed = 0
    for base in range(0, num_spans, SPANS):
        index = base + tl.arange(0, SPANS)
        there = index < num_spans
        count = tl.load(table + index * 4 + 1, mask=there, other=0).to(tl.int32)
        tiles = (count * HEADS + ROWS - 1) // ROWS
        ends = passed + tl.cumsum(tiles, axis=0)
        over = there & (ends <= tile)
        span += tl.sum(over.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(over, ends, 0), axis=0))
        passed += tl.sum(tiles, axis=0)
    start, tokens = tl.load(table + span * 4), tl.load(table + span * 4 + 1).to(tl.int32)
    context = tl.load(table + span * 4 + 2).to(tl.int32)
    block_table = blocks + tl.load(table + span * 4 + 3)
    # The last tiles are the longest: they go first.
    first = ((tokens * HEADS + ROWS - 1) // ROWS - 1 - (tile - before)) * ROWS
    row = first + tl.arange(0, ROWS)
    held = (row < tokens * HEADS)[:, None]
    position = context - tokens + row // HEADS
    dim, turned, key = tl.arange(0, RANK_BLOCK), tl.arange(0, ROPE_BLOCK), tl.arange(0, KEYS)
    place = start * HEADS + row
    source = q + place[:, None] * (RANK + ROPE)
    latent_q = tl.load(source + dim[None, :], mask=held & (dim < RANK)[None, :], other=0.0)
    rope_q = tl.load(source + RANK + turned[None, :], mask=held & (turned < ROPE)[None, :], other=0.0)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    high = context - tokens + tl.minimum((first + ROWS - 1) // HEADS + 1, tokens)
    for at in range(0, high, KEYS):
        token = at + key
        inside = token < high
        block = tl.load(block_table + token // BLOCK_TOKENS, mask=inside, other=0)
        line = cache + block * block_stride + token % BLOCK_TOKENS * token_stride
        latent = tl.load(line[:, None] + dim[None, :], mask=inside[:, None] & (dim < RANK)[None, :], other=0.0)
        shared = tl.load(
            line[:, None] + RANK + turned[None, :], mask=inside[:, None] & (turned < ROPE)[None, :], other=0.0
        )
        latent = latent.to(latent_q.dtype)
        scores = tl.dot(latent_q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(rope_q, tl.trans(shared.to(rope_q.dtype)), scores, input_precision="ieee")
        scores = tl.where(token[None, :] <= position[:, None], scores * scale, -1e30)
        highest = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weights, axis=1)
        seen = tl.dot(weights.to(latent.dtype), latent, seen * fade[:, None], input_precision="ieee")
        top = highest
    target = out + place[:, None] * RANK + dim[None, :]
    tl.store(target, (seen / total[:, None]).to(out.dtype.element_ty), mask=held & (dim < RANK)[None, :])
