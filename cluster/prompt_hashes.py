"""The keys of a prompt's blocks, each made when it is asked for. Owned by one thread; nothing blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.hashing import HASH_BYTES, BlockHash


class PromptHashes:
    """A key names all that comes before it: asking for one makes those before it, too, and none behind it.

    Args:
        tokens: the prompt.
        block_tokens: tokens of a block.
        root: what the first block's key is made from (`root_hash`).
        num_blocks: blocks that have a key here, not more than are full.
    """

    def __init__(self, tokens: Sequence[int], block_tokens: int, root: BlockHash, num_blocks: int) -> None:
        self._tokens = tokens
        self._block_tokens = block_tokens
        self._num_blocks = num_blocks
        self._parent = root
        self._made = b""

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, block: int) -> BlockHash:
        at = HASH_BYTES * block
        if at >= len(self._made):
            self._make(block + 1)
        return self._made[at : at + HASH_BYTES]

    def _make(self, num_blocks: int) -> None:
        from ..kernels.block_hashes import chain  # compiled code, which gateways with other policies do without

        size = self._block_tokens
        done = len(self._made) // HASH_BYTES
        made = chain(self._tokens[done * size : num_blocks * size], size, self._parent)
        self._made = self._made + made if done else made
        self._parent = made[-HASH_BYTES:]
