"""Memory that the GPUs of one host read from each other, mapped by CUDA's inter-process communication.

The memory is CUDA's own and not from torch's allocator, whose tensors are parts of larger pieces: a handle names a
whole piece, and would open all of it to the peers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..core.errors import ConfigError

Exchange = Callable[[bytes], list[bytes]]
"""Gives this rank's bytes to all, and returns every rank's, in the order of ranks; equally many from each."""

_HANDLE_BYTES = 64
_PROBLEM_BYTES = 160
# CUDA shares memory by pieces of this size: a smaller one would take its neighbours along.
_PIECE_BYTES = 2 << 20


class PeerMemory:
    """As much memory on each rank's GPU, zeroed, and every peer's mapped here. All ranks make it and close it together.

    Attributes:
        addresses: where this process sees each rank's memory, in the order of ranks.

    Args:
        num_bytes: of each rank's memory.
        rank: this one.
        device: its GPU. The peers' GPUs must be visible to this process, too.
        exchange: between all ranks.

    Raises:
        ConfigError: on all ranks alike, when one of them cannot make or map memory; says which, and why.
    """

    def __init__(self, num_bytes: int, rank: int, device: torch.device, exchange: Exchange) -> None:
        self.addresses: list[int] = []
        self._rank = rank
        self._device = device
        self._exchange = exchange
        self._own: int | None = None
        handle, problem = bytes(_HANDLE_BYTES), ""
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
            handle = self._allocate(num_bytes)
        except (ImportError, OSError) as error:
            problem = str(error)
        handles = exchange(handle)
        if not problem:
            try:
                self._map(handles)
            except OSError as error:
                problem = str(error)
        # A rank that went on alone would wait for the others for ever.
        problems = exchange(problem.encode()[:_PROBLEM_BYTES].ljust(_PROBLEM_BYTES))
        for other, text in enumerate(problems):
            if text.strip():
                self.close()
                raise ConfigError(
                    f"rank {other} cannot share memory with its peers: {text.decode(errors='replace').strip()}",
                    fix="the GPUs must be of one host, linked, and all visible to every rank's process",
                )

    def close(self) -> None:
        """Unmap the peers' memory and, when all have, free this rank's. Nothing may use it any more."""
        with torch.cuda.device(self._device):
            for rank, address in enumerate(self.addresses):
                if rank != self._rank:
                    self._call("cudaIpcCloseMemHandle", address)
            self.addresses = []
            self._exchange(b"\0")
            if self._own is not None:
                self._call("cudaFree", self._own)
                self._own = None

    def _allocate(self, num_bytes: int) -> bytes:
        with torch.cuda.device(self._device):
            # These bindings may bring a runtime of their own, with a current device of its own.
            self._call("cudaSetDevice", self._device.index)
            size = -(-num_bytes // _PIECE_BYTES) * _PIECE_BYTES
            self._own = int(self._call("cudaMalloc", size))
            self._call("cudaMemset", self._own, 0, size)
            self._call("cudaDeviceSynchronize")
            return bytes(self._call("cudaIpcGetMemHandle", self._own).reserved)

    def _map(self, handles: list[bytes]) -> None:
        # A handle is mapped into the device that is current, and that is the one which reads.
        with torch.cuda.device(self._device):
            for rank, data in enumerate(handles):
                if rank == self._rank:
                    assert self._own is not None
                    self.addresses.append(self._own)
                    continue
                handle = self._cuda.cudaIpcMemHandle_t()
                handle.reserved = data
                flags = self._cuda.cudaIpcMemLazyEnablePeerAccess
                self.addresses.append(int(self._call("cudaIpcOpenMemHandle", handle, flags)))

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error):
            raise OSError(f"{name}: {error.name}")
        return values[0] if values else None
