"""KV blocks: who uses them, what they hold, and when they may be reused.

A block is *used* (references ≥ 1) or *free*. A free block keeps its content, and its key in the prefix cache, until
it is allocated again; the longest unused goes first. Reuse bumps the block's generation before anything is written,
which is what a remote reader checks after its bytes have landed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..core.hashing import HASH_BYTES, BlockHash


class BlockPool:
    """All blocks of one cache. Owned by the engine thread; nothing blocks.

    Args:
        num_blocks: how many there are.
        generations: [num_blocks] uint64, in memory that peers can read; bumped in place.
        prefix_cache: whether freed blocks can be found again by key.
    """

    def __init__(self, num_blocks: int, generations: np.ndarray, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.generations = generations
        self.on_reuse: Callable[[Sequence[int]], None] = lambda blocks: None
        """Called with blocks that are about to hold something else, once their generations have moved on."""
        self.on_evict: Callable[[Sequence[tuple[int, BlockHash]]], None] | None = None
        """Called with cached blocks, and their keys, that are about to be reused, while they hold what they held."""
        self.journal: dict[BlockHash, bool] | None = None
        """Keys that can be found now (true), or not any more; kept for whoever puts a dict here, and takes it away."""
        self.num_evicted = 0
        """Cached prefixes' blocks that made way for others."""
        self._roots: list[BlockHash] = [b""] * num_blocks
        self._pinned: frozenset[BlockHash] = frozenset()
        self._prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._keys: list[BlockHash | None] = [None] * num_blocks
        self._by_key: dict[BlockHash, int] = {}
        # In order of reuse. Blocks without content come first, then cached ones, the longest unused first.
        self._empty: list[int] = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Cached ones that are pinned: reused when nothing else is left, so that a pin never keeps anybody waiting.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._empty) + len(self._cached) + len(self._kept)

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold a cached prefix."""
        return len(self._cached) + len(self._kept)

    def match(self, keys: Sequence[BlockHash]) -> list[int]:
        """The blocks that hold the longest cached prefix of ``keys``. Takes no reference: `acquire` before anything
        else."""
        blocks: list[int] = []
        if self._prefix_cache:
            for key in keys:
                block = self._by_key.get(key)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def find(self, key: BlockHash) -> int | None:
        """The block that holds the prefix's end that ``key`` names, if one does. Takes no reference, as `match`."""
        return self._by_key.get(key)

    def find_free(self, key: BlockHash) -> int | None:
        """`find` a block that nobody uses: no step writes to it, its content is whole."""
        block = self._by_key.get(key)
        return block if block is not None and self._references[block] == 0 else None

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take a reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                self._cached.pop(block, None)
                self._kept.pop(block, None)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks for new content, or none at all: None when fewer are free."""
        if count > self.num_free:
            return None
        blocks = []
        evicted = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _none = (self._cached or self._kept).popitem(last=False)
                key = self._keys[block]
                assert key is not None, "a cached block has a key"
                evicted.append((block, key))
                self.num_evicted += 1
                self._forget(block)
            self._references[block] = 1
            self.generations[block] += 1
            blocks.append(block)
        if evicted and self.on_evict is not None:
            self.on_evict(evicted)
        self.on_reuse(blocks)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give a reference to each block back. Later blocks of a prefix are reused before earlier ones.

        Raises:
            ValueError: a block has no reference.
        """
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise ValueError(f"block {block} is released once too often")
            self._references[block] -= 1
            if self._references[block] == 0:
                key = self._keys[block]
                if key is None:
                    self._empty.append(block)
                else:
                    self._place(block, key)

    def commit(self, block: int, key: BlockHash, root: BlockHash) -> None:
        """A used block is full and holds the prefix that ``key`` names, in the chain that begins with ``root``. The
        first block of a key is the one that is found."""
        if self._prefix_cache and self._keys[block] is None and key not in self._by_key:
            self._keys[block], self._roots[block] = key, root
            self._by_key[key] = block
            if self.journal is not None:
                self.journal[key] = True

    def keys(self) -> list[BlockHash]:
        """All keys that can be found."""
        return list(self._by_key)

    def uncache(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable: their content is not to be trusted."""
        for block in blocks:
            self._forget(block)
            for free in (self._cached, self._kept):
                if block in free:
                    del free[block]
                    self._empty.append(block)

    def clear(self, root: BlockHash | None = None) -> int:
        """Make all blocks unfindable, or those of the chains that begin with ``root``. Returns how many. Looks at every
        block."""
        blocks = [block for block in self._by_key.values() if root is None or self._roots[block] == root]
        self.uncache(blocks)
        return len(blocks)

    def pin(self, keys: Iterable[BlockHash]) -> None:
        """These are pinned, and no others: what they name, in every KV group, is kept as long as there is anything else
        to reuse, whether it is there by now or comes later. Looks at every cached block."""
        self._pinned = frozenset(keys)
        free = [*self._cached, *self._kept]
        self._cached.clear()
        self._kept.clear()
        for block in free:
            key = self._keys[block]
            assert key is not None, "a cached block has a key"
            self._place(block, key)

    def generations_of(self, blocks: Sequence[int]) -> list[int]:
        """Present generation of each block."""
        return [int(generation) for generation in self.generations[blocks]] if len(blocks) else []

    def check(self) -> None:
        """Verify the invariants; for tests and for idle moments.

        Raises:
            AssertionError: the pool is inconsistent.
        """
        free = set(self._empty) | set(self._cached) | set(self._kept)
        assert len(free) == self.num_free, "a block is free twice"
        for block in range(self.num_blocks):
            assert (self._references[block] == 0) == (block in free), f"block {block}: free and used disagree"
            key = self._keys[block]
            assert key is None or self._by_key[key] == block, f"block {block}: its key leads elsewhere"
        assert all(self._keys[block] is not None for block in (*self._cached, *self._kept)), "a cached block has no key"
        assert all(self._keys[block] is None for block in self._empty), "an empty block has a key"

    def _place(self, block: int, key: BlockHash) -> None:
        free = self._kept if self._pinned and key[:HASH_BYTES] in self._pinned else self._cached
        free[block] = None

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
            if self.journal is not None:
                self.journal[key] = False
