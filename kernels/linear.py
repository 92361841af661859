"""``x @ weight.T + bias``.

With few rows the work is reading the weights once; the compiled version does that in one pass over four rows at a time.
With many rows oneDNN's matrix product is used, which on processors that are not Intel's is twice as fast as the BLAS
behind torch's own linear (measured on an AMD EPYC with AVX-512, float32: 253 against 112 GFLOP/s a core).
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from .compiled import compiled, compiled_parallel, num_threads

MAX_COMPILED_ROWS = 16
MAX_COMPILED_WEIGHTS = 1 << 21
_MIN_PARALLEL_WEIGHTS = 1 << 16


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
    """`reference` for float32 on a CPU, contiguous arguments."""
    tokens, outputs = x.shape[0], weight.shape[0]
    if tokens > MAX_COMPILED_ROWS or weight.numel() > MAX_COMPILED_WEIGHTS:
        return wide(x, weight, bias)
    out = np.empty((tokens, outputs), np.float32)
    threads = num_threads()
    if threads > 1 and weight.numel() >= _MIN_PARALLEL_WEIGHTS:
        _dot_rows_parallel(x.numpy(), weight.numpy(), out, threads)
    else:
        dot_rows(x.numpy(), tokens, weight.numpy(), out)
    if bias is not None:
        out += bias.numpy()
    return torch.from_numpy(out)


def _onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """oneDNN's product where this build of torch has it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, weight, bias: product(x, weight, bias, "none", [], "")


wide: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _onednn() or reference
"""The product for many rows: float32, on a CPU."""


@compiled_parallel
def _dot_rows_parallel(x: np.ndarray, weight: np.ndarray, out: np.ndarray, parts: int) -> None:
    outputs = weight.shape[0]
    for part in numba.prange(parts):
        # Whole cache lines of the result for each part.
        start = outputs * part // parts // 16 * 16
        stop = outputs if part == parts - 1 else outputs * (part + 1) // parts // 16 * 16
        columns = np.empty((len(x), stop - start), np.float32)
        dot_rows(x, len(x), weight[start:stop], columns)
        out[:, start:stop] = columns


@compiled
def dot_rows(x: np.ndarray, rows: int, weight: np.ndarray, out: np.ndarray) -> None:
    """out[i, j] = Σₖ x[i, k] · weight[j, k] for i < rows; float32, C-contiguous.

    Dot products along contiguous memory, blocked so that a vector of weights loaded once serves four rows, or, for the
    last rows, a vector of ``x`` four outputs.
    """
    outputs, inputs = weight.shape
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        for j in range(outputs):
            s0 = np.float32(0)
            s1 = np.float32(0)
            s2 = np.float32(0)
            s3 = np.float32(0)
            for k in range(inputs):
                w = weight[j, k]
                s0 += x[i, k] * w
                s1 += x[i + 1, k] * w
                s2 += x[i + 2, k] * w
                s3 += x[i + 3, k] * w
            out[i, j] = s0
            out[i + 1, j] = s1
            out[i + 2, j] = s2
            out[i + 3, j] = s3
    for i in range(whole, rows):
        for j in range(0, outputs - outputs % 4, 4):
            s0 = np.float32(0)
            s1 = np.float32(0)
            s2 = np.float32(0)
            s3 = np.float32(0)
            for k in range(inputs):
                a = x[i, k]
                s0 += a * weight[j, k]
                s1 += a * weight[j + 1, k]
                s2 += a * weight[j + 2, k]
                s3 += a * weight[j + 3, k]
            out[i, j] = s0
            out[i, j + 1] = s1
            out[i, j + 2] = s2
            out[i, j + 3] = s3
        for j in range(outputs - outputs % 4, outputs):
            s0 = np.float32(0)
            for k in range(inputs):
                s0 += x[i, k] * weight[j, k]
            out[i, j] = s0
