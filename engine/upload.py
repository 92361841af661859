"""Several arrays to a device in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_WORD_BYTES = 8
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
    # Pinned memory goes back to torch's cache at once, and torch gives it out again after the copy.
    pinned = torch.empty(sum(words.values()), dtype=torch.int64, pin_memory=True)
    buffer = pinned.numpy()
    at = 0
    for name, array in arrays.items():
        buffer[at : at + words[name]].view(array.dtype)[: array.size] = array.reshape(-1)
        at += words[name]
    there = pinned.to(device, non_blocking=True)
    tensors = {}
    at = 0
    for name, array in arrays.items():
        flat = there[at : at + words[name]].view(torch.from_numpy(array[:0]).dtype)[: array.size]
        tensors[name] = flat.view(array.shape)
        at += words[name]
    return tensors


def download(tensor: Tensor) -> Tensor:
    """A tensor on its way to the host: its content is there once the device's work so far is done."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
