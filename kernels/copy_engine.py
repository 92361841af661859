"""Copy large byte ranges by a GPU's copy engines, which take none of its processors; `gather` is for small ranges.

An engine needs some microseconds for each range: 32 KiB ones crawl, those of a megabyte and more use the whole link.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from .cuda_memory import call, runtime

_IN_STREAM_ORDER = 1
"""cudaMemcpySrcAccessOrderStream: the source is read when the stream gets there."""


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location_type", ctypes.c_int),
        ("source_location_id", ctypes.c_int),
        ("target_location_type", ctypes.c_int),
        ("target_location_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    )


def copy_ranges(
    source: int,
    target: int,
    source_offsets: np.ndarray,
    target_offsets: np.ndarray,
    sizes: np.ndarray,
    stream: torch.cuda.Stream,
) -> None:
    """Queue one copy for each range, all of them by one call where CUDA has it (13 and later). Does not wait for them.

    Args:
        source: address, of the GPU's memory, a peer's or registered memory of the host.
        target: likewise.
        source_offsets: [ranges] int64, bytes.
        target_offsets: [ranges] int64, bytes.
        sizes: [ranges] int64, bytes > 0.
        stream: any but the default one; its device is the current one.

    Raises:
        ImportError: cuda-bindings is not installed.
        OSError: CUDA refuses.
    """
    library = _library()
    if library is None:
        kind = runtime().cudaMemcpyKind.cudaMemcpyDefault
        ranges = zip(source_offsets.tolist(), target_offsets.tolist(), sizes.tolist(), strict=True)
        for here, there, size in ranges:
            call("cudaMemcpyAsync", target + there, source + here, size, kind, stream.cuda_stream)
        return
    sources, targets = np.ascontiguousarray(source_offsets + source), np.ascontiguousarray(target_offsets + target)
    sizes = np.ascontiguousarray(sizes)
    attributes, first = _Attributes(_IN_STREAM_ORDER), ctypes.c_size_t(0)
    status = library.cudaMemcpyBatchAsync(
        *(ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)), ctypes.c_size_t(len(sizes)),
        ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1), ctypes.c_void_p(stream.cuda_stream),
    )  # fmt: skip
    if status:
        library.cudaGetLastError()
        raise OSError(f"cudaMemcpyBatchAsync: CUDA's error {status} for {len(sizes)} ranges")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """CUDA's runtime, the one that torch has loaded, if it knows batches. Its bindings for Python take lists, whose
    making costs as much as the copies."""
    major = int((torch.version.cuda or "0").split(".")[0])
    if major < 13:  # 12.8 has the call with one argument more
        return None
    try:
        library = ctypes.CDLL(f"libcudart.so.{major}")
        library.cudaMemcpyBatchAsync  # noqa: B018
    except (OSError, AttributeError):
        return None
    return library
