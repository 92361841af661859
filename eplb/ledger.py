"""What a rank's peers read beside its weights: which version each layer is, checksums, and the leader's plan."""

from __future__ import annotations

import numpy as np

from ..kv_transfer.memory import Buffer

_WORD_BYTES = 8


class Ledger:
    """Numbers in memory that peers can read.

    Attributes:
        generations: [layers] uint64: how often a layer was overwritten. Counted up before it is.
        sums: [layers, slots] uint64: checksums of the experts of this rank's slots; 0 where none are kept.
        plan: [layers, physical] int32: of the leader: what is to be.
        buffer: the memory.
    """

    def __init__(self, num_layers: int, num_slots: int, num_physical: int) -> None:
        self._num_layers = num_layers
        self._num_slots = num_slots
        words = num_layers * (1 + num_slots)
        self._plan_offset = words * _WORD_BYTES
        self.plan_bytes = num_layers * num_physical * 4
        self.buffer = Buffer(self._plan_offset + self.plan_bytes)
        numbers = self.buffer.array[: self._plan_offset].view(np.uint64)
        self.generations: np.ndarray = numbers[:num_layers]
        self.sums: np.ndarray = numbers[num_layers:].reshape(num_layers, num_slots)
        self.plan: np.ndarray = self.buffer.array[self._plan_offset :].view(np.int32).reshape(num_layers, num_physical)

    @property
    def plan_offset(self) -> int:
        """Where the plan begins, in bytes."""
        return self._plan_offset

    def generation_offset(self, layer: int) -> int:
        """Where a layer's generation is, in bytes."""
        return layer * _WORD_BYTES

    def sum_offset(self, layer: int, slot: int) -> int:
        """Where a slot's checksum is, in bytes."""
        return (self._num_layers + layer * self._num_slots + slot) * _WORD_BYTES
