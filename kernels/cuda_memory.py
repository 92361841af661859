"""GPU memory that is CUDA's own, and that other processes of the host can map.

Torch's allocator gives out parts of larger pieces: a handle names a whole piece, and would open all of it to the peers.
CUDA itself shares memory by pieces of 2 MiB, so an allocation takes whole ones and has no neighbours.

Every function leaves torch's current device as it was.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

HANDLE_BYTES = 64
"""Of a cudaIpcMemHandle_t."""

_PIECE_BYTES = 2 << 20

_unfreed: list[tuple[int, int]] = []
"""Addresses and GPUs of what lost its last user while a graph was recorded: freeing it would have spoiled that."""


@functools.cache
def runtime() -> Any:
    """CUDA's runtime, as Python sees it.

    Raises:
        ImportError: cuda-bindings is not installed.
    """
    return importlib.import_module("cuda.bindings.runtime")


def call(name: str, *arguments: Any) -> Any:
    """Call one of the runtime's functions; returns what it returns beside its status.

    Raises:
        OSError: it failed; says which, and CUDA's name for the error.
    """
    error, *values = getattr(runtime(), name)(*arguments)
    if int(error):
        # The runtime also remembers it, and would tell it to whoever asks next.
        runtime().cudaGetLastError()
        raise OSError(f"{name}: {error.name}")
    return values[0] if values else None


class Allocation:
    """Memory of one GPU, uninitialized, freed when nothing refers to this any more; tensors made of it do.

    Torch and others take it as it is, see https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html.

    Attributes:
        address: a multiple of 2 MiB.
        handle: opens it in another process of the host.

    Args:
        num_bytes: ≥ 1.
        device: the GPU's number in this process.

    Raises:
        ImportError: cuda-bindings is not installed.
        OSError: CUDA refuses; for lack of memory, `torch.OutOfMemoryError` instead.
    """

    def __init__(self, num_bytes: int, device: int) -> None:
        with _current(device):
            self.address = _allocate(-(-num_bytes // _PIECE_BYTES) * _PIECE_BYTES)
            # Not at exit: the driver has gone by then, and the memory with it.
            free = weakref.finalize(self, _free, self.address, device)
            free.atexit = False
            try:
                self.handle = bytes(call("cudaIpcGetMemHandle", self.address).reserved)
            except OSError:
                free()
                raise
        place = {"shape": (num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}
        self.__cuda_array_interface__ = place


def clear(address: int, num_bytes: int, device: int) -> None:
    """Write zeros, and wait for them."""
    with _current(device):
        call("cudaMemset", address, 0, num_bytes)
        call("cudaDeviceSynchronize")


def open_handle(handle: bytes, device: int) -> int:
    """Map another process's allocation for a GPU of this one. What is opened twice must be closed twice.

    The mapping, and the memory, outlive the process whose memory it is.

    Returns:
        its address here.

    Raises:
        OSError: it cannot be mapped: no such memory, or no way from GPU to GPU.
    """
    with _current(device):
        # A handle is mapped into the device that is current, and that is the one which reads.
        opened = runtime().cudaIpcMemHandle_t()
        opened.reserved = handle
        return int(call("cudaIpcOpenMemHandle", opened, runtime().cudaIpcMemLazyEnablePeerAccess))


def close_handle(address: int, device: int) -> None:
    """Unmap what `open_handle` mapped. Nothing may use it any more."""
    with _current(device):
        call("cudaIpcCloseMemHandle", address)


def register_host(address: int, num_bytes: int, device: int) -> None:
    """Let GPUs read and write memory of the host, whose pages stay where they are until `unregister_host`. Blocks while
    they are made.

    Raises:
        ImportError: cuda-bindings is not installed.
        OSError: CUDA refuses, or gives the memory another address.
    """
    with _current(device):
        flags = runtime().cudaHostRegisterPortable | runtime().cudaHostRegisterMapped
        call("cudaHostRegister", address, num_bytes, flags)
        if int(call("cudaHostGetDevicePointer", address, 0)) != address:
            call("cudaHostUnregister", address)
            raise OSError("cudaHostRegister: the GPU sees the host's memory at addresses of its own")


def unregister_host(address: int, device: int) -> None:
    """Undo `register_host`. No copy may use the memory any more."""
    with _current(device):
        call("cudaHostUnregister", address)


def uuid_of(device: int) -> str:
    """A GPU's name in the world, which does not depend on what a process sees."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_of(uuid: str) -> int | None:
    """The number that a GPU has in this process, or None if it is not visible here."""
    return next((device for device in range(torch.cuda.device_count()) if uuid_of(device) == uuid), None)


def can_read(device: int, peer: int) -> bool:
    """Whether one visible GPU can read another's memory."""
    return device == peer or bool(call("cudaDeviceCanAccessPeer", device, peer))


def read_from(device: int, peer: int) -> None:
    """Let a GPU read the memory that this process has on another. Repeating it is harmless.

    Raises:
        OSError: it cannot.
    """
    if device == peer:
        return
    with _current(device):
        try:
            call("cudaDeviceEnablePeerAccess", peer, 0)
        except OSError as error:
            if "cudaErrorPeerAccessAlreadyEnabled" not in str(error):
                raise


@contextlib.contextmanager
def _current(device: int) -> Iterator[None]:
    with torch.cuda.device(device):
        # These bindings may bring a runtime of their own, with a current device of its own.
        call("cudaSetDevice", device)
        yield


def _allocate(num_bytes: int) -> int:
    while _unfreed:
        _free(*_unfreed.pop())
    lacking = "cudaErrorMemoryAllocation"
    try:
        return int(call("cudaMalloc", num_bytes))
    except OSError as error:
        if lacking not in str(error):
            raise
    torch.cuda.empty_cache()  # torch keeps what it has freed for itself
    try:
        return int(call("cudaMalloc", num_bytes))
    except OSError as error:
        if lacking not in str(error):
            raise
        raise torch.OutOfMemoryError(f"no {num_bytes} bytes of memory are free on the GPU") from None


def _free(address: int, device: int) -> None:
    # A device that is lost has freed everything.
    with contextlib.suppress(OSError, RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            _unfreed.append((address, device))
            return
        with _current(device):
            call("cudaFree", address)
