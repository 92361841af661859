"""A sequence of tokens, and the blocks that hold its KV."""

from __future__ import annotations

import numpy as np

from ..core.hashing import BlockHash, block_hashes
from ..core.messages import Child, Sampling


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
        self.blocks: list[int] = []
        self.block_table = np.zeros(0, np.int64)
        """`blocks` as an array, which may be longer."""
        self.root = root
        self._keys: list[BlockHash] = []
        self.num_committed = 0
        """Full blocks that were offered to the prefix cache."""
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

    @property
    def tables(self) -> list[list[int]]:
        """The blocks of each KV group."""
        return [self.blocks]

    def add_blocks(self, blocks: list[int]) -> None:
        """Append blocks, already referenced for this sequence."""
        start = len(self.blocks)
        self.blocks.extend(blocks)
        if len(self.blocks) > len(self.block_table):
            grown = np.zeros(max(len(self.blocks), 2 * len(self.block_table), 8), np.int64)
            grown[:start] = self.block_table[:start]
            self.block_table = grown
        self.block_table[start : len(self.blocks)] = blocks

    def drop_blocks(self) -> list[int]:
        """Forget all blocks, and what was computed. Returns them, to be released."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = self.num_committed = 0
        return blocks

    def keys(self, num_blocks: int, block_tokens: int) -> list[BlockHash]:
        """Keys of the first ``num_blocks`` blocks; all their tokens must be known."""
        if len(self._keys) < num_blocks:
            parent = self._keys[-1] if self._keys else self.root
            fresh = block_hashes(self.tokens[: num_blocks * block_tokens], block_tokens, parent, len(self._keys))
            self._keys.extend(fresh)
        return self._keys[:num_blocks]
