"""Which rank has which expert: physical slots, some of which may hold replicas of an expert that is elsewhere too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import ConfigError

_SPREAD = 2654435761
"""Knuth's multiplier: neighbouring tokens take different replicas."""


class ExpertMaps:
    """The slots of every layer that has experts. Slot s is the (s mod slots a rank)-th of rank s div slots a rank.

    At first the experts fill the slots in order, and again from the first; no rank then has one twice.

    Args:
        num_layers: layers with experts.
        num_experts: of a layer.
        num_redundant: slots beyond one for each expert.
        num_ranks: that share them.
        device: of the maps, where tokens are sent off.

    Attributes:
        physical: [layers, slots] int64, the expert in each slot.
        replicas: [layers, experts, 1 + redundant] int64, the slots of each expert; −1 behind the last.
        num_replicas: [layers, experts] int64.

    Raises:
        ConfigError: the slots cannot be divided among the ranks, or there are more than enough for all on each.
    """

    def __init__(
        self, num_layers: int, num_experts: int, num_redundant: int, num_ranks: int, device: torch.device
    ) -> None:
        num_slots = num_experts + num_redundant
        if num_slots % num_ranks:
            raise ConfigError(
                f"experts.parallel: {num_slots} experts, {num_redundant} of them redundant, cannot be divided among "
                f"{num_ranks} ranks",
                fix=f"experts.redundant: {num_redundant + -num_slots % num_ranks} makes it a multiple",
            )
        if num_slots // num_ranks > num_experts:
            raise ConfigError(
                f"experts.redundant: {num_redundant} gives each of {num_ranks} ranks {num_slots // num_ranks} experts, "
                f"the model has {num_experts}",
                fix=f"give at most {num_experts * (num_ranks - 1)}",
            )
        self.num_experts = num_experts
        self.num_local = num_slots // num_ranks
        self.physical = torch.empty(num_layers, num_slots, dtype=torch.int64, device=device)
        shape = num_layers, num_experts, 1 + num_redundant
        self.replicas = torch.empty(shape, dtype=torch.int64, device=device)
        self.num_replicas = torch.empty(num_layers, num_experts, dtype=torch.int64, device=device)
        for layer in range(num_layers):
            self.assign(layer, [slot % num_experts for slot in range(num_slots)])

    def assign(self, layer: int, experts: Sequence[int]) -> None:
        """From the next step on, a layer's slots hold these experts. All ranks do the same between the same two steps.

        Args:
            layer: which.
            experts: [slots], each expert at least once.
        """
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(experts):
            slots[expert].append(slot)
        assert all(slots), "an expert has no slot"
        most = self.replicas.shape[2]
        padded = [[*own, *[-1] * (most - len(own))] for own in slots]
        self.physical[layer] = torch.tensor(experts)
        self.replicas[layer] = torch.tensor(padded)
        self.num_replicas[layer] = torch.tensor([len(own) for own in slots])

    def slots(self, layer: int, ids: Tensor, rank: int) -> Tensor:
        """Where a rank's tokens go: of several replicas of an expert one by the token's number, so that they share.

        Args:
            layer: which.
            ids: [tokens, top_k] experts.
            rank: whose tokens; other ranks' begin elsewhere.

        Returns:
            [tokens, top_k] slots.
        """
        if self.replicas.shape[2] == 1:
            return self.replicas[layer, ids, 0]
        token = torch.arange(len(ids), device=ids.device)
        spread = (token + rank) * _SPREAD % (1 << 32) // (1 << 8)
        return self.replicas[layer, ids, spread.unsqueeze(1) % self.num_replicas[layer, ids]]

    def held_by(self, layer: int, rank: int) -> list[int]:
        """The experts in a rank's slots, in order."""
        return self.physical[layer, rank * self.num_local : (rank + 1) * self.num_local].tolist()
