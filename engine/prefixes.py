"""What a prefix consists of in all KV groups: where everything is seen all blocks, of a window the last ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..core.hashing import BlockHash
from ..kv_transfer.layout import KVGroup


class Part(NamedTuple):
    """A block of a prefix."""

    position: int
    """Which tokens it holds, counted in blocks."""
    group: int
    """Which layers."""


def group_keys(keys: Sequence[BlockHash], group: int) -> Sequence[BlockHash]:
    """Prefixes' keys in a group."""
    return [group_key(key, group) for key in keys] if group else keys


def group_key(key: BlockHash, group: int) -> BlockHash:
    """A prefix's key in a group."""
    return key + group.to_bytes(2, "little") if group else key


def longest_window(groups: Sequence[KVGroup], num_blocks: int, block_tokens: int, has: Callable[[Part], bool]) -> int:
    """The longest prefix, of at most ``num_blocks`` blocks, whose last window is there for all groups that have one.
    Asks for each block once. Pure.

    Args:
        groups: of the model's layers.
        num_blocks: of the longest that may be.
        block_tokens: tokens a block.
        has: whether a block is there.
    """
    known = {number: num_blocks for number, group in enumerate(groups) if group.window}
    complete = not known
    while num_blocks and not complete:
        complete = True
        for number in known:
            first = groups[number].first_block(num_blocks * block_tokens, block_tokens)
            # From here to the prefix's end, nothing is missing.
            at = min(known[number], num_blocks)
            while at > first and has(Part(at - 1, number)):
                at -= 1
            known[number] = at
            if at > first:  # a block is missing: only prefixes that end before it can be complete
                num_blocks = at - 1
                complete = False
                break
    return num_blocks
