"""Who holds which blocks, and so how much of a prompt each worker has. No I/O, no clock; owned by one thread.

A *holder* is a place where blocks are: a worker's prefix cache, a tier of its own, a tier that a node's workers share.
What a *peer* has is what the holders within its reach have together. Each block's holders are one integer, a bit each;
along a prompt it seldom changes, so that a match looks at few of its blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from ..core.hashing import BlockHash

MAX_BLOCKS = 1 << 21
"""About 150 bytes each, and more for every further holder."""
_FIRST_STEP = 47
"""To the second block that a match looks at. Hashing so many takes 10 µs: what a prompt pays that is like others in its
first block alone."""

_View = tuple[str, int]
"""A peer, and the bits of the holders within its reach."""


class Hashes(Protocol):
    """Keys of a prompt's blocks, in order: a list, or `prompt_hashes.PromptHashes`."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int, /) -> BlockHash: ...


class PrefixIndex:
    """See the module. What is found may be gone by now, and what is not may be there: it is a guess.

    Args:
        max_blocks: different blocks that are remembered; what comes beyond is left out.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.max_blocks = max_blocks
        self._holders: dict[BlockHash, int] = {}
        self._held: dict[str, set[BlockHash]] = {}
        self._bits: dict[str, int] = {}
        self._free_bits: list[int] = []
        self._reach: dict[str, tuple[str, ...]] = {}
        self._views: list[_View] = []

    def __len__(self) -> int:
        return len(self._holders)

    def num_blocks(self, holder: str) -> int:
        """Blocks that a holder is known to have."""
        return len(self._held.get(holder, ()))

    def reach(self, peer: str, holders: Collection[str]) -> None:
        """A peer can use what these holders have; none: it is not matched any more."""
        if holders:
            self._reach[peer] = tuple(holders)
        else:
            self._reach.pop(peer, None)
        self._look()

    def apply(self, holder: str, stored: Iterable[BlockHash], removed: Iterable[BlockHash]) -> None:
        """A holder has come by blocks, and has lost some; those that are in both, it has."""
        if holder not in self._bits:
            self._bits[holder] = self._free_bits.pop() if self._free_bits else 1 << len(self._bits)
            self._held[holder] = set()
            self._look()
        bit, held, holders = self._bits[holder], self._held[holder], self._holders
        self._remove(bit, held, removed)
        room = self.max_blocks - len(holders)
        for block in stored:
            known = holders.get(block)
            if known is not None:
                holders[block] = known | bit
            elif room > 0:
                holders[block] = bit
                room -= 1
            else:
                continue
            held.add(block)

    def forget(self, holder: str) -> None:
        """A holder is gone, with all it had."""
        bit = self._bits.pop(holder, None)
        if bit is not None:
            held = self._held.pop(holder)
            self._remove(bit, held, list(held))
            self._free_bits.append(bit)
            self._look()

    def match(self, hashes: Hashes) -> dict[str, int]:
        """For each peer that has a prompt's first block, how many of its first blocks it has.

        Who has a block is taken to have those before it, unless one that is looked at says otherwise. Looked at are a
        few, each about three times as far on as the one before, and between two of them, where somebody stops, by
        halves. Who has lost a block in the middle may be thought to have too much, never too little.

        Args:
            hashes: of the prompt's full blocks, in order; asked for not much further than somebody has them.
        """
        lengths: dict[str, int] = {}
        if not len(hashes):
            return lengths
        who = self._holders.get(hashes[0], 0)
        there = [view for view in self._views if view[1] & who] if who else []
        block, last = 0, len(hashes) - 1
        while there and block < last:
            step = min(last, 2 * block + _FIRST_STEP)
            there, who = self._follow(hashes, block, step, there, who, lengths)
            block = step
        lengths.update((peer, len(hashes)) for peer, _ in there)
        return lengths

    def _follow(
        self, hashes: Hashes, near: int, far: int, there: list[_View], who: int, lengths: dict[str, int]
    ) -> tuple[list[_View], int]:
        """From one block, with its holders and the peers that have all so far, to another: these for that one. The
        lengths of peers that do not come so far are written down."""
        then = self._holders.get(hashes[far], 0)
        if then == who:
            return there, then
        remain = [view for view in there if view[1] & then]
        if len(remain) == len(there):
            return there, then
        if far - near == 1:
            lengths.update((peer, far) for peer, mask in there if not mask & then)
            return remain, then
        middle = (near + far) // 2
        half, between = self._follow(hashes, near, middle, there, who, lengths)
        return self._follow(hashes, middle, far, half, between, lengths) if half else (half, then)

    def _remove(self, bit: int, held: set[BlockHash], blocks: Iterable[BlockHash]) -> None:
        holders = self._holders
        for block in blocks:
            if block in held:
                held.discard(block)
                left = holders[block] & ~bit
                if left:
                    holders[block] = left
                else:
                    del holders[block]

    def _look(self) -> None:
        """Make the peers' masks anew."""
        self._views = []
        for peer, holders in self._reach.items():
            mask = 0
            for holder in holders:
                mask |= self._bits.get(holder, 0)
            if mask:
                self._views.append((peer, mask))
