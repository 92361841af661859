"""Memory that the GPUs of one host read from each other, mapped by CUDA's inter-process communication."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import ConfigError
from . import cuda_memory

Exchange = Callable[[bytes], list[bytes]]
"""Gives this rank's bytes to all, and returns every rank's, in the order of ranks; equally many from each."""

_PROBLEM_BYTES = 160


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
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._exchange = exchange
        self._own: cuda_memory.Allocation | None = None
        handle, problem = bytes(cuda_memory.HANDLE_BYTES), ""
        try:
            self._own = cuda_memory.Allocation(num_bytes, self._device)
            cuda_memory.clear(self._own.address, num_bytes, self._device)
            handle = self._own.handle
        except (ImportError, OSError, torch.OutOfMemoryError) as error:
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

    def own(self) -> Tensor:
        """[bytes] uint8: this rank's memory."""
        assert self._own is not None
        return torch.as_tensor(self._own, device=torch.device("cuda", self._device))

    def close(self) -> None:
        """Unmap the peers' memory and, when all have, free this rank's. Nothing may use it any more."""
        for rank, address in enumerate(self.addresses):
            if rank != self._rank:
                cuda_memory.close_handle(address, self._device)
        self.addresses = []
        self._exchange(b"\0")
        self._own = None

    def _map(self, handles: list[bytes]) -> None:
        for rank, handle in enumerate(handles):
            if rank == self._rank:
                assert self._own is not None
                self.addresses.append(self._own.address)
            else:
                self.addresses.append(cuda_memory.open_handle(handle, self._device))
