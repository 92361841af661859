"""What a device keeps of the sequences that decode: their last tokens and their block tables, a row each.

The host sends what is new. It need not know a token to let the device go on with it: a step's input names the row, and
the step after takes what this one has sampled.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

import numpy as np
import torch
from torch import Tensor

from ..kernels.oracle import Ops
from .sequence import Sequence


class RowTable:
    """The host's side: which sequence has which row, and what the device knows of it.

    Args:
        num_rows: sequences at a time.
        max_blocks: of the longest context.
        num_groups: KV groups of the model.
    """

    def __init__(self, num_rows: int, max_blocks: int, num_groups: int = 1) -> None:
        self.spare = num_rows
        """A row that no sequence has: what fills a batch up writes there."""
        self._max_blocks = max_blocks
        self._num_groups = num_groups
        self._free = list(range(num_rows - 1, -1, -1))

    def assign(self, sequence: Sequence) -> None:
        """Give a sequence a row if it has none."""
        if sequence.row < 0:
            sequence.row = self._free.pop()
            sequence.num_row_blocks = 0

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's row back. Steps in flight may still write there: later ones come after."""
        if sequence.row >= 0:
            self._free.append(sequence.row)
            sequence.row = -1

    def arrays(self, single: Several[Sequence], block_tokens: int) -> dict[str, np.ndarray]:
        """The rows of sequences with one new token each, and the entries of their block tables that the device lacks.

        The block that the new token lies in is not among them: it follows from the token's slot.
        """
        places: list[np.ndarray] = []
        blocks: list[np.ndarray] = []
        for sequence in single:
            last = sequence.num_computed // block_tokens
            if last > sequence.num_row_blocks:
                start = sequence.num_row_blocks
                for group in range(self._num_groups):
                    row = group * (self.spare + 1) + sequence.row
                    places.append(row * self._max_blocks + np.arange(start, last))
                    blocks.append(sequence.arrays[group][start:last])
            sequence.num_row_blocks = last + 1
        arrays = {"rows": np.array([sequence.row for sequence in single], np.int64)}
        if places:
            arrays |= {"table_places": np.concatenate(places), "table_blocks": np.concatenate(blocks)}
        return arrays


class RowState:
    """The device's side.

    Args:
        num_rows: sequences at a time.
        max_blocks: of the longest context.
        block_tokens: tokens a block.
        device: where.
        ops: the kernels.
        num_groups: KV groups of the model.
    """

    def __init__(
        self, num_rows: int, max_blocks: int, block_tokens: int, device: torch.device, ops: Ops, num_groups: int = 1
    ) -> None:
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.tables = torch.zeros(num_groups, num_rows + 1, max_blocks, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros_like(self.tables)
        """The present batch's, in its order."""
        self.context_lens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        """Likewise."""
        self._block_tokens = block_tokens
        self._ops = ops

    def enter(self, places: Tensor, blocks: Tensor) -> None:
        """Take in entries of the flattened tables."""
        self.tables.view(-1).scatter_(0, places, blocks)

    def complete(self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Make `block_tables` and `context_lens` those of a batch, and fill in the tokens that the host does not know.

        Args:
            tokens: [n] int64, overwritten where negative.
            positions: [n] int64.
            slots: [groups, n] int64.
            rows: [n] int64.
        """
        self._ops.complete(
            tokens, positions, slots, rows, self.last_tokens, self.tables, self.block_tables, self.context_lens,
            self._block_tokens,
        )  # fmt: skip

    def keep(self, rows: Tensor, tokens: Tensor) -> None:
        """These tokens have been sampled for these rows."""
        self.last_tokens.scatter_(0, rows, tokens)
