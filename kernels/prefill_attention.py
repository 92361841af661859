"""Attention of several new tokens of one sequence over its paged KV, which already holds those tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor, cache: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, mask: Tensor | None
) -> Tensor:
    """The last ``len(q)`` tokens of a context attend to what precedes them, and to themselves.

    Args:
        q: [tokens, heads, head_dim], the context's last tokens.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim].
        layer: which layer.
        block_table: [blocks of the context] int64, in order.
        context_len: tokens in the cache, the new ones included.
        scale: of the scores.
        mask: `causal_mask` of these tokens, or None when they are the whole context and no window applies.

    Returns:
        [tokens, heads, head_dim], dtype of ``q``.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = cache.shape[3]
    kv = cache[block_table, layer].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :context_len]
    # The fused CPU kernel wants as many key heads as query heads.
    kv = kv.to(q.dtype).unsqueeze(2).expand(-1, -1, heads // kv_heads, -1, -1).reshape(2, heads, context_len, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        kv[0].unsqueeze(0),
        kv[1].unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)


def causal_mask(num_new: int, context_len: int, window: int, device: torch.device) -> Tensor | None:
    """Which of a context's tokens its last ``num_new`` see: [num_new, context_len] bool, or None for plain causal."""
    if num_new == context_len and (window == 0 or window >= context_len):
        return None
    query = torch.arange(context_len - num_new, context_len, device=device).unsqueeze(1)
    key = torch.arange(context_len, device=device)
    mask = key <= query
    if window:
        mask &= key > query - window
    return mask
