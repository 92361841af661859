"""Copy many byte ranges between two buffers in one call; `copy_rows` does it on a GPU."""

from __future__ import annotations

import numpy as np

from .compiled import AVAILABLE, compiled, move_bytes


def reference(
    source: np.ndarray, target: np.ndarray, source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray
) -> None:
    """target[t : t + n] = source[s : s + n] for each range. Ranges must lie inside the buffers and not overlap.

    Args:
        source: [bytes] uint8.
        target: [bytes] uint8, another buffer.
        source_offsets: [ranges] int64.
        target_offsets: [ranges] int64.
        sizes: [ranges] int64, bytes each.
    """
    for s, t, n in zip(source_offsets.tolist(), target_offsets.tolist(), sizes.tolist(), strict=True):
        target[t : t + n] = source[s : s + n]


def native(
    source: np.ndarray, target: np.ndarray, source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray
) -> None:
    """`reference`, without the GIL."""
    if not AVAILABLE:
        reference(source, target, source_offsets, target_offsets, sizes)
        return
    _copy(_read_only(source), target, _read_only(source_offsets), _read_only(target_offsets), _read_only(sizes))


def _read_only(array: np.ndarray) -> np.ndarray:
    """Mapped memory and received frames are read-only, others are not: compile for one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


@compiled
def _copy(
    source: np.ndarray, target: np.ndarray, source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray
) -> None:
    for i in range(len(sizes)):
        move_bytes(target, target_offsets[i], source, source_offsets[i], sizes[i])
