"""Memory that a peer on the same host can map, and that the system frees whatever happens to its owner.

Host memory is an anonymous file (memfd_create, Linux): it has no name in any file system, so a killed process leaves
nothing behind. A peer opens it through ``/proc/<pid>/fd/<n>``, and checks a random token against its name there, so
that a reused process id is never mistaken for the owner. GPU memory is an allocation of CUDA's own, which a peer opens
by its handle. Either mapping outlives its owner's death.
"""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, TransferError
from ..kernels.cuda_memory import Allocation


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

    @classmethod
    def over(cls, array: np.ndarray) -> Buffer:
        """Memory that somebody else has: [num_bytes] uint8. Peers cannot map it."""
        buffer = cls.__new__(cls)
        buffer.shared, buffer._descriptor, buffer.array = None, -1, array
        return buffer

    def close(self) -> None:
        """Give the file up; the memory goes with the last array that refers to it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DeviceBuffer:
    """Memory of one GPU, uninitialized.

    Attributes:
        address: a multiple of 2 MiB.
        handle: opens it in another process of the host (cudaIpcMemHandle_t, 64 bytes).
        memory: the allocation; it lives as long as anybody refers to it.

    Args:
        num_bytes: ≥ 1.
        device: the GPU's number in this process.

    Raises:
        ConfigError: the GPU's memory cannot be shared; says why.
        torch.OutOfMemoryError: so much is not free.
    """

    kind = "cuda"

    def __init__(self, num_bytes: int, device: int) -> None:
        self.num_bytes = num_bytes
        self.device = device
        try:
            self.memory: Allocation | None = Allocation(num_bytes, device)
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"GPU memory that other processes can read could not be made: {error}",
                fix="pip install 'tandem[gpu]' brings CUDA's Python bindings",
            ) from None
        self.address, self.handle = self.memory.address, self.memory.handle

    def tensor(self) -> Tensor:
        """The memory as [num_bytes] uint8; it lives as long as any tensor of it does."""
        return torch.as_tensor(self.memory, device=torch.device("cuda", self.device))

    def close(self) -> None:
        """Give the memory up; it goes with the last tensor, or reader in this process, of it. Idempotent."""
        self.memory = None


def host_id() -> str:
    """Equal in all processes that run under the same kernel, in containers, too; differs between hosts and boots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def map_shared(shared: SharedMemory, *, writable: bool = False) -> np.ndarray:
    """Map another process's buffer: [num_bytes] uint8, for reading unless ``writable``.

    Raises:
        TransferError: it cannot be opened from here: the owner is gone, or lives on another host or in another
        container.
    """
    path = f"/proc/{shared.pid}/fd/{shared.descriptor}"
    try:
        if os.readlink(path) != f"/memfd:tandem-{shared.token} (deleted)":
            raise TransferError(f"{path} is not the peer's memory: the peer is on another host, or gone")
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise TransferError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_size != shared.num_bytes:
            raise TransferError(f"{path} has {os.fstat(descriptor).st_size} bytes, expected {shared.num_bytes}")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return np.frombuffer(mmap.mmap(descriptor, shared.num_bytes, prot=access), np.uint8)
    finally:
        os.close(descriptor)
