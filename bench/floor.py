"""The shortest times that a device allows: bytes that must be read over its bandwidth, products over its arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..engine.models.spec import ModelSpec

_COPY_BYTES = 256 << 20
_PRODUCT = 8192


class Ceilings(NamedTuple):
    """What a device was seen to do."""

    bytes_per_s: float
    """Of a large copy on the device, bytes read and written."""
    flops: float
    """Of a product of two matrices of 8192 × 8192."""

    def of(self, count: int) -> Ceilings:
        """What ``count`` such devices do together."""
        return Ceilings(count * self.bytes_per_s, count * self.flops)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """See what a device can do. Blocks for about a second; the CPU gets smaller tasks."""
    small = 1 if device.type == "cuda" else 16
    source = torch.empty(_COPY_BYTES // small, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    size = _PRODUCT // small
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = _best_s(lambda: a @ b, device)
    return Ceilings(2 * source.numel() / copy_s, 2 * size**3 / product_s)


def decode_s(spec: ModelSpec, batch: int, context: int, element_bytes: int, ceilings: Ceilings) -> float:
    """A decode step: every weight that is used, and every sequence's KV, is read once. Experts are taken evenly."""
    touched = 1.0
    if spec.moe is not None:
        touched = 1 - (1 - spec.moe.top_k / spec.moe.num_experts) ** batch
    weights = _attention_weights(spec) + spec.vocab_size * spec.hidden
    for layer in range(spec.num_layers):
        weights += _mlp_weights(spec, layer, touched)
    kv = batch * sum(
        spec.num_kv_parts * spec.num_kv_heads * spec.head_dim * (min(context, window) if window else context)
        for window in spec.windows
    )
    return (weights + kv) * element_bytes / ceilings.bytes_per_s


def prefill_s(spec: ModelSpec, batch: int, context: int, ceilings: Ceilings) -> float:
    """Whole prompts: two operations for every weight and token, and causal attention."""
    active = 1.0 if spec.moe is None else spec.moe.top_k / spec.moe.num_experts
    weights = _attention_weights(spec)
    for layer in range(spec.num_layers):
        weights += _mlp_weights(spec, layer, active)
    pairs = 0.0
    for window in spec.windows:
        seen = min(context, window) if window else context
        pairs += seen * (context - seen / 2)
    seen_dim = spec.latent.query_dim + spec.latent.value_dim if spec.latent else 2 * spec.head_dim
    attention = 2 * spec.num_heads * seen_dim * pairs
    return batch * (2 * weights * context + attention + 2 * spec.vocab_size * spec.hidden) / ceilings.flops


def _attention_weights(spec: ModelSpec) -> float:
    latent = spec.latent
    if latent is None:
        return spec.num_layers * spec.hidden * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    queries = spec.num_heads * latent.query_dim
    down = spec.hidden * (latent.q_rank + latent.row_dim)
    up = (
        queries * (latent.q_rank or spec.hidden)
        + spec.num_heads * (latent.nope_dim + latent.value_dim) * latent.kv_rank
    )
    return spec.num_layers * (down + up + spec.num_heads * latent.value_dim * spec.hidden)


def _mlp_weights(spec: ModelSpec, layer: int, share: float) -> float:
    if spec.moe is None or layer not in spec.moe_layers:
        return 3.0 * spec.hidden * spec.inner
    shared = 3 * spec.hidden * spec.moe.shared_inner
    return spec.moe.num_experts * (3 * spec.hidden * spec.moe.inner * share + spec.hidden) + shared


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start_s)
    return best
