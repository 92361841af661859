"""Memory that a peer on the same host can map, and that the kernel frees whatever happens to its owner.

The memory is an anonymous file (memfd_create, Linux): it has no name in any file system, so a killed process leaves
nothing behind. A peer opens it through ``/proc/<pid>/fd/<n>``, and checks a random token against its name there, so
that a reused process id is never mistaken for the owner. A mapping outlives its owner's death.
"""

from __future__ import annotations

import mmap
import os
import secrets

import msgspec
import numpy as np

from ..core.errors import TransferError


class SharedMemory(msgspec.Struct, frozen=True):
    """Where a peer finds a buffer."""

    pid: int
    descriptor: int
    token: str
    num_bytes: int


class Buffer:
    """Host memory: `array` is [num_bytes] uint8, zeroed; pages are taken when they are first touched.

    Args:
        num_bytes: ≥ 1.
    """

    kind = "host"

    def __init__(self, num_bytes: int) -> None:
        self.shared: SharedMemory | None = None
        """How peers reach it, or None where the system has no anonymous files."""
        self._descriptor = -1
        if hasattr(os, "memfd_create"):
            token = secrets.token_hex(12)
            self._descriptor = os.memfd_create(f"tandem-{token}", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, num_bytes)
            self._map = mmap.mmap(self._descriptor, num_bytes)
            self.shared = SharedMemory(os.getpid(), self._descriptor, token, num_bytes)
        else:
            self._map = mmap.mmap(-1, num_bytes)
        self.array = np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Give the file up; the memory goes with the last array that refers to it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def map_shared(shared: SharedMemory) -> np.ndarray:
    """Map a peer's buffer, for reading: [num_bytes] uint8.

    Raises:
        TransferError: it cannot be opened from here: the owner is gone, or lives on another host or in another
        container.
    """
    path = f"/proc/{shared.pid}/fd/{shared.descriptor}"
    try:
        if os.readlink(path) != f"/memfd:tandem-{shared.token} (deleted)":
            raise TransferError(f"{path} is not the peer's memory: the peer is on another host, or gone")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransferError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_size != shared.num_bytes:
            raise TransferError(f"{path} has {os.fstat(descriptor).st_size} bytes, expected {shared.num_bytes}")
        return np.frombuffer(mmap.mmap(descriptor, shared.num_bytes, prot=mmap.PROT_READ), np.uint8)
    finally:
        os.close(descriptor)
