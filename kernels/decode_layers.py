"""Whole decoder layers for sequences with one new token each, a compiled call for each layer.

A step of a small model is dozens of operations of a few microseconds. Called one by one they spend as long in Python,
and in waking threads that fell asleep between two of them, as in computing. Nothing in a layer mixes the sequences of
such a batch, so each thread takes some of them through the whole layer, and the threads meet once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import activation, decode_attention, linear, moe, rms_norm, rotary
from .activation import silu_mul
from .compiled import compiled, compiled_parallel, num_threads, prange
from .decode_attention import attend_rows
from .linear import dot_rows
from .moe import moe_rows
from .rms_norm import add_norm_rows
from .rotary import HeadNorm, rotary_rows
from .widen import bits_of

MAX_WEIGHTS = 1 << 22
"""Of one layer: every thread reads all of them, which pays while they come from a cache."""


class LayerWeights(NamedTuple):
    """A layer's parameters. ``None`` where a family has none."""

    input_norm: Tensor
    """[hidden]"""
    qkv: Tensor
    """[(heads + 2 · kv_heads) · head_dim, hidden]"""
    qkv_bias: Tensor | None
    head_norm: HeadNorm | None
    o: Tensor
    """[hidden, heads · head_dim]"""
    o_bias: Tensor | None
    post_norm: Tensor
    """[hidden]"""
    router: Tensor | None
    """[experts, hidden], or None: no mixture."""
    gate_up: Tensor
    """[experts, 2 · inner, hidden]; one expert without a mixture."""
    down: Tensor
    """[experts, hidden, inner]"""
    top_k: int
    renormalize: bool
    eps: float
    """Of the norms."""
    scale: float
    """Of the attention's scores."""
    window: int
    """Tokens that a token sees; 0: all."""
    group: int
    """Which of the KV groups' blocks hold its KV."""
    place: int
    """Where in a block."""


class Rows(NamedTuple):
    """One new token of each of several sequences, and where one KV group has its KV."""

    positions: Tensor
    """[rows] int64"""
    slots: Tensor
    """[rows] int64: block · block_tokens + offset of the new token's KV."""
    block_tables: Tensor
    """[rows, blocks] int64"""
    context_lens: Tensor
    """[rows] int64, the new token included."""


