"""A sequence of tokens, and the blocks that hold its KV."""

from __future__ import annotations

from collections.abc import Sequence as Several
from itertools import zip_longest

import numpy as np

from ..core.hashing import BlockHash, split_hashes
from ..core.messages import Child, Sampling
from ..kernels.block_hashes import chain

NO_BLOCK = -1
"""In a table, where no token to come sees what would be there."""


class Sequence:
    """What the engine knows of a request. Owned by the engine thread.

    Args:
        request_id: for logs.
        tokens: prompt, and output so far. Copied.
        num_prompt_tokens: how many of them are the prompt's.
        children: whose next token is sampled when the last known token has been computed: one, or, of a prompt with
            several outputs, all.
        sampling: how.
        root: hash that starts the chain of block keys.
        prompt_logprobs: alternatives to report for each prompt token; −1: no prompt log probabilities.
        hidden_states: whether the hidden states of its prompt are wanted.
    """

    def __init__(
        self,
        request_id: str,
        tokens: list[int],
        num_prompt_tokens: int,
        children: list[Child],
        sampling: Sampling,
        root: BlockHash,
        prompt_logprobs: int = -1,
        hidden_states: bool = False,
    ) -> None:
        self.request_id = request_id
        self.tokens = list(tokens)
        self.num_prompt_tokens = num_prompt_tokens
        self.children = children
        self.sampling = sampling
        self.prompt_logprobs = prompt_logprobs
        self.hidden_states = hidden_states
        self.num_computed = 0
        """Tokens whose KV is in the blocks."""
        self.tables: list[list[int]] = [[]]
        """For each KV group, its blocks by position, or `NO_BLOCK`."""
        self.arrays: list[np.ndarray] = [np.zeros(0, np.int64)]
        """`tables` as arrays, which may be longer."""
        self.num_reserved = 0
        """All groups have blocks for the tokens from `num_computed` up to this one."""
        self.num_matched_blocks = 0
        """How many of a table's first blocks came from the prefix cache, and may be others' as well."""
        self._num_trimmed = [0]
        self.root = root
        self._keys: list[BlockHash] = []
        self.num_committed = 0
        """Full blocks that were offered to the prefix cache."""
        self.num_offered = 0
        """Full blocks that were offered to the tiers."""
        self.pending = False
        """Whether a step in flight samples the token after the known ones."""
        self.last_step = 0
        """Number of the newest step that it is part of."""
        self.row = -1
        """Its row of the device's state; negative: none."""
        self.num_row_blocks = 0
        """Blocks that the row knows of."""
        self.penalty_slot = -1
        """Where its tokens are counted; negative: nowhere."""

    @property
    def num_tokens(self) -> int:
        """Tokens known: computed, and yet to be."""
        return len(self.tokens)

    @property
    def num_expected(self) -> int:
        """Tokens known, and the one that a step in flight samples."""
        return len(self.tokens) + self.pending

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt_tokens

    def add_blocks(self, blocks: list[int], group: int = 0, positions: Several[int] | None = None) -> None:
        """Enter blocks, already referenced for this sequence, into a group's table.

        Args:
            blocks: their numbers.
            group: whose.
            positions: where, in ascending order; None: at the end.
        """
        while len(self.tables) <= group:
            self.tables.append([])
            self.arrays.append(np.zeros(0, np.int64))
            self._num_trimmed.append(0)
        table, array = self.tables[group], self.arrays[group]
        start = len(table)
        if positions is None:
            table.extend(blocks)
        elif blocks:
            table.extend([-1] * (positions[-1] + 1 - start))
            for position, block in zip(positions, blocks, strict=True):
                table[position] = block
            start = min(start, positions[0])
        if len(table) > len(array):
            grown = np.full(max(len(table), 2 * len(array), 8), -1, np.int64)
            grown[:start] = array[:start]
            array = self.arrays[group] = grown
        array[start : len(table)] = table[start:]

    def take_blocks(self, group: int, start: int, end: int) -> list[int]:
        """Take positions ``start`` … ``end`` − 1 out of a group's table. Returns their blocks, to be released."""
        table = self.tables[group]
        taken = [block for block in table[start:end] if block >= 0]
        end = min(end, len(table))
        table[start:end] = [-1] * (end - start)
        self.arrays[group][start:end] = -1
        return taken

    def trim_blocks(self, group: int, end: int) -> list[int]:
        """`take_blocks` of the positions before ``end``. Later calls do not look at them again."""
        start = self._num_trimmed[group]
        if end <= start:
            return []
        self._num_trimmed[group] = end
        return self.take_blocks(group, start, end)

    def drop_blocks(self) -> list[int]:
        """Forget all blocks, and what was computed. Returns them, to be released: those of a prefix before those of
        longer ones."""
        blocks = [block for row in zip_longest(*self.tables, fillvalue=-1) for block in row if block >= 0]
        self.tables, self.arrays, self._num_trimmed = [[]], self.arrays[:1], [0]
        self.num_computed = self.num_committed = self.num_reserved = self.num_matched_blocks = 0
        return blocks

    def keys(self, num_blocks: int, block_tokens: int) -> list[BlockHash]:
        """Keys of the first ``num_blocks`` blocks; all their tokens must be known."""
        if len(self._keys) < num_blocks:
            parent = self._keys[-1] if self._keys else self.root
            fresh = self.tokens[len(self._keys) * block_tokens : num_blocks * block_tokens]
            self._keys.extend(split_hashes(chain(fresh, block_tokens, parent)))
        return self._keys[:num_blocks]
