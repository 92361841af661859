"""What every transport does: move byte ranges from a peer's memory into this process's.

Threading: one thread, the owner, calls every method. A transport may have threads of its own; they call ``notify``,
which must be thread-safe and quick, whenever `poll` has something new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np

from ...core.ids import PeerId
from ...kernels import copy_runs
from ..layout import Runs
from ..memory import Buffer

Notify = Callable[[], None]


class Region(NamedTuple):
    """A named part of this process's memory that peers may read, and that reads may land in."""

    name: str
    buffer: Buffer


class Read(NamedTuple):
    """Ranges of one of a peer's regions, and where they go in one of ours."""

    peer: PeerId
    source: str
    target: str
    runs: Runs
    source_dtype: str = ""
    """Both empty or equal: bytes are copied as they are."""
    target_dtype: str = ""
    """Else elements are converted on the way: the runs' sizes are the source's, the target's are
    ``sizes * bytes(target_dtype) // bytes(source_dtype)``."""

    @property
    def converts(self) -> bool:
        """Whether elements change their dtype."""
        return self.source_dtype != self.target_dtype


class TransferResult(NamedTuple):
    """How one submitted read ended. ``error`` is empty when every byte has landed."""

    number: int
    error: str = ""


class Transport(Protocol):
    """Moves bytes between registered regions; knows nothing of requests or blocks."""

    name: str
    converts: bool
    """Whether `submit` takes reads whose dtypes differ."""
    memory: frozenset[str]
    """Kinds of region that it can move: "host", "cuda"."""

    def register(self, region: Region) -> None:
        """Make a region readable by peers and writable by reads. Before `descriptor`."""
        ...

    def descriptor(self) -> bytes:
        """What a peer must know to read from here; opaque, travels in the handshake."""
        ...

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        """Get ready to read from a peer.

        Raises:
            TransferError: this peer cannot be reached by this transport; says why.
        """
        ...

    def remove_peer(self, peer: PeerId) -> None:
        """Forget a peer: its unfinished reads end with an error. Unknown peers are ignored."""
        ...

    def submit(self, read: Read) -> int:
        """Start a read, and return its number. Never blocks; a peer's errors come from `poll`."""
        ...

    def poll(self) -> list[TransferResult]:
        """Drive progress, and return the reads that ended since the last call. Does not block."""
        ...

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        """Give reads up. Returns those still draining: their target stays in use until `poll` reports them. The others
        are gone: nothing will be written for them, and `poll` will not report them."""
        ...

    def close(self) -> None:
        """Stop, and let go of all memory. Idempotent, and safe after a partial start."""
        ...


def bytes_of(regions: dict[str, Region], name: str) -> np.ndarray | None:
    """A registered region's bytes, or None."""
    region = regions.get(name)
    return None if region is None else region.buffer.array


def copy_checked(read: Read, source: np.ndarray | None, target: np.ndarray | None) -> str:
    """Copy a read's ranges between two buffers of this process's address space; returns why not, or ""."""
    if source is None:
        return f"{read.peer} has no region {read.source}"
    if target is None:
        return f"there is no local region {read.target}"
    error = check_runs(read.runs, len(source), len(target))
    if not error:
        copy_runs.native(source, target, *read.runs)
    return error


def check_runs(runs: Runs, source_bytes: int, target_bytes: int) -> str:
    """Why these ranges cannot be copied between buffers of these sizes, or "". Safe for any values."""
    if len(runs.sizes) == 0:
        return ""
    if int(runs.sizes.min()) <= 0 or int(runs.source_offsets.min()) < 0 or int(runs.target_offsets.min()) < 0:
        return "a range is empty or starts before its region"
    for offsets, limit, whose in (
        (runs.source_offsets, source_bytes, "the peer's"),
        (runs.target_offsets, target_bytes, "the local"),
    ):
        # Each bound alone first: their sum could overflow.
        if int(offsets.max()) > limit or int(runs.sizes.max()) > limit or int((offsets + runs.sizes).max()) > limit:
            return f"a range ends beyond {whose} region of {limit} bytes"
    return ""
