"""How often each token occurs in the sequences that have penalties: kept on the device, one token added a step."""

from __future__ import annotations

import torch
from torch import Tensor


class PenaltySlots:
    """Which slots of `PenaltyCounts` are taken. There is no end of them."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._num_slots = 0

    def take(self) -> int:
        """A slot that nobody has."""
        if self._free:
            return self._free.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def give_back(self, slot: int) -> None:
        """A sequence is over."""
        self._free.append(slot)


class PenaltyCounts:
    """Counts [slots, vocabulary] int32, see `kernels.penalties`; takes memory as slots are used.

    Args:
        vocab_size: of the model.
        device: where.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def covering(self, num_slots: int) -> Tensor:
        """The counts, of at least ``num_slots`` slots."""
        held, vocab_size = self._counts.shape
        if num_slots > held:
            grown = self._counts.new_zeros(max(num_slots, 2 * held, 8), vocab_size)
            grown[:held] = self._counts
            self._counts = grown
        return self._counts
