"""Which slot of which rank holds which expert.

A *logical* expert is one of the checkpoint. A *physical* expert is a slot that holds a replica of one. Ranks own equal,
contiguous ranges of slots: of P slots on R ranks, rank r has r · P/R … (r + 1) · P/R − 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PlacementError


@dataclass(frozen=True)
class Topology:
    """Slots and what they lie on; the same for all layers.

    Raises:
        PlacementError: a number is below one, or one that must divide another does not.
    """

    num_physical: int
    """Slots of a layer, over all ranks."""
    num_ranks: int
    """Ranks of the expert-parallel group, which own equal ranges of slots."""
    num_nodes: int = 1
    """Nodes, which own equal ranges of ranks."""
    num_groups: int = 1
    """Groups that a router limits tokens to: equal ranges of logical experts."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise PlacementError(f"topology: {name} is {value}, expected at least 1")
        _check_divides("num_physical", self.num_physical, "num_ranks", self.num_ranks)
        _check_divides("num_ranks", self.num_ranks, "num_nodes", self.num_nodes)

    @property
    def slots_per_rank(self) -> int:
        """Slots that each rank owns."""
        return self.num_physical // self.num_ranks

    @property
    def ranks_per_node(self) -> int:
        """Ranks that each node owns."""
        return self.num_ranks // self.num_nodes


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the experts of every layer are. Treat the arrays as read-only."""

    physical_to_logical: NDArray[np.int32]
    """[layers, physical] int32: the expert that each slot holds."""
    logical_to_physical: NDArray[np.int32]
    """[layers, logical, max_replicas] int32: each expert's slots in ascending order, and then −1.

    max_replicas is physical − logical + 1, the most that an expert can have: the shape is one for all placements, as
    graphs that read a copy of this on a GPU need it.
    """
    replica_count: NDArray[np.int32]
    """[layers, logical] int32: slots that hold each expert, at least one."""

    @classmethod
    def from_physical(cls, physical_to_logical: NDArray[np.integer], num_logical: int) -> Placement:
        """The placement in which slots hold these experts.

        Args:
            physical_to_logical: [layers, physical], any integers; copied.
            num_logical: experts of a layer.

        Raises:
            PlacementError: there is no such expert, or one without a slot; names the layer.
        """
        slots = np.array(physical_to_logical, dtype=np.int32, order="C")
        if slots.ndim != 2 or not slots.size:
            raise PlacementError(f"a placement has the shape {slots.shape}, expected [layers, physical]")
        wrong = np.argwhere((slots < 0) | (slots >= num_logical))
        if len(wrong):
            layer, slot = wrong[0]
            raise PlacementError(
                f"layer {layer}, slot {slot} holds expert {slots[layer, slot]}, expected one of 0 … {num_logical - 1}"
            )
        num_layers, num_physical = slots.shape
        # Experts of different layers get different numbers, so that one sort and one count serve all layers.
        keys = (slots + np.arange(num_layers, dtype=np.int32)[:, None] * num_logical).ravel()
        counts = np.bincount(keys, minlength=num_layers * num_logical)
        missing = np.flatnonzero(counts == 0)
        if len(missing):
            layer, expert = divmod(int(missing[0]), num_logical)
            raise PlacementError(f"layer {layer}: no slot holds expert {expert}, and each needs one")
        order = np.argsort(keys, kind="stable")
        experts = keys[order]
        nth = np.arange(len(keys)) - (np.cumsum(counts) - counts)[experts]
        places = np.full((num_layers * num_logical, num_physical - num_logical + 1), -1, dtype=np.int32)
        places[experts, nth] = order % num_physical
        return cls(
            slots,
            places.reshape(num_layers, num_logical, -1),
            counts.astype(np.int32).reshape(num_layers, num_logical),
        )

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.physical_to_logical.shape[0]

    @property
    def num_physical(self) -> int:
        """Slots of a layer."""
        return self.physical_to_logical.shape[1]

    @property
    def num_logical(self) -> int:
        """Experts of a layer."""
        return self.replica_count.shape[1]


def _check_divides(name: str, number: int, divisor_name: str, divisor: int) -> None:
    if number % divisor:
        raise PlacementError(f"topology: {name} is {number}, which {divisor_name} = {divisor} does not divide")
