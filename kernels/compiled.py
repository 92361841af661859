"""How CPU kernels are compiled: Numba, to machine code for this very processor, cached on disk after the first run.

A decode step of a small model is a few hundred operations on a few kilobytes each. Torch spends more time entering and
leaving them than computing; a compiled loop over the same arrays does not, and runs without holding the GIL.

A GPU has kernels of its own: a machine that computes on one does without Numba.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

try:
    import numba
    import numba.core.cgutils
    import numba.extending

    from .shared_compilation import share
except ImportError:
    numba = None  # type: ignore[assignment]

AVAILABLE = numba is not None
"""Whether anything can be compiled; if not, `compiled` functions stay what they are, far too slow to be used."""

prange: type[range] = numba.prange if AVAILABLE else range
"""A range whose turns may go to several threads, in functions under `compiled_parallel`."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Sums may be reordered and contracted to use the vector units. NaN and infinity keep their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}


def _prefer_tbb() -> None:
    """Let oneTBB run parallel loops where it is installed.

    Its threads steal work: one that gets no core delays nobody. OpenMP's wait for each other, and with a second process
    on the same two cores every loop then takes half a millisecond instead of 20 µs (measured; see docs/decisions).
    """
    if not AVAILABLE:
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        for file in importlib.metadata.files("tbb") or ():
            if file.name.startswith("libtbb.so.12"):
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
                numba.config.THREADING_LAYER = "tbb"  # type: ignore[attr-defined]
                return


_prefer_tbb()


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function over arrays and scalars at its first call, or load it from the cache. Releases the GIL.

    Where processes of a host need the same, one compiles it, and the others wait for that.
    """
    if not AVAILABLE:
        return function
    return _compiled(function, parallel=False)


def compiled_parallel(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`compiled`, with its ``prange`` loops spread over the threads that `set_num_threads` allows the caller."""
    if not AVAILABLE:
        return function
    return _compiled(function, parallel=True)


def _compiled(function: Callable[_P, _R], parallel: bool) -> Callable[_P, _R]:
    jitted: Callable[_P, _R] = numba.njit(nogil=True, cache=True, fastmath=_FAST_MATH, parallel=parallel)(function)
    share(jitted)
    return jitted


def set_num_threads(count: int) -> None:
    """How many threads one compiled operation of the calling thread may use."""
    if AVAILABLE:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def num_threads() -> int:
    """How many threads a compiled operation of the calling thread uses."""
    return int(numba.get_num_threads()) if AVAILABLE else 1


def move_bytes(target: np.ndarray, to: int, source: np.ndarray, start: int, size: int) -> None:
    """target[to : to + size] = source[start : start + size], by memcpy: for `compiled` functions.

    Numba's own assignment of slices copies byte by byte, at a fourth of the speed.

    Args:
        target: [bytes] uint8, contiguous.
        to: where to.
        source: [bytes] uint8, contiguous, other memory.
        start: where from.
        size: bytes.
    """
    target[to : to + size] = source[start : start + size]


if AVAILABLE:

    @numba.extending.intrinsic
    def _move_bytes(context, target, to, source, start, size):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            ends = [
                builder.gep(context.make_array(kind)(context, builder, array).data, [offset])
                for kind, array, offset in zip(signature.args[0:4:2], values[0:4:2], values[1:4:2], strict=True)
            ]
            numba.core.cgutils.raw_memcpy(builder, ends[0], ends[1], values[4], 1)
            return context.get_dummy_value()

        return numba.types.void(target, to, source, start, size), generate

    move_bytes = _move_bytes  # type: ignore[assignment]