def reference(
    x: Tensor,
    layers: Sequence[LayerWeights],
    rows: Sequence[Rows],
    cache: Tensor,
    cos_sin: Tensor,
    done: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The layers, by their operations' references.

    Args:
        x: [rows, hidden], the embeddings.
        layers: parameters.
        rows: where the tokens stand, for each KV group.
        cache: [blocks, places, 2, kv_heads, block_tokens, head_dim], written.
        cos_sin: [max positions, head_dim].
        done: called with each layer's number when its KV is in the cache.

    Returns:
        (output of the last layer, residual), both [rows, hidden].
    """
    residual: Tensor | None = None
    for layer, w in enumerate(layers):
        x, residual = rms_norm.reference(x, residual, w.input_norm, w.eps)
        qkv = linear.reference(x, w.qkv, w.qkv_bias)
        own = rows[w.group]
        q, _, _ = rotary.reference(qkv, w.head_norm, cos_sin, own.positions, cache, w.place, own.slots)
        seen = decode_attention.reference(q, cache, w.place, own.block_tables, own.context_lens, w.scale, w.window)
        x = linear.reference(seen.flatten(1), w.o, w.o_bias)
        x, residual = rms_norm.reference(x, residual, w.post_norm, w.eps)
        if w.router is not None:
            x = moe.reference(x, w.router, w.gate_up, w.down, w.top_k, w.renormalize)
        else:
            x = linear.reference(activation.reference(linear.reference(x, w.gate_up[0])), w.down[0])
        if done is not None:
            done(layer)
    assert residual is not None
    return x, residual


class Prepared:
    """A layer's parameters as `native` wants them; on a CPU, contiguous; float32, the matrices also bfloat16."""

    def __init__(self, weights: LayerWeights) -> None:
        nothing = np.zeros(0, np.float32)
        norm = weights.head_norm

        def array(tensor: Tensor | None) -> np.ndarray:
            return nothing if tensor is None else bits_of(tensor)

        self.arrays: Any = (
            array(weights.input_norm),
            array(weights.qkv),
            array(weights.qkv_bias),
            array(None if norm is None else norm.query),
            array(None if norm is None else norm.key),
            array(weights.o),
            array(weights.o_bias),
            array(weights.post_norm),
            np.zeros((0, 0), np.float32) if weights.router is None else bits_of(weights.router),
            array(weights.gate_up),
            array(weights.down),
            weights.top_k,
            weights.renormalize,
            weights.eps,
            weights.scale,
            weights.window,
        )
        self.group = weights.group
        self.place = weights.place


def num_weights(weights: LayerWeights) -> int:
    """Elements of a layer's large tensors."""
    return sum(t.numel() for t in (weights.qkv, weights.o, weights.gate_up, weights.down))


def native(
    x: Tensor,
    layers: Sequence[Prepared],
    rows: Sequence[Rows],
    cache: Tensor,
    cos_sin: Tensor,
    done: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference` for float32 on a CPU. Overwrites ``x``."""
    residual = torch.zeros_like(x)
    parts = min(num_threads(), len(x))
    streams: Any = [[tensor.numpy() for tensor in (x, residual, *own, cache, cos_sin)] for own in rows]
    for number, layer in enumerate(layers):
        arguments: Any = (*streams[layer.group], layer.place, *layer.arrays)
        if parts == 1:
            _layer_rows(*arguments)
        else:
            _layer_parallel(parts, *arguments)
        if done is not None:
            done(number)
    return x, residual


@compiled_parallel
def _layer_parallel(
    parts: int,
    x: np.ndarray,
    residual: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    cache: np.ndarray,
    cos_sin: np.ndarray,
    layer: int,
    input_norm: np.ndarray,
    qkv: np.ndarray,
    qkv_bias: np.ndarray,
    q_norm: np.ndarray,
    k_norm: np.ndarray,
    o: np.ndarray,
    o_bias: np.ndarray,
    post_norm: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    renormalize: bool,
    eps: float,
    scale: float,
    window: int,
) -> None:
    for part in prange(parts):
        low, high = len(x) * part // parts, len(x) * (part + 1) // parts
        _layer_rows(
            x[low:high],
            residual[low:high],
            positions[low:high],
            slots[low:high],
            block_tables[low:high],
            context_lens[low:high],
            cache,
            cos_sin,
            layer,
            input_norm,
            qkv,
            qkv_bias,
            q_norm,
            k_norm,
            o,
            o_bias,
            post_norm,
            router,
            gate_up,
            down,
            top_k,
            renormalize,
            eps,
            scale,
            window,
        )


@compiled
def _layer_rows(
    x: np.ndarray,
    residual: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    cache: np.ndarray,
    cos_sin: np.ndarray,
    layer: int,
    input_norm: np.ndarray,
    qkv: np.ndarray,
    qkv_bias: np.ndarray,
    q_norm: np.ndarray,
    k_norm: np.ndarray,
    o: np.ndarray,
    o_bias: np.ndarray,
    post_norm: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    renormalize: bool,
    eps: float,
    scale: float,
    window: int,
) -> None:
    rows, hidden = x.shape
    head_dim = cache.shape[5]
    normed = np.empty((rows, hidden), np.float32)
    add_norm_rows(x, residual, input_norm, eps, normed)
    projected = np.empty((rows, len(qkv)), np.float32)
    dot_rows(normed, qkv, projected)
    if len(qkv_bias) > 0:
        for r in range(rows):
            for i in range(len(qkv_bias)):
                projected[r, i] += qkv_bias[i]
    queries = np.empty((rows, o.shape[1] // head_dim, head_dim), np.float32)
    rotary_rows(projected, q_norm, k_norm, eps, cos_sin, positions, cache, layer, slots, queries)
    seen = np.empty((rows, o.shape[1] // head_dim, head_dim), np.float32)
    attend_rows(queries, cache, layer, block_tables, context_lens, scale, window, np.empty(0, np.float32), seen)
    dot_rows(seen.reshape(rows, o.shape[1]), o, x)
    if len(o_bias) > 0:
        for r in range(rows):
            for i in range(hidden):
                x[r, i] += o_bias[i]
    add_norm_rows(x, residual, post_norm, eps, normed)
    if len(router) > 0:
        moe_rows(normed, router, gate_up, down, top_k, renormalize, x)
        return
    both = np.empty((rows, gate_up.shape[1]), np.float32)
    inner = np.empty((rows, gate_up.shape[1] // 2), np.float32)
    dot_rows(normed, gate_up[0], both)
    silu_mul(both, rows, inner)
    dot_rows(inner, down[0], x)
