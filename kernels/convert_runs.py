"""Copy many ranges of elements between two buffers, and convert them to another dtype on the way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import copy_runs

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Of elements that can be converted into each other, by the names that peers tell."""


def convert(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values``, on the CPU, in another dtype, rounded to nearest, ties to even.

    What fp8 e4m3 cannot hold becomes ±448, its largest number (Micikevicius et al. 2022, arXiv:2209.05433), as the
    cache's own kernels store it; NaN stays NaN.
    """
    if values.dtype == dtype:
        return values
    if dtype == torch.float8_e4m3fn:
        return values.float().clamp(-448.0, 448.0).to(dtype)
    if values.dtype == torch.float8_e4m3fn:  # looked up: torch takes seven times as long
        all_values = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(dtype)
        integers = all_values.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
        return torch.from_numpy(integers[values.view(torch.uint8).numpy()]).view(dtype)
    return values.to(dtype)


def reference(
    source: np.ndarray,
    target: np.ndarray,
    source_offsets: np.ndarray,
    target_offsets: np.ndarray,
    sizes: np.ndarray,
    source_dtype: str,
    target_dtype: str,
) -> None:
    """target[t : t + m] = the elements of source[s : s + n], converted, for each range; m / n is the ratio of the
    elements' sizes. Ranges must lie inside the buffers; those of the target must not overlap.

    Args:
        source: [bytes] uint8.
        target: [bytes] uint8, another buffer.
        source_offsets: [ranges] int64.
        target_offsets: [ranges] int64.
        sizes: [ranges] int64, bytes at the source, whole elements.
        source_dtype: one of `DTYPES`.
        target_dtype: one of `DTYPES`.
    """
    for s, t, n in zip(source_offsets.tolist(), target_offsets.tolist(), sizes.tolist(), strict=True):
        values = torch.from_numpy(source[s : s + n].copy()).view(DTYPES[source_dtype])
        converted = convert(values, DTYPES[target_dtype]).view(torch.uint8).numpy()
        target[t : t + len(converted)] = converted


def native(
    source: np.ndarray,
    target: np.ndarray,
    source_offsets: np.ndarray,
    target_offsets: np.ndarray,
    sizes: np.ndarray,
    source_dtype: str,
    target_dtype: str,
) -> None:
    """`reference`, with one conversion for all ranges: what is scattered is packed first."""
    if len(sizes) == 0:
        return
    packed_offsets = np.cumsum(sizes) - sizes
    num_bytes = int(sizes.sum())
    start = int(source_offsets[0])
    if (source_offsets - start == packed_offsets).all() and source.flags.writeable:
        packed = source[start : start + num_bytes]
    else:
        packed = np.empty(num_bytes, np.uint8)
        copy_runs.native(source, packed, source_offsets, packed_offsets, sizes)
    from_, to = DTYPES[source_dtype], DTYPES[target_dtype]
    converted = convert(torch.from_numpy(packed).view(from_), to).view(torch.uint8).numpy()
    copy_runs.native(
        converted,
        target,
        packed_offsets // from_.itemsize * to.itemsize,
        target_offsets,
        sizes // from_.itemsize * to.itemsize,
    )
