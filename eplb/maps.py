"""The placement, where a step's kernels read it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dispatch_map import dispatch_map
from .placement import Placement, Topology

_SPREAD = 2654435761
"""Knuth's multiplier: neighbouring tokens take different replicas."""


class ExpertMaps:
    """What each slot holds, and where one rank's tokens go, on a device, in memory that never moves: CUDA graphs may
    read it.

    Attributes:
        physical_to_logical: [layers, physical] int32, the expert in each slot.
        choices: [layers, logical, max_replicas] int32, the slots that this rank's tokens may go to; then −1.
        num_choices: [layers, logical] int32, how many those are; see `dispatch_map`.
        placement: of which these are made, on the host.
        num_local: slots of a rank.

    Args:
        placement: to begin with.
        topology: of its slots.
        rank: whose tokens.
        device: where.

    Raises:
        PlacementError: these do not fit each other.
    """

    def __init__(self, placement: Placement, topology: Topology, rank: int, device: torch.device) -> None:
        self.placement = placement
        self.num_local = topology.slots_per_rank
        self._topology = topology
        self._rank = rank
        there = dispatch_map(placement, topology, rank)
        self.physical_to_logical = torch.tensor(placement.physical_to_logical, device=device)
        self.choices = torch.tensor(there.choices, device=device)
        self.num_choices = torch.tensor(there.num_choices, device=device)
        self._staged = [torch.empty_like(tensor[0]) for tensor in self._tensors()]
        self._next = placement

    def slots(self, layer: int, ids: Tensor) -> Tensor:
        """Where this rank's tokens go: of several slots for an expert one by the token's number, so that they share.

        Args:
            layer: which.
            ids: [tokens, top_k] int64, experts.

        Returns:
            [tokens, top_k] int64.
        """
        if self.choices.shape[2] == 1:
            return self.choices[layer, ids, 0].to(torch.int64)
        token = torch.arange(len(ids), device=ids.device)
        turn = (token + self._rank) * _SPREAD % (1 << 32) // (1 << 8)
        return self.choices[layer, ids, turn.unsqueeze(1) % self.num_choices[layer, ids]].to(torch.int64)

    def held(self, layer: int) -> list[int]:
        """The experts in this rank's slots, in order."""
        first = self._rank * self.num_local
        experts: list[int] = self.placement.physical_to_logical[layer, first : first + self.num_local].tolist()
        return experts

    def stage(self, layer: int, row: NDArray[np.int32]) -> None:
        """Bring a layer's new maps to the device; on a GPU on the current stream, and not waited for.

        Args:
            layer: which.
            row: [physical] int32: the expert that each slot will hold.

        Raises:
            PlacementError: it is no placement.
        """
        one = Placement.from_physical(row[None], self.placement.num_logical)
        there = dispatch_map(one, self._topology, self._rank)
        arrays = one.physical_to_logical, there.choices, there.num_choices
        for staged, array in zip(self._staged, arrays, strict=True):
            staged.copy_(torch.from_numpy(array[0]))
        # Here, because of all layers together it takes a millisecond or two, which no step has to spare.
        slots = self.placement.physical_to_logical.copy()
        slots[layer] = row
        self._next = Placement.from_physical(slots, self.placement.num_logical)

    def swap_in(self, layer: int) -> None:
        """Make the staged maps the layer's. On a GPU it is queued on the current stream.

        Args:
            layer: that was staged last.
        """
        for tensor, staged in zip(self._tensors(), self._staged, strict=True):
            tensor[layer].copy_(staged)
        self.placement = self._next

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.physical_to_logical, self.choices, self.num_choices
