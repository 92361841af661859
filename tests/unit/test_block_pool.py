"""The block pool against a slow, obviously right model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from tandem.core.hashing import block_hashes, root_hash
from tandem.engine.block_pool import BlockPool

BLOCKS = 7
ROOT = root_hash("test")


def keys_of(length: int, salt: int) -> list[bytes]:
    return block_hashes([salt] * length, 1, ROOT)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, fill and give back blocks; a dictionary knows what each block must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.generations = np.zeros(BLOCKS, np.uint64)
        self.pool = BlockPool(BLOCKS, self.generations)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.seen = [0] * BLOCKS

    held = Bundle("held")

    @rule(target=held, count=st.integers(1, 4))
    def allocate(self, count: int) -> list[int]:
        used = {block for holder in self.holders for block in holder}
        before = self.generations.copy()
        blocks = self.pool.allocate(count)
        if blocks is None:
            assert count > BLOCKS - len(used), "refused although there was room"
            return []
        assert len(set(blocks)) == count
        assert not used & set(blocks), "a used block was given out"
        for block in blocks:
            assert self.generations[block] == before[block] + 1, "reuse must show in the generation"
            self.content.pop(block, None)
        self.holders.append(blocks)
        return blocks

    @rule(holder=held, salt=st.integers(0, 2))
    def commit(self, holder: list[int], salt: int) -> None:
        if holder not in self.holders:
            return
        for block, key in zip(holder, keys_of(len(holder), salt), strict=True):
            known = key in self.content.values()
            self.pool.commit(block, key, bytes([salt]))
            if block not in self.content and not known:
                self.content[block] = key

    @rule(salt=st.integers(0, 2), length=st.integers(0, 5))
    def pin(self, salt: int, length: int) -> None:
        self.pool.pin(keys_of(length, salt))

    @rule(salt=st.integers(0, 2))
    def clear(self, salt: int) -> None:
        mine = {block for block, key in self.content.items() if key in keys_of(BLOCKS, salt)}
        assert self.pool.clear(bytes([salt])) == len(mine)
        for block in mine:
            del self.content[block]

    @rule(target=held, salt=st.integers(0, 2), length=st.integers(1, 5))
    def match(self, salt: int, length: int) -> list[int]:
        keys = keys_of(length, salt)
        blocks = self.pool.match(keys)
        for block, key in zip(blocks, keys, strict=False):
            assert self.content[block] == key, "a match must hold what was asked for"
        present = set(self.content.values())
        longest = next((i for i, key in enumerate(keys) if key not in present), length)
        assert len(blocks) == longest
        if blocks:
            self.pool.acquire(blocks)
            self.holders.append(blocks)
        return blocks

    @rule(holder=consumes(held))
    def release(self, holder: list[int]) -> None:
        if holder in self.holders:
            self.holders.remove(holder)
            self.pool.release(holder)

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        used = {block for holder in self.holders for block in holder}
        assert self.pool.num_free == BLOCKS - len(used)


TestPool = PoolMachine.TestCase


def pool(blocks: int = 4, prefix_cache: bool = True) -> BlockPool:
    return BlockPool(blocks, np.zeros(blocks, np.uint64), prefix_cache)


def test_the_longest_unused_goes_first_and_tails_before_heads() -> None:
    p = pool()
    first, second = p.allocate(2), p.allocate(2)
    assert first is not None
    assert second is not None
    for blocks, salt in ((first, 0), (second, 1)):
        for block, key in zip(blocks, keys_of(2, salt), strict=True):
            p.commit(block, key, b"")
    p.release(first)
    p.release(second)
    assert p.allocate(1) == [first[1]]
    assert p.allocate(1) == [first[0]]
    assert p.match(keys_of(2, 1)) == second


def test_all_or_nothing() -> None:
    p = pool()
    assert p.allocate(5) is None
    assert p.num_free == 4


def test_releasing_twice_is_an_error() -> None:
    p = pool()
    blocks = p.allocate(1)
    assert blocks is not None
    p.release(blocks)
    with pytest.raises(ValueError, match="once too often"):
        p.release(blocks)


def test_without_a_prefix_cache_nothing_is_found() -> None:
    p = pool(prefix_cache=False)
    blocks = p.allocate(2)
    assert blocks is not None
    for block, key in zip(blocks, keys_of(2, 0), strict=True):
        p.commit(block, key, b"")
    assert p.match(keys_of(2, 0)) == []
    p.release(blocks)
    p.check()


def test_what_is_pinned_goes_last_and_goes_all_the_same() -> None:
    p = BlockPool(6, np.zeros(6, np.uint64))
    pinned, other = keys_of(2, 0), keys_of(2, 1)
    p.pin(pinned[:1])
    for keys in (pinned, other):
        blocks = p.allocate(2)
        assert blocks is not None
        for block, key in zip(blocks, [keys[0], keys[0] + b"\1\0"], strict=True):  # in two KV groups
            p.commit(block, key, b"")
        p.release(blocks)
    assert p.allocate(4) is not None
    assert p.match(other) == []
    assert p.find(pinned[0]) is not None
    assert p.find(pinned[0] + b"\1\0") is not None
    assert p.num_free == p.num_cached == 2
    assert p.allocate(2) is not None
    assert p.match(pinned) == []
