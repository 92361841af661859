"""From the fused projection to attention's inputs: norm of queries and keys, rotary position, write into the KV cache.

Rotary embeddings: Su et al. 2021, arXiv:2104.09864, in the half-split layout of Llama checkpoints.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled, compiled_parallel, num_threads, prange
from .on_gpu import follow, follows, kernel_varying, next_power_of_2, tl

_MIN_PARALLEL_ROWS = 64
_FP8_LIMIT = 448.0
"""The largest float8_e4m3fn; what is larger becomes that, not NaN."""


class HeadNorm(NamedTuple):
    """Per-head norms of Qwen3: weights [head_dim] each."""

    query: Tensor
    key: Tensor
    eps: float


def reference(
    qkv: Tensor,
    norm: HeadNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    layer: int,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, rotate, write keys and values into the cache.

    Args:
        qkv: [tokens, (heads + 2 · kv_heads) · head_dim], queries, keys, values.
        norm: norms of queries and keys, or None.
        cos_sin: [max positions, head_dim] float32, cosines of half the head then sines.
        positions: [tokens] int64.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim], written at ``layer``; float8_e4m3fn is written
            unscaled, ±448 at most.
        layer: which layer this is.
        slots: [tokens] int64, block · block_tokens + offset in the block, all different.

    Returns:
        (queries [tokens, heads, head_dim], keys [tokens, kv_heads, head_dim], values alike), dtype of ``qkv``.
    """
    kv_heads, block_tokens, head_dim = cache.shape[3:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(qkv.shape[0], -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if norm is not None:
        q = _head_norm(q, norm.query, norm.eps)
        k = _head_norm(k, norm.key, norm.eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    block, offset = slots // block_tokens, slots % block_tokens
    cache[block, layer, 0, :, offset] = _narrow(k, cache.dtype)
    cache[block, layer, 1, :, offset] = _narrow(v, cache.dtype)
    return q, k, v


def native(
    qkv: Tensor,
    norm: HeadNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    layer: int,
    slots: Tensor,
) -> tuple[Tensor, None, None]:
    """`reference` for float32 on a CPU. Keys and values are in the cache alone, where `prefill_attention.native` reads
    them."""
    kv_heads, _, head_dim = cache.shape[3:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    out = np.empty((qkv.shape[0], heads, head_dim), np.float32)
    none = np.zeros(0, np.float32)
    arrays: Any = (
        qkv.numpy(),
        none if norm is None else norm.query.numpy(),
        none if norm is None else norm.key.numpy(),
        0.0 if norm is None else norm.eps,
        cos_sin.numpy(),
        positions.numpy(),
        cache.numpy(),
        layer,
        slots.numpy(),
        out,
    )
    if len(qkv) < _MIN_PARALLEL_ROWS or num_threads() == 1:
        rotary_rows(*arrays)
    else:
        _rotary_parallel(num_threads(), *arrays)
    return torch.from_numpy(out), None, None


def fused(
    qkv: Tensor,
    norm: HeadNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    layer: int,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference` on a GPU: one program for some heads of a token. Overwrites ``qkv`` and returns views of it. A
    negative slot is written nowhere."""
    kv_heads, block_tokens, head_dim = cache.shape[3:]
    tokens = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if tokens:
        rows = min(16, next_power_of_2(heads + 2 * kv_heads))
        _rotary_kernel[(tokens, -(-(heads + 2 * kv_heads) // rows))](
            qkv, norm.query if norm else qkv, norm.key if norm else qkv, cos_sin, positions, slots,
            cache[:, layer], heads, kv_heads, block_tokens, qkv.stride(0), cache.stride(0), *cache.stride()[2:5],
            norm.eps if norm else 0.0, norm is not None, _FP8_LIMIT, rows, head_dim,
            next_power_of_2(head_dim // 2), num_warps=4, **follows(qkv.device),
        )  # fmt: skip
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@kernel_varying("positions", "slots")
def _rotary_kernel(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, cos_sin, positions, slots, cache,
    heads, kv_heads, block_tokens, qkv_stride, block_stride, kv_stride, head_stride, token_stride,
    eps, NORM: tl.constexpr, FP8_LIMIT: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    follow(FOLLOW)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    half: tl.constexpr = HEAD_DIM // 2
    at = tl.arange(0, HALF_BLOCK)
    is_query = (head < heads)[:, None]
    is_value = (head >= heads + kv_heads)[:, None]
    inside = (head < heads + 2 * kv_heads)[:, None] & (at < half)[None, :]
    source = qkv + token * qkv_stride + head[:, None] * HEAD_DIM + at[None, :]
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + half, mask=inside, other=0.0)
    # A small tile is loaded by several threads alike: none may be late for what another overwrites below.
    tl.debug_barrier()
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / HEAD_DIM + eps)[:, None]
        q_first = tl.load(q_weight + at, mask=at < half, other=0.0)[None, :]
        q_second = tl.load(q_weight + half + at, mask=at < half, other=0.0)[None, :]
        k_first = tl.load(k_weight + at, mask=at < half, other=0.0)[None, :]
        k_second = tl.load(k_weight + half + at, mask=at < half, other=0.0)[None, :]
        a = ((a * scale).to(dtype) * tl.where(is_query, q_first, k_first)).to(tl.float32)
        b = ((b * scale).to(dtype) * tl.where(is_query, q_second, k_second)).to(tl.float32)
    angle = cos_sin + tl.load(positions + token) * HEAD_DIM
    cos = tl.load(angle + at, mask=at < half, other=0.0)[None, :]
    sin = tl.load(angle + half + at, mask=at < half, other=0.0)[None, :]
    first = tl.where(is_value, first, (a * cos - b * sin).to(dtype))
    second = tl.where(is_value, second, (b * cos + a * sin).to(dtype))
    tl.store(source, first, mask=inside & ~is_value)
    tl.store(source + half, second, mask=inside & ~is_value)
    slot = tl.load(slots + token)
    place = slot // block_tokens * block_stride + slot % block_tokens * token_stride
    key_place = (head - heads)[:, None] * head_stride
    value_place = kv_stride + (head - heads - kv_heads)[:, None] * head_stride
    target = cache + place + tl.where(is_value, value_place, key_place) + at[None, :]
    held = inside & (head >= heads)[:, None] & (slot >= 0)  # a row that only fills a batch up has no slot
    if cache.dtype.element_ty == tl.float8e4nv:
        first = tl.clamp(first.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
        second = tl.clamp(second.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
    tl.store(target, first.to(cache.dtype.element_ty), mask=held)
    tl.store(target + half, second.to(cache.dtype.element_ty), mask=held)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.clamp(-_FP8_LIMIT, _FP8_LIMIT) if dtype == torch.float8_e4m3fn else x).to(dtype)


def _head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@compiled_parallel
def _rotary_parallel(
    parts: int,
    qkv: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    eps: float,
    cos_sin: np.ndarray,
    positions: np.ndarray,
    cache: np.ndarray,
    layer: int,
    slots: np.ndarray,
    out: np.ndarray,
) -> None:
    for part in prange(parts):
        low, high = len(qkv) * part // parts, len(qkv) * (part + 1) // parts
        rotary_rows(
            qkv[low:high],
            q_weight,
            k_weight,
            eps,
            cos_sin,
            positions[low:high],
            cache,
            layer,
            slots[low:high],
            out[low:high],
        )


@compiled
def rotary_rows(
    qkv: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    eps: float,
    cos_sin: np.ndarray,
    positions: np.ndarray,
    cache: np.ndarray,
    layer: int,
    slots: np.ndarray,
    out: np.ndarray,
) -> None:
    """`native` over arrays; ``q_weight`` and ``k_weight`` [head_dim], or empty for no norm; queries go to ``out``."""
    has_norm = len(q_weight) > 0
    tokens, heads, head_dim = out.shape
    kv_heads, block_tokens = cache.shape[3], cache.shape[4]
    half = head_dim // 2
    for t in range(tokens):
        position = positions[t]
        block = slots[t] // block_tokens
        offset = slots[t] % block_tokens
        for h in range(heads + kv_heads):
            x = qkv[t, h * head_dim : (h + 1) * head_dim]
            weight = q_weight if h < heads else k_weight
            to = out[t, h] if h < heads else cache[block, layer, 0, h - heads, offset]
            scale = np.float32(1)
            if has_norm:
                square = np.float32(0)
                for i in range(head_dim):
                    square += x[i] * x[i]
                scale = np.float32(1 / math.sqrt(square / head_dim + eps))
            for i in range(half):
                first = x[i] * scale
                second = x[i + half] * scale
                if has_norm:
                    first *= weight[i]
                    second *= weight[i + half]
                cos = cos_sin[position, i]
                sin = cos_sin[position, i + half]
                to[i] = first * cos - second * sin
                to[i + half] = second * cos + first * sin
        for h in range(kv_heads):
            start = (heads + kv_heads + h) * head_dim
            for i in range(head_dim):
                cache[block, layer, 1, h, offset, i] = qkv[t, start + i]
