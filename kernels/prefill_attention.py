"""Attention of several new tokens a sequence over their context, whose KV is in the cache already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .compiled import compiled, compiled_parallel, num_threads, prange
from .exponential import exp_inplace
from .linear import dot_rows
from .paged_prefill import attend

_QUERY_TILE = 32
_KEY_TILE = 128
_NEVER = np.float32(-1e30)

_DIRECT_STEP = 128
"""Rows that go to the library are a multiple of this: for every length, and number of sequences, cuDNN plans anew, and
keeps the plan for good."""
DIRECT_LEAST = 1024
"""Shorter prompts stay with the kernel, which takes all of them in one launch."""


class Span(NamedTuple):
    """Rows ``start`` … ``stop`` − 1 of a batch: several new tokens of one sequence, its context's last."""

    start: int
    stop: int
    block_table: Tensor
    """[blocks of the context] int64, in order; those that no row sees are not read."""
    context_len: int
    """Tokens in the cache, the new ones included."""


class Spans(NamedTuple):
    """All spans of a batch, as the host knows them and as a device does."""

    each: Sequence[Span]
    """In order; they do not overlap."""
    table: Tensor
    """[spans, 4] int64: first row, number of rows, tokens of the context, first entry in ``blocks``."""
    blocks: Tensor
    """[entries] int64: the block tables, one after another."""

    @classmethod
    def of(cls, each: Sequence[Span]) -> Spans:
        """Spans whose block tables lie anywhere. Waits for the device."""
        blocks = torch.cat([span.block_table for span in each])
        rows, first = [], 0
        for span in each:
            rows.append([span.start, span.stop - span.start, span.context_len, first])
            first += len(span.block_table)
        return cls(each, torch.tensor(rows, device=blocks.device), blocks)


def reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: Tensor,
    layer: int,
    spans: Spans,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each span's tokens attend to what precedes them in their context, and to themselves.

    Args:
        q: [tokens, heads, head_dim] of a batch.
        k: [tokens, kv_heads, head_dim], the same tokens' keys, which the cache holds too. Not read here.
        v: like ``k``, values.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim] of any dtype; heads are grouped over kv_heads.
        layer: which layer.
        spans: rows of ``q``.
        scale: of the scores.
        window: tokens that a token sees, itself included; 0: all.
        sinks: [heads] logits beside those of the tokens, with no value of their own (Xiao et al. 2023,
            arXiv:2309.17453), or None.

    Returns:
        [tokens, heads, head_dim], dtype of ``q``; rows of no span are undefined.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads, head_dim = q.shape[1:]
    kv_heads = cache.shape[3]
    for start, stop, block_table, context_len in spans.each:
        first = max(context_len - (stop - start) - window + 1, 0) if window else 0
        skipped = first // cache.shape[4]  # blocks
        context_len -= skipped * cache.shape[4]
        mask = _causal_mask(stop - start, context_len, window, q.device)
        kv = cache[block_table[skipped:], layer].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        kv = kv[:, :, :context_len]
        kv = kv.to(q.dtype)
        if sinks is not None:
            kv, mask = _with_sinks(kv, mask, stop - start, sinks)
        if not q.is_cuda:  # there the library wants as many key heads as query heads
            kv = kv.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1, -1).reshape(2, heads, -1, head_dim)
        # On a GPU the plain way: the fast ones are particular about addresses.
        with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
            seen = scaled_dot_product_attention(
                q[start:stop].transpose(0, 1).unsqueeze(0),
                kv[0].unsqueeze(0),
                kv[1].unsqueeze(0),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.is_cuda and heads != kv_heads,
            )
        out[start:stop] = seen[0].transpose(0, 1)
    return out


