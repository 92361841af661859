"""The placement, where a step's kernels read it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .placement import Placement


class ExpertMaps:
    """A placement's arrays on a device, in memory that never moves, so that CUDA graphs may read it.

    Attributes:
        physical_to_logical: [layers, physical] int32.
        logical_to_physical: [layers, logical, max_replicas] int32, padded with −1.
        replica_count: [layers, logical] int32.
        placement: the same on the host.

    Args:
        placement: to begin with.
        device: where.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.placement = placement
        self.physical_to_logical = torch.tensor(placement.physical_to_logical, device=device)
        self.logical_to_physical = torch.tensor(placement.logical_to_physical, device=device)
        self.replica_count = torch.tensor(placement.replica_count, device=device)
        self._staged = [torch.empty_like(tensor[0]) for tensor in self._tensors()]

    def stage(self, layer: int, row: NDArray[np.int32]) -> None:
        """Bring a layer's new maps to the device; on a GPU on the current stream, and not waited for.

        Args:
            layer: which.
            row: [physical] int32: the expert that each slot will hold.

        Raises:
            PlacementError: it is no placement.
        """
        one = Placement.from_physical(row[None], self.placement.num_logical)
        arrays = one.physical_to_logical, one.logical_to_physical, one.replica_count
        for staged, array in zip(self._staged, arrays, strict=True):
            staged.copy_(torch.from_numpy(array[0]))

    def swap_in(self, layer: int, row: NDArray[np.int32]) -> None:
        """Make the staged maps the layer's. On a GPU it is queued on the current stream.

        Args:
            layer: which.
            row: as it was staged.
        """
        for tensor, staged in zip(self._tensors(), self._staged, strict=True):
            tensor[layer].copy_(staged)
        slots = self.placement.physical_to_logical.copy()
        slots[layer] = row
        self.placement = Placement.from_physical(slots, self.placement.num_logical)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.physical_to_logical, self.logical_to_physical, self.replica_count
