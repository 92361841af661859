"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434), over a cache of compressed keys and values.

The cache has one row a token and layer, for all heads: a *latent*, from which each head's key and value are made by
matrices of its own, and one rotated key that the heads share. Queries come *absorbed*: multiplied with the matrix that
would make keys of latents, so that they are compared with the latents themselves; what a head sees is a mean of
latents, which its other matrix turns into values when it is done. So a row is read once for all heads, and no key or
value is ever written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import kernel_varying, next_power_of_2, num_processors, tl
from .prefill_attention import Spans

_FP8_LIMIT = 448.0
"""The largest float8_e4m3fn; what is larger becomes that, not NaN."""
_MAX_ELEMENTS = 1 << 25
"""Of what the references hold at a time: scores, or rows of several sequences."""
_HEADS = 16
_TOKENS = 32
_MAX_SPLITS = 32


class LatentNorm(NamedTuple):
    """The norm of a latent: weight [rank]."""

    weight: Tensor
    eps: float


def reference_write(
    q: Tensor,
    rows: Tensor,
    norm: LatentNorm,
    interleaved: bool,
    cos_sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    layer: int,
    slots: Tensor,
) -> Tensor:
    """Normalise latents, rotate queries and the shared key, write latents and key into the cache.

    Args:
        q: [tokens, heads, rope_dim], the part of the queries that is rotated.
        rows: [tokens, rank + rope_dim]: latents, then the key that all heads share.
        norm: of the latents.
        interleaved: whether the two numbers that are rotated together are neighbours, or half the width apart. Rotated
            ones lie half the width apart, in queries and key alike, which their products do not see.
        cos_sin: [max positions, rope_dim] float32, cosines, then sines.
        positions: [tokens] int64.
        cache: [blocks, layers, 1, 1, block_tokens, rank + rope_dim], written at ``layer``; float8_e4m3fn is written
            unscaled, ±448 at most.
        layer: which layer this is.
        slots: [tokens] int64, block · block_tokens + offset in the block, all different.

    Returns:
        rotated queries, [tokens, heads, rope_dim], dtype of ``q``.
    """
    block_tokens, rank = cache.shape[4], len(norm.weight)
    latent, key = rows[:, :rank].float(), rows[:, rank:]
    scaled = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + norm.eps)
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    row = torch.cat((norm.weight * scaled.to(rows.dtype), _rotate(key, cos, sin, interleaved)), dim=-1)
    if cache.dtype == torch.float8_e4m3fn:
        row = row.float().clamp(-_FP8_LIMIT, _FP8_LIMIT)
    cache[slots // block_tokens, layer, 0, 0, slots % block_tokens] = row.to(cache.dtype)
    return _rotate(q, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x.float()
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def reference_decode(
    q: Tensor, cache: Tensor, layer: int, block_tables: Tensor, context_lens: Tensor, scale: float, rank: int
) -> Tensor:
    """Each sequence's last token attends to its whole context.

    Args:
        q: [sequences, heads, rank + rope_dim], absorbed and rotated.
        cache: [blocks, layers, 1, 1, block_tokens, rank + rope_dim] of any dtype.
        layer: which layer.
        block_tables: [sequences, max_blocks] int64, block numbers in order; what lies beyond the context is ignored.
        context_lens: [sequences] int64, tokens in the cache, the new one included.
        scale: of the scores.
        rank: numbers of a latent.

    Returns:
        [sequences, heads, rank], dtype of ``q``: what each head sees, as latents.
    """
    out = torch.empty(*q.shape[:2], rank, dtype=q.dtype, device=q.device)
    if not len(q):
        return out
    block_tokens, width = cache.shape[4:]
    longest = int(context_lens.max())
    tables = block_tables[:, : -(-longest // block_tokens)]
    count = max(1, _MAX_ELEMENTS // max(1, tables.shape[1] * block_tokens * width))
    at = torch.arange(tables.shape[1] * block_tokens, device=q.device)
    for start in range(0, len(q), count):
        some = slice(start, start + count)
        beyond = at >= context_lens[some].unsqueeze(1)
        rows = cache[tables[some], layer, 0, 0].float().flatten(1, 2)
        rows = rows.masked_fill(beyond.unsqueeze(2), 0.0)  # whatever is there is no part of the mean
        scores = q[some].float() @ rows.transpose(1, 2) * scale
        weights = torch.softmax(scores.masked_fill(beyond.unsqueeze(1), torch.finfo(torch.float32).min), dim=-1)
        out[some] = (weights @ rows[..., :rank]).to(q.dtype)
    return out


def reference_prefill(q: Tensor, cache: Tensor, layer: int, spans: Spans, scale: float, rank: int) -> Tensor:
    """Each span's tokens attend to what precedes them in their context, and to themselves.

    Args:
        q: [tokens, heads, rank + rope_dim] of a batch, absorbed and rotated.
        cache: [blocks, layers, 1, 1, block_tokens, rank + rope_dim] of any dtype; the spans' own rows are there.
        layer: which layer.
        spans: rows of ``q``.
        scale: of the scores.
        rank: numbers of a latent.

    Returns:
        [tokens, heads, rank], dtype of ``q``; rows of no span are undefined.
    """
    heads, width = q.shape[1:]
    out = torch.empty(len(q), heads, rank, dtype=q.dtype, device=q.device)
    for start, stop, block_table, context_len in spans.each:
        rows = cache[block_table, layer, 0, 0].reshape(-1, width)[:context_len].to(q.dtype)
        at = torch.arange(context_len, device=q.device)
        count = max(1, _MAX_ELEMENTS // (heads * context_len))
        for first in range(start, stop, count):
            last = min(first + count, stop)
            seen = context_len - stop + torch.arange(first, last, device=q.device) + 1
            beyond = (at >= seen.unsqueeze(1)).unsqueeze(1)
            scores = _exact_product(q[first:last].flatten(0, 1), rows.T).view(last - first, heads, -1) * scale
            weights = torch.softmax(scores.masked_fill(beyond, float("-inf")), dim=-1).to(q.dtype)
            out[first:last] = (weights.flatten(0, 1) @ rows[:, :rank]).view(last - first, heads, rank)
    return out


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, whatever the inputs are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def fused_write(
    q: Tensor,
    rows: Tensor,
    norm: LatentNorm,
    interleaved: bool,
    cos_sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    layer: int,
    slots: Tensor,
) -> Tensor:
    """`reference_write` on a GPU: one program a token, and one for some heads of its query. A negative slot is written
    nowhere."""
    tokens, heads, rope_dim = q.shape
    rank, block_tokens = len(norm.weight), cache.shape[4]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens:
        own = cache[:, layer, 0, 0]
        _write_kernel[(tokens, 1 + -(-heads // _HEADS))](
            q, rows, norm.weight, cos_sin, positions, slots, own, out,
            heads, block_tokens, q.stride(0), q.stride(1), rows.stride(0), own.stride(0), own.stride(1), norm.eps,
            interleaved, _FP8_LIMIT if cache.dtype == torch.float8_e4m3fn else 0.0, rank, next_power_of_2(rank),
            rope_dim // 2, next_power_of_2(rope_dim // 2), _HEADS, num_warps=4,
        )  # fmt: skip
    return out


@kernel_varying("positions", "slots")
def _write_kernel(  # type: ignore[no-untyped-def]
    q, rows, weight, cos_sin, positions, slots, cache, out,
    heads, block_tokens, q_stride, head_stride, row_stride, block_stride, token_stride, eps,
    INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = tl.arange(0, HALF_BLOCK)
    turned = tl.load(positions + token) * (2 * HALF) + at
    cos = tl.load(cos_sin + turned, mask=at < HALF, other=0.0)
    sin = tl.load(cos_sin + turned + HALF, mask=at < HALF, other=0.0)
    first = at
    second = at + HALF
    if INTERLEAVED:
        first = 2 * at
        second = 2 * at + 1
    if part == 0:
        slot = tl.load(slots + token)
        if slot >= 0:
            row = rows + token * row_stride
            to = cache + slot // block_tokens * block_stride + slot % block_tokens * token_stride
            dim = tl.arange(0, RANK_BLOCK)
            latent = tl.load(row + dim, mask=dim < RANK, other=0.0)
            wide = latent.to(tl.float32)
            scaled = wide * tl.rsqrt(tl.sum(wide * wide) / RANK + eps)
            scaled = (tl.load(weight + dim, mask=dim < RANK, other=0.0) * scaled.to(latent.dtype)).to(tl.float32)
            one = tl.load(row + RANK + first, mask=at < HALF, other=0.0)
            other = tl.load(row + RANK + second, mask=at < HALF, other=0.0)
            low = (one.to(tl.float32) * cos - other.to(tl.float32) * sin).to(one.dtype).to(tl.float32)
            high = (other.to(tl.float32) * cos + one.to(tl.float32) * sin).to(one.dtype).to(tl.float32)
            if LIMIT > 0:
                scaled = tl.clamp(scaled, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
                low = tl.clamp(low, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
                high = tl.clamp(high, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            kind: tl.constexpr = cache.dtype.element_ty
            tl.store(to + dim, scaled.to(kind), mask=dim < RANK)
            tl.store(to + RANK + at, low.to(kind), mask=at < HALF)
            tl.store(to + RANK + HALF + at, high.to(kind), mask=at < HALF)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        there = (head < heads)[:, None] & (at < HALF)[None, :]
        start = q + token * q_stride + head[:, None] * head_stride
        one = tl.load(start + first[None, :], mask=there, other=0.0)
        other = tl.load(start + second[None, :], mask=there, other=0.0)
        low = one.to(tl.float32) * cos[None, :] - other.to(tl.float32) * sin[None, :]
        high = other.to(tl.float32) * cos[None, :] + one.to(tl.float32) * sin[None, :]
        place = out + (token * heads + head[:, None]) * (2 * HALF) + at[None, :]
        tl.store(place, low.to(one.dtype), mask=there)
        tl.store(place + HALF, high.to(one.dtype), mask=there)


def fused_decode(
    q: Tensor, cache: Tensor, layer: int, block_tables: Tensor, context_lens: Tensor, scale: float, rank: int
) -> Tensor:
    """`reference_decode` on a GPU; an empty context gives zeros.

    A program has some heads of a sequence and reads each row once for all of them. When there are few sequences, each
    context is split over several programs, and the parts are put together by their log-sum-exp (Dao et al. 2023, flash
    decoding).
    """
    sequences, heads, width = q.shape
    out = torch.empty(sequences, heads, rank, dtype=q.dtype, device=q.device)
    if not sequences:
        return out
    block_tokens = cache.shape[4]
    tiles = -(-heads // _HEADS)
    most = -(-block_tables.shape[1] * block_tokens // (2 * _TOKENS))
    splits = max(1, min(_MAX_SPLITS, most, 2 * num_processors(q.device) // (sequences * tiles)))
    parts = torch.empty(splits, sequences, heads, rank, dtype=torch.float32, device=q.device)
    sums = torch.empty(splits, sequences, heads, dtype=torch.float32, device=q.device)
    own = cache[:, layer, 0, 0]
    q = q.contiguous()
    _decode_kernel[(sequences, tiles, splits)](
        q, own, block_tables, context_lens, parts, sums, sequences, heads, block_tokens, block_tables.stride(0),
        own.stride(0), own.stride(1), scale, splits, rank, _wide(rank), width - rank, _wide(width - rank), _HEADS,
        _TOKENS, num_warps=4,
        num_stages=1 if q.dtype == torch.float32 else 2,
    )  # fmt: skip
    if splits == 1:
        return out.copy_(parts[0])
    shares = torch.softmax(sums, dim=0)  # of an empty context all sums are equal, and all parts zero
    return out.copy_((parts * shares.unsqueeze(-1)).sum(0))


def _wide(count: int) -> int:
    """How many columns a product takes at a time: a power of 2, and at least what tensor cores take."""
    return max(16, next_power_of_2(count))


@kernel_varying("sequences", "table_stride", "splits")
def _decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, block_tables, context_lens, parts, sums, sequences, heads, block_tokens, table_stride, block_stride,
    token_stride, scale, splits, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    split = tl.program_id(2)
    length = tl.load(context_lens + sequence)
    each = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    start = split * each
    stop = tl.minimum(start + each, length)
    dim = tl.arange(0, RANK_BLOCK)
    turned = tl.arange(0, ROPE_BLOCK)
    query = q + (sequence * heads + head[:, None]) * (RANK + ROPE)
    there = (head < heads)[:, None]
    latent_q = tl.load(query + dim[None, :], mask=there & (dim < RANK)[None, :], other=0.0)
    rope_q = tl.load(query + RANK + turned[None, :], mask=there & (turned < ROPE)[None, :], other=0.0)
    top = tl.full((HEADS,), -1e30, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    seen = tl.zeros((HEADS, RANK_BLOCK), tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < stop
        block = tl.load(block_tables + sequence * table_stride + token // block_tokens, mask=inside, other=0)
        row = cache + block * block_stride + token % block_tokens * token_stride
        latent = tl.load(row[:, None] + dim[None, :], mask=inside[:, None] & (dim < RANK)[None, :], other=0.0)
        key = tl.load(row[:, None] + RANK + turned[None, :], mask=inside[:, None] & (turned < ROPE)[None, :], other=0.0)
        latent = latent.to(latent_q.dtype)
        scores = tl.dot(latent_q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(rope_q, tl.trans(key.to(rope_q.dtype)), scores, input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        best = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - best[:, None])
        shrunk = tl.exp(top - best)
        total = total * shrunk + tl.sum(weights, 1)
        seen = seen * shrunk[:, None]
        seen = tl.dot(weights.to(latent.dtype), latent, seen, input_precision="ieee")
        top = best
    empty = total == 0
    seen = seen / tl.where(empty, 1.0, total)[:, None]
    place = (split * sequences + sequence) * heads + head
    tl.store(parts + place[:, None] * RANK + dim[None, :], seen, mask=there & (dim < RANK)[None, :])
    tl.store(sums + place, tl.where(empty, -1e30, top + tl.log(tl.where(empty, 1.0, total))), mask=head < heads)