def native(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: Tensor,
    layer: int,
    spans: Spans,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference` for float32 on a CPU: tiles of queries against tiles of keys with a running softmax (Dao et al. 2022,
    arXiv:2205.14135), read straight from the blocks."""
    out = np.empty(q.shape, np.float32)
    queries, blocks = q.numpy(), cache.numpy()
    sink_array = np.empty(0, np.float32) if sinks is None else sinks.numpy()
    for start, stop, block_table, context_len in spans.each:
        where = block_table.numpy(), context_len, scale, window, sink_array, out[start:stop]
        items = _num_items(stop - start, cache.shape[3])
        if num_threads() == 1:
            for item in range(items):
                _tile(queries[start:stop], blocks, layer, *where, item)
        else:
            _tiles(queries[start:stop], blocks, layer, *where, items)
    return torch.from_numpy(out)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    layer: int,
    spans: Spans,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference` on a GPU; q, k and v have any strides but the last, which is 1.

    A context that begins in this step goes to torch's library without a detour through the blocks, but for its last
    rows: see `_DIRECT_STEP`. All others, and all that a window or sinks concern, go to a kernel over the blocks.

    Nobody tells torch which library: on Hopper and Blackwell it asks cuDNN first, where that is 9.15.1 or later
    (earlier ones were wrong for some lengths), then its flash attention. To name an order in a context costs 12 µs a
    call, and to name one for the whole process lifts that guard. float32 stays with the kernel: for grouped heads torch
    may take its plain implementation, which writes all scores to memory.
    """
    direct = sinks is None and _library_serves(q, k, v, cache)
    runs, num_taken = plan(spans.each, window, _DIRECT_STEP if direct else 0, DIRECT_LEAST)
    rest = [span.stop - span.start - taken for span, taken in zip(spans.each, num_taken, strict=True)]
    if not any(rest) and len(runs) == 1 and runs[0].sequences * runs[0].length == len(q):
        return _attend_directly(q, k, v, runs[0], scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for run in runs:
        out[run.start : run.start + run.sequences * run.length] = _attend_directly(q, k, v, run, scale)
    if any(rest):
        step = _DIRECT_STEP if direct else 0
        longest = max(span.context_len for span, tokens in zip(spans.each, rest, strict=True) if tokens)
        how = longest, step, DIRECT_LEAST, scale, window, sinks, out
        attend(q, cache, layer, spans.table, spans.blocks, rest, *how)
    return out


def prepare(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, longest: int) -> None:
    """Let the library plan for every length of a context that it may get, on this thread: later it would do so while
    the first prompts of each length wait. Blocks for some seconds.

    Args:
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        dtype: of all.
        device: a GPU.
        longest: tokens of the longest step.
    """
    qkv = torch.zeros(longest, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if _library_serves(q, k, v, qkv):
        for length in range(_DIRECT_STEP, longest + 1, _DIRECT_STEP):
            _attend_directly(q, k, v, Run(0, 1, length), 1.0)


class Run(NamedTuple):
    """Neighbouring whole contexts of equal length: rows ``start`` … ``start + sequences · length`` − 1."""

    start: int
    sequences: int
    length: int


def plan(spans: Sequence[Span], window: int, step: int, least: int) -> tuple[list[Run], list[int]]:
    """Which rows the library takes. Pure; the kernel finds out by the same rule which are left.

    Args:
        spans: of a batch.
        window: tokens that a token sees; 0: all.
        step: the library takes multiples of this; 0: nothing.
        least: of spans with as many rows.

    Returns:
        (what the library takes, and how many of each span's first rows that are).
    """
    runs: list[Run] = []
    taken: list[int] = []
    for span in spans:
        length = span.stop - span.start
        fresh = step > 0 and least <= length == span.context_len and (window == 0 or window >= length)
        whole = length - length % step if fresh else 0
        last = runs[-1] if runs else Run(0, 0, 0)
        if whole == length == last.length and last.start + last.sequences * length == span.start:
            runs[-1] = last._replace(sequences=last.sequences + 1)
        elif whole:
            runs.append(Run(span.start, 1, whole))
        taken.append(whole)
    return runs, taken


def _library_serves(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> bool:
    """Whether cuDNN, or else flash attention, takes tensors like these, and they are what the cache holds."""
    head_dim = q.shape[2]
    # Addresses that are no multiple of 16 bytes are an error that ends the process.
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and cache.dtype == q.dtype
        and head_dim % 8 == 0
        and head_dim <= 256
        and all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) % 8 == 0 for t in (q, k, v))
    )


def _attend_directly(q: Tensor, k: Tensor, v: Tensor, run: Run, scale: float) -> Tensor:
    start, sequences, length = run
    rows = slice(start, start + sequences * length)
    heads_first = [tensor[rows].unflatten(0, (sequences, length)).transpose(1, 2) for tensor in (q, k, v)]
    seen: Tensor = scaled_dot_product_attention(
        heads_first[0],
        heads_first[1],
        heads_first[2],
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return seen.transpose(1, 2).flatten(0, 1)


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
    sinks: np.ndarray,
    out: np.ndarray,
    items: int,
) -> None:
    for item in prange(items):
        # Neighbours in the loop go to one thread: spread the late, long tiles.
        spread = item // 2 if item % 2 == 0 else items - 1 - item // 2
        _tile(q, cache, layer, block_table, context_len, scale, window, sinks, out, spread)


@compiled
def _tile(
    q: np.ndarray,
    cache: np.ndarray,
    layer: int,
    block_table: np.ndarray,
    context_len: int,
    scale: float,
    window: int,
    sinks: np.ndarray,
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
    if len(sinks) > 0:
        norm[:] = 1
        for r in range(rows):
            top[r] = sinks[h * group + r % group]
    low = max(0, first_position + start - window + 1) if window > 0 else 0
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


def _with_sinks(kv: Tensor, mask: Tensor | None, num_new: int, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more token, whose key and value are zero and whose logit the mask adds: [heads, num_new, context_len + 1]."""
    context_len = kv.shape[2]
    if mask is None:
        mask = torch.ones(num_new, context_len, dtype=torch.bool, device=kv.device).tril()
    bias = torch.zeros(mask.shape, dtype=kv.dtype, device=kv.device).masked_fill(~mask, -torch.inf)
    column = sinks.to(kv.dtype).view(-1, 1, 1).expand(-1, num_new, 1)
    return torch.nn.functional.pad(kv, (0, 0, 0, 1)), torch.cat((bias.expand(len(sinks), -1, -1), column), dim=-1)
