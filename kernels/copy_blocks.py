"""Copy many blocks of equal size between addresses in one call."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .compiled import AVAILABLE, compiled

_memcpy: Any = None
if AVAILABLE:
    from numba import types

    _memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


def reference(sources: np.ndarray, targets: np.ndarray, size: int) -> None:
    """Copy blocks. They must not overlap.

    Args:
        sources: [blocks] int64, addresses in this process's memory.
        targets: [blocks] int64, likewise.
        size: bytes of a block.
    """
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        ctypes.memmove(target, source, size)


def native(sources: np.ndarray, targets: np.ndarray, size: int) -> None:
    """`reference`, without the GIL."""
    if not AVAILABLE:
        reference(sources, targets, size)
        return
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources, and {len(targets)} targets")
    _copy(sources, targets, size)


@compiled
def _copy(sources: np.ndarray, targets: np.ndarray, size: int) -> None:
    for i in range(len(sources)):
        _memcpy(targets[i], sources[i], size)
