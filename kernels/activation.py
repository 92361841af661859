"""Gated linear unit with SiLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled
from .exponential import exp_inplace


def reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up: [tokens, 2 · inner], gate first.

    Returns:
        [tokens, inner].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def native(gate_up: Tensor) -> Tensor:
    """`reference` for float32 on a CPU."""
    tokens, double = gate_up.shape
    if tokens * double > 1 << 16:
        return reference(gate_up)
    out = np.empty((tokens, double // 2), np.float32)
    silu_mul(gate_up.numpy(), tokens, out)
    return torch.from_numpy(out)


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
