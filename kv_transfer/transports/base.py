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
from ..memory import Buffer, DeviceBuffer, SharedMemory

Notify = Callable[[], None]


class Region(NamedTuple):
    """A named part of this process's memory that peers may read, and that reads may land in."""

    name: str
    buffer: Buffer | DeviceBuffer


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
    """Kinds of buffer whose contents it is for, "host" or "cuda"; small host regions travel by every transport."""

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
    """A registered region's bytes, or None, also where a GPU has them."""
    region = regions.get(name)
    return region.buffer.array if region is not None and isinstance(region.buffer, Buffer) else None


def shared_of(regions: dict[str, Region]) -> dict[str, SharedMemory]:
    """How a peer on this host reaches those regions that it can map."""
    buffers = {name: region.buffer for name, region in regions.items()}
    return {name: b.shared for name, b in buffers.items() if isinstance(b, Buffer) and b.shared is not None}


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


def check_runs(
    runs: Runs, source_bytes: int, target_bytes: int, source_element: int = 1, target_element: int = 1
) -> str:
    """Why these ranges cannot be copied between buffers of these sizes, or "". Safe for any values.

    Args:
        runs: the ranges.
        source_bytes: of the peer's buffer.
        target_bytes: of ours.
        source_element: bytes of the elements that are read.
        target_element: bytes of what they become.
    """
    if len(runs.sizes) == 0:
        return ""
    if int(runs.sizes.min()) <= 0 or int(runs.source_offsets.min()) < 0 or int(runs.target_offsets.min()) < 0:
        return "a range is empty or starts before its region"
    for offsets, element, limit, whose in (
        (runs.source_offsets, source_element, source_bytes, "the peer's"),
        (runs.target_offsets, target_element, target_bytes, "the local"),
    ):
        sizes = runs.sizes if element == source_element else runs.sizes // source_element * element
        # Each bound alone first: their sum could overflow.
        if int(offsets.max()) > limit or int(sizes.max()) > limit or int((offsets + sizes).max()) > limit:
            return f"a range ends beyond {whose} region of {limit} bytes"
        whole = element == 1 or not (offsets % element).any()
        if not whole or (source_element > 1 and (runs.sizes % source_element).any()):
            return f"a range is not of whole elements of {element} bytes in {whose} region"
    return ""
