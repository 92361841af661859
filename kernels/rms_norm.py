"""Root mean square layer normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), with the residual sum before it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled
from .on_gpu import follow, follows, kernel, next_power_of_2, tl


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise.

    Args:
        x: [tokens, hidden].
        residual: [tokens, hidden], or None at the first layer, where ``x`` itself is the residual.
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        (normalised, new residual): both [tokens, hidden] of ``x``'s dtype; the sum and the mean are float32.
    """
    total = x if residual is None else x + residual
    wide = total.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype), total


def native(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference` for float32 on a CPU. Overwrites ``residual``."""
    out = np.empty(x.shape, np.float32)
    if residual is None:
        _norm(x.numpy(), weight.numpy(), eps, out)
        return torch.from_numpy(out), x
    add_norm_rows(x.numpy(), residual.numpy(), weight.numpy(), eps, out)
    return torch.from_numpy(out), residual


def fused(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference` on a GPU, in one pass: two reads and two writes. Overwrites ``residual``."""
    tokens, hidden = x.shape
    out = torch.empty_like(x)
    total = x if residual is None else residual
    if tokens:
        block = next_power_of_2(hidden)
        _norm_kernel[(tokens,)](
            x, total, weight, out, hidden, x.stride(0), total.stride(0), eps, residual is not None, block,
            num_warps=max(1, min(8, block // 512)), **follows(x.device),
        )  # fmt: skip
    return out, total


@kernel
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, total, weight, out, hidden, x_stride, total_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    follow(FOLLOW)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if ADD:
        value += tl.load(total + row * total_stride + at, mask=inside, other=0.0)
        tl.store(total + row * total_stride + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    scaled = (wide * scale).to(value.dtype)
    tl.store(out + row * hidden + at, scaled * tl.load(weight + at, mask=inside, other=0.0), mask=inside)


@compiled
def _norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    tokens, hidden = x.shape
    for t in range(tokens):
        square = np.float32(0)
        for i in range(hidden):
            square += x[t, i] * x[t, i]
        scale = np.float32(1 / math.sqrt(square / hidden + eps))
        for i in range(hidden):
            out[t, i] = x[t, i] * scale * weight[i]


@compiled
def add_norm_rows(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """residual += x; out = the norm of that, all [tokens, hidden]."""
    tokens, hidden = x.shape
    for t in range(tokens):
        square = np.float32(0)
        for i in range(hidden):
            total = x[t, i] + residual[t, i]
            residual[t, i] = total
            square += total * total
        scale = np.float32(1 / math.sqrt(square / hidden + eps))
        for i in range(hidden):
            out[t, i] = residual[t, i] * scale * weight[i]
