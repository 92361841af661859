"""Several arrays to a device in one copy, and results from it. On a GPU by its processors: see `kernels.host_copy`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..kernels import host_copy, on_gpu

_WORD_BYTES = 8
_LARGE_BYTES = 1 << 20
"""From here on a copy engine brings results: they take longer than the wait for it."""
_ALIGNED_WORDS = 2
"""Triton compiles another version of a kernel for addresses that are no multiples of 16 bytes."""


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Bring arrays to a device. Does not wait for the copy; on a CPU there is none: the tensors share the memory.

    Args:
        arrays: C-contiguous.
        device: where.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    aligned = _ALIGNED_WORDS * _WORD_BYTES
    words = {name: -(-array.nbytes // aligned) * _ALIGNED_WORDS for name, array in arrays.items()}
    pinned = torch.empty(sum(words.values()), dtype=torch.int64, pin_memory=True)
    buffer = pinned.numpy()
    at = 0
    for name, array in arrays.items():
        buffer[at : at + words[name]].view(array.dtype)[: array.size] = array.reshape(-1)
        at += words[name]
    there = torch.empty(len(pinned), dtype=torch.int64, device=device)
    send(pinned, there)
    tensors = {}
    at = 0
    for name, array in arrays.items():
        flat = there[at : at + words[name]].view(torch.from_numpy(array[:0]).dtype)[: array.size]
        tensors[name] = flat.view(array.shape)
        at += words[name]
    return tensors


def send(pinned: Tensor, target: Tensor) -> None:
    """Fill a GPU's tensor, [n] int64, from as much pinned memory, which this keeps for as long as it is read. Does not
    wait for it."""
    if not on_gpu.AVAILABLE:
        target.copy_(pinned, non_blocking=True)
        return
    host_copy.fused(pinned, target)
    _keep(pinned)


def download(tensor: Tensor) -> Tensor:
    """A tensor on its way to the host: its content is there once the device's work so far is done."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    tensor = tensor.contiguous()
    num_bytes = tensor.numel() * tensor.element_size()
    words = num_bytes % _WORD_BYTES == 0 and tensor.data_ptr() % _WORD_BYTES == 0
    if not (on_gpu.AVAILABLE and words and num_bytes < _LARGE_BYTES):
        return pinned.copy_(tensor, non_blocking=True)
    host_copy.fused(tensor.view(-1).view(torch.int64), pinned.view(-1).view(torch.int64))
    _keep(pinned)
    return pinned


class _Kept(threading.local):
    """Pinned memory that a GPU may still use, of the calling thread. Torch's cache would give it to the next who asks:
    it knows only of its own copies."""

    def __init__(self) -> None:
        self.all: deque[tuple[torch.cuda.Event, Tensor]] = deque()


_kept = _Kept()


def _keep(pinned: Tensor) -> None:
    while _kept.all and _kept.all[0][0].query():
        _kept.all.popleft()
    done = torch.cuda.Event()
    done.record()
    _kept.all.append((done, pinned))
