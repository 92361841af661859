"""``x @ weight.T + bias``.

Small weights stay in a core's cache, and a compiled loop over them beats every library, which must first find out
what it is asked. Large ones go to oneDNN, which on processors that are not Intel's is twice as fast as the BLAS
behind torch's own linear (AMD EPYC with AVX-512, float32, one core: 253 against 112 GFLOP/s); but oneDNN compiles
code for every new number of rows, which small products do not pay back.

On a GPU `small_linear` serves few rows, with which cuBLAS leaves bandwidth unused (H100, one row, bfloat16: it reads
weights of Qwen3-8B's sizes at 2,022 to 2,858 GB/s, of 3,024 that a copy makes).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import small_linear
from .compiled import compiled, compiled_parallel, num_threads, prange
from .widen import bits_of, widen

MAX_COMPILED_WEIGHTS = 1 << 21
_MIN_PARALLEL_PRODUCTS = 1 << 19


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product, by torch.

    Args:
        x: [tokens, inputs], any floating dtype.
        weight: [outputs, inputs], dtype of ``x``.
        bias: [outputs] or None.

    Returns:
        [tokens, outputs], dtype of ``x``.
    """
    return torch.nn.functional.linear(x, weight, bias)


def native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference` for float32 on a CPU, contiguous arguments. A small ``weight`` may be bfloat16."""
    if weight.numel() > MAX_COMPILED_WEIGHTS:
        return wide(x, weight, bias)
    out = np.empty((len(x), len(weight)), np.float32)
    threads = num_threads()
    if threads == 1 or len(x) * weight.numel() < _MIN_PARALLEL_PRODUCTS:
        dot_rows(x.numpy(), bits_of(weight), out)
    elif len(x) >= 8 * threads:
        _split_rows(x.numpy(), bits_of(weight), out, threads)
    else:
        _split_columns(x.numpy(), bits_of(weight), out, threads)
    if bias is not None:
        out += bias.numpy()
    return torch.from_numpy(out)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference` on a GPU."""
    plan = small_linear.plan_for(x, weight) if len(x) else None
    return reference(x, weight, bias) if plan is None else small_linear.multiply(x, weight, bias, plan)


def _onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """oneDNN's product where this build of torch has it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, weight, bias: product(x, weight, bias, "none", [], "")


wide: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _onednn() or reference
"""The product with large weights: float32, on a CPU."""


@compiled_parallel
def _split_rows(x: np.ndarray, weight: np.ndarray, out: np.ndarray, parts: int) -> None:
    rows = len(x)
    for part in prange(parts):
        # Whole blocks of four rows for each part.
        start = rows * part // parts // 4 * 4
        stop = rows if part == parts - 1 else rows * (part + 1) // parts // 4 * 4
        dot_rows(x[start:stop], weight, out[start:stop])


@compiled_parallel
def _split_columns(x: np.ndarray, weight: np.ndarray, out: np.ndarray, parts: int) -> None:
    outputs = len(weight)
    for part in prange(parts):
        # Whole cache lines of the result for each part.
        start = outputs * part // parts // 16 * 16
        stop = outputs if part == parts - 1 else outputs * (part + 1) // parts // 16 * 16
        columns = np.empty((len(x), stop - start), np.float32)
        dot_rows(x, weight[start:stop], columns)
        out[:, start:stop] = columns


@compiled
def dot_rows(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """out[i, j] = Σₖ x[i, k] · weight[j, k]; float32, contiguous rows; ``weight`` also as the bits of bfloat16.

    Dot products along contiguous memory, in tiles of four rows and four outputs: eight loads feed sixteen
    multiply-adds, and the sums stay in registers (measured on one core with AVX-512: 167 GFLOP/s, where BLAS reaches
    112).
    """
    rows = len(x)
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        _tile_4(x[i : i + 4], weight, out[i : i + 4])
    if rows - whole >= 2:
        _tile_2(x[whole : whole + 2], weight, out[whole : whole + 2])
        whole += 2
    if rows > whole:
        _tile_1(x[whole], weight, out[whole])


@compiled
def _tile_4(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    outputs, inputs = weight.shape
    whole = outputs - outputs % 4
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        a0 = a1 = a2 = a3 = np.float32(0)
        b0 = b1 = b2 = b3 = np.float32(0)
        c0 = c1 = c2 = c3 = np.float32(0)
        d0 = d1 = d2 = d3 = np.float32(0)
        for k in range(inputs):
            p, q, r, s = x0[k], x1[k], x2[k], x3[k]
            t, u, v, w = widen(w0[k]), widen(w1[k]), widen(w2[k]), widen(w3[k])
            a0 += p * t
            a1 += p * u
            a2 += p * v
            a3 += p * w
            b0 += q * t
            b1 += q * u
            b2 += q * v
            b3 += q * w
            c0 += r * t
            c1 += r * u
            c2 += r * v
            c3 += r * w
            d0 += s * t
            d1 += s * u
            d2 += s * v
            d3 += s * w
        out[0, j], out[0, j + 1], out[0, j + 2], out[0, j + 3] = a0, a1, a2, a3
        out[1, j], out[1, j + 1], out[1, j + 2], out[1, j + 3] = b0, b1, b2, b3
        out[2, j], out[2, j + 1], out[2, j + 2], out[2, j + 3] = c0, c1, c2, c3
        out[3, j], out[3, j + 1], out[3, j + 2], out[3, j + 3] = d0, d1, d2, d3
    for j in range(whole, outputs):
        for i in range(4):
            out[i, j] = _dot(x[i], weight[j])


@compiled
def _tile_2(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    outputs, inputs = weight.shape
    whole = outputs - outputs % 4
    x0, x1 = x[0], x[1]
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        a0 = a1 = a2 = a3 = np.float32(0)
        b0 = b1 = b2 = b3 = np.float32(0)
        for k in range(inputs):
            p, q = x0[k], x1[k]
            t, u, v, w = widen(w0[k]), widen(w1[k]), widen(w2[k]), widen(w3[k])
            a0 += p * t
            a1 += p * u
            a2 += p * v
            a3 += p * w
            b0 += q * t
            b1 += q * u
            b2 += q * v
            b3 += q * w
        out[0, j], out[0, j + 1], out[0, j + 2], out[0, j + 3] = a0, a1, a2, a3
        out[1, j], out[1, j + 1], out[1, j + 2], out[1, j + 3] = b0, b1, b2, b3
    for j in range(whole, outputs):
        for i in range(2):
            out[i, j] = _dot(x[i], weight[j])


@compiled
def _tile_1(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    outputs, inputs = weight.shape
    whole = outputs - outputs % 4
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        a0 = a1 = a2 = a3 = np.float32(0)
        for k in range(inputs):
            p = x[k]
            a0 += p * widen(w0[k])
            a1 += p * widen(w1[k])
            a2 += p * widen(w2[k])
            a3 += p * widen(w3[k])
        out[j], out[j + 1], out[j + 2], out[j + 3] = a0, a1, a2, a3
    for j in range(whole, outputs):
        out[j] = _dot(x, weight[j])


@compiled
def _dot(x: np.ndarray, y: np.ndarray) -> np.float32:
    total = np.float32(0)
    for k in range(len(x)):
        total += x[k] * widen(y[k])
    return total
