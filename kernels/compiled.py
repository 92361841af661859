"""How CPU kernels are compiled: Numba, to machine code for this very processor, cached on disk after the first run.

A decode step of a small model is a few hundred operations on a few kilobytes each. Torch spends more time entering and
leaving them than computing; a compiled loop over the same arrays does not, and runs without holding the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba
import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Sums may be reordered and contracted to use the vector units. NaN and infinity keep their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function over NumPy arrays and scalars at its first call, or load it from the cache. Releases the GIL."""
    jitted: Callable[_P, _R] = numba.njit(nogil=True, cache=True, fastmath=_FAST_MATH)(function)
    return jitted


def compiled_parallel(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`compiled`, with its ``prange`` loops spread over the threads that `set_num_threads` allows the caller."""
    jitted: Callable[_P, _R] = numba.njit(nogil=True, cache=True, fastmath=_FAST_MATH, parallel=True)(function)
    return jitted


def set_num_threads(count: int) -> None:
    """How many threads one operation of the calling thread may use, torch's and compiled ones."""
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def num_threads() -> int:
    """How many threads a compiled operation of the calling thread uses."""
    return int(numba.get_num_threads())
