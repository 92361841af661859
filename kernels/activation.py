"""Gated linear unit with SiLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled
from .exponential import exp_inplace
from .on_gpu import kernel, next_power_of_2, tl


def reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up: [tokens, 2 · inner], gate first.

    Returns:
        [tokens, inner].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """g · sigmoid(1.702 · g) · (u + 1), where g is the gate, at most 7, and u is up, within ± 7 (gpt-oss,
    arXiv:2508.10925).

    Args:
        gate_up: [tokens, 2 · inner], gate first.

    Returns:
        [tokens, inner].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATED = {"silu": reference, "clamped_swiglu": clamped_swiglu}
"""The gated units of experts, by name."""


def native(gate_up: Tensor) -> Tensor:
    """`reference` for float32 on a CPU."""
    tokens, double = gate_up.shape
    if tokens * double > 1 << 16:
        return reference(gate_up)
    out = np.empty((tokens, double // 2), np.float32)
    silu_mul(gate_up.numpy(), tokens, out)
    return torch.from_numpy(out)


def fused(gate_up: Tensor) -> Tensor:
    """`reference` on a GPU, in one pass."""
    tokens, double = gate_up.shape
    inner = double // 2
    out = torch.empty(tokens, inner, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        block = min(1024, next_power_of_2(inner))
        _silu_mul_kernel[(tokens, -(-inner // block))](gate_up, out, inner, gate_up.stride(0), block)
    return out


@kernel
def _silu_mul_kernel(gate_up, out, inner, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + inner + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out + row * inner + at, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=inside)


@compiled
def silu_mul(gate_up: np.ndarray, rows: int, out: np.ndarray) -> None:
    """out[i] = silu(gate_up[i, :inner]) · gate_up[i, inner:] for i < rows."""
    inner = gate_up.shape[1] // 2
    bits = np.empty(inner, np.int32)
    for t in range(rows):
        gate, up, to = gate_up[t, :inner], gate_up[t, inner:], out[t]
        for i in range(inner):
            to[i] = -gate[i]
        exp_inplace(to, bits)
        for i in range(inner):
            to[i] = gate[i] / (np.float32(1) + to[i]) * up[i]
