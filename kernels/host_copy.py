"""Copy small arrays between a GPU and pinned memory of the host by the GPU's processors.

A copy engine does one copy after the other: a step's few kilobytes would wait there behind all the KV that goes the
same way.
"""

from __future__ import annotations

from torch import Tensor

from .on_gpu import kernel_varying, tl

_BLOCK = 1024


def reference(source: Tensor, target: Tensor) -> None:
    """Copy.

    Args:
        source: [n] int64.
        target: [n] int64, elsewhere.
    """
    target.copy_(source)


def fused(source: Tensor, target: Tensor) -> None:
    """`reference` on a GPU, in the order of the current stream. Does not wait for it: whoever gives pinned memory keeps
    it until the stream is done."""
    count = len(source)
    if count:
        _copy_kernel[(-(-count // _BLOCK),)](source, target, count, _BLOCK)


@kernel_varying("source", "target", "count")
def _copy_kernel(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)
