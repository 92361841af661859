"""A rank's experts in memory that peers can read, with room to stage one layer.

All tensors of an expert are listed, and lie expert-major, so that an expert moves whole: a quantised one with its
scales, zero points and biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor

from ..core.errors import ConfigError
from ..kv_transfer.memory import Buffer, DeviceBuffer

_ALIGNMENT = 256


class ExpertTensor(msgspec.Struct, frozen=True):
    """One of the tensors that make up an expert."""

    name: str
    shape: tuple[int, ...]
    """Of one expert; () for a number."""
    dtype: str
    """As torch names it: "bfloat16"."""

    @property
    def num_bytes(self) -> int:
        """Of one expert."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype.

        Raises:
            ConfigError: there is none of this name.
        """
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f"an expert's tensor {self.name} has the dtype {self.dtype}, which torch does not know")
        return found


class ExpertLayout(msgspec.Struct, frozen=True):
    """Where a rank's experts lie; the same on all ranks, in all layers."""

    tensors: tuple[ExpertTensor, ...]
    num_layers: int
    num_slots: int
    """That a rank owns in each layer."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], num_layers: int) -> ExpertLayout:
        """For a layer's tensors, [slots, …] each; on any device, also on none ("meta")."""
        parts = tuple(
            ExpertTensor(name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        )
        return cls(parts, num_layers, len(next(iter(tensors.values()))))

    def offset(self, tensor: int, slot: int) -> int:
        """Where an expert's tensor begins within a layer, in bytes."""
        return self._start(tensor) + self.tensors[tensor].num_bytes * slot

    @property
    def layer_bytes(self) -> int:
        """Of a layer's experts on one rank."""
        return self._start(len(self.tensors))

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """A layer's tensors, [slots, …] each.

        Args:
            memory: [layer_bytes] uint8.
        """
        found = {}
        for number, tensor in enumerate(self.tensors):
            start = self.offset(number, 0)
            part = memory[start : start + tensor.num_bytes * self.num_slots]
            found[tensor.name] = part.view(tensor.torch_dtype).view(self.num_slots, *tensor.shape)
        return found

    def _start(self, tensor: int) -> int:
        return sum(_aligned(before.num_bytes * self.num_slots) for before in self.tensors[:tensor])


class ExpertStore:
    """The weights that steps compute with, and a layer's worth beside them.

    Attributes:
        live: of each layer the tensors by name, [slots, …]; zero, or on a GPU uninitialized, until they are filled.
        staged: one layer's, likewise.
        memory: where ``live`` is, layer after layer.
        staging: where ``staged`` is.

    Args:
        layout: of the experts.
        device: where they are to be.

    Raises:
        ConfigError: the GPU's memory cannot be shared.
        torch.OutOfMemoryError: so much is not free.
    """

    def __init__(self, layout: ExpertLayout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.memory = _allocate(layout.layer_bytes * layout.num_layers, device)
        self.staging = _allocate(layout.layer_bytes, device)
        whole = _tensor_of(self.memory)
        self.live = [
            layout.views(whole[layer * layout.layer_bytes : (layer + 1) * layout.layer_bytes])
            for layer in range(layout.num_layers)
        ]
        self.staged = layout.views(_tensor_of(self.staging))

    def swap_in(self, layer: int, slots: Sequence[int]) -> None:
        """Copy slots from the staging memory to the layer's. On a GPU it is queued on the current stream."""
        if not slots:
            return
        for name, tensor in self.live[layer].items():
            staged = self.staged[name]
            # On a GPU one launch for many slots.
            torch._foreach_copy_([tensor[slot] for slot in slots], [staged[slot] for slot in slots])

    def close(self) -> None:
        """Give the memory up; it goes with the last tensor of it. Idempotent."""
        self.memory.close()
        self.staging.close()


def checksum(tensors: dict[str, Tensor], slot: int) -> int:
    """64 bits of all bytes of an expert: XXH3. On a GPU it is copied to the host first, and waited for.

    Args:
        tensors: of a layer, by name.
        slot: whose expert.
    """
    digest = xxhash.xxh3_64()
    for tensor in tensors.values():
        digest.update(tensor[slot].reshape(-1).view(torch.uint8).cpu().numpy().data)
    return int(digest.intdigest())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _allocate(num_bytes: int, device: torch.device) -> Buffer | DeviceBuffer:
    if device.type == "cuda":
        return DeviceBuffer(num_bytes, device.index if device.index is not None else torch.cuda.current_device())
    return Buffer(num_bytes)


def _tensor_of(memory: Buffer | DeviceBuffer) -> Tensor:
    if isinstance(memory, DeviceBuffer):
        return memory.tensor()
    array: np.ndarray = memory.array
    return torch.from_numpy(array)
