"""Transports whose owners live in another process, on the same GPU or on another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.test_transports import Kit

from .gpu_memory import OwnerProcess, RemoteOwner

GPUS = torch.cuda.device_count()
PLACES = ["one GPU", "two GPUs", "two GPUs, one visible to the owner"]
"""Of the owner and of the reader."""


class ProcessKit(Kit):
    """`Kit` whose owners live in another process."""

    def __init__(self, process: OwnerProcess) -> None:
        super().__init__({"nixl": "nixl-cuda"}.get(process.transport, process.transport))
        self._process = process

    def owner(self, size: int) -> tuple[Any, Any]:
        owner = RemoteOwner(self._process, size)
        if self.moves == "nixl":  # its memory may not go before it
            self._closers.append(owner.close)
        self._closers.append(owner.forget)
        return owner, owner


def start(place: str, transport: str) -> OwnerProcess:
    """The process of the owners, at one of `PLACES`; skips the test where there are too few GPUs."""
    if place != "one GPU" and GPUS < 2:
        pytest.skip(f"{GPUS} CUDA devices are here, and this needs two")
    return OwnerProcess(int(place != "one GPU"), alone="visible" in place, transport=transport)
