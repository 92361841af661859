"""What operators may do to cached KV."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tandem.core.clock import ManualClock
from tandem.core.errors import RequestError
from tandem.core.hashing import block_hashes, root_hash
from tandem.core.kv_messages import KVClear, KVPin, KVUnpin
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_control import KVControl

SIZE = 4
PROMPT = list(range(18))


class Tiers:
    """Counts pins, as an offloader's tiers do."""

    def __init__(self) -> None:
        self.pinned: dict[bytes, int] = {}
        self.cleared: list[str | None] = []

    def pin(self, salt: str, hashes: list[bytes], *, on: bool) -> None:
        for key in hashes:
            self.pinned[key] = self.pinned.get(key, 0) + (1 if on else -1)

    def clear(self, salt: str | None, root: bytes | None) -> None:
        self.cleared.append(salt)


class World:
    """A prefix cache of 16 blocks, and an operator."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pool = BlockPool(16, np.zeros(16, np.uint64))
        self.tiers: Any = Tiers()
        self.control = KVControl(self.pool, self.tiers, "f", SIZE, self.clock)

    def compute(self, salt: str) -> None:
        hashes = block_hashes(PROMPT, SIZE, root_hash("f", salt))
        blocks = self.pool.allocate(len(hashes))
        assert blocks is not None
        for block, key in zip(blocks, hashes, strict=True):
            self.pool.commit(block, key, root_hash("f", salt))
        self.pool.release(blocks)

    def found(self, salt: str) -> int:
        return len(self.pool.match(block_hashes(PROMPT, SIZE, root_hash("f", salt))))

    def fill(self) -> None:
        """Reuse all but four blocks."""
        blocks = self.pool.allocate(12)
        assert blocks is not None
        self.pool.release(blocks)


def test_a_tenant_is_cleared_and_the_others_keep_theirs() -> None:
    world = World()
    world.compute("a")
    world.compute("b")
    assert world.control.carry_out(KVClear(1, "a")) == 4
    assert (world.found("a"), world.found("b")) == (0, 4)
    assert world.control.carry_out(KVClear(2, None)) == 4
    assert (world.found("b"), world.tiers.cleared) == (0, ["a", None])
    world.pool.check()


def test_a_pin_holds_until_its_time_is_over() -> None:
    world = World()
    assert world.control.carry_out(KVPin(1, "a", PROMPT, 60)) == 4  # before it is computed
    world.compute("a")
    world.compute("b")
    world.fill()
    assert (world.found("a"), world.found("b")) == (4, 0)
    assert world.control.next_due_s() == 60
    world.clock.advance(30)
    world.control.carry_out(KVPin(2, "a", PROMPT, 60))  # counts from now
    world.clock.advance(59)
    world.control.poll(world.clock.monotonic_s())
    assert set(world.tiers.pinned.values()) == {1}
    world.clock.advance(1)
    world.control.poll(world.clock.monotonic_s())
    assert set(world.tiers.pinned.values()) == {0}
    assert world.control.next_due_s() is None
    world.compute("b")
    blocks = world.pool.allocate(16)
    assert blocks is not None
    assert world.found("a") == 0


def test_pins_are_undone_one_by_one_by_tenant_or_all() -> None:
    world = World()
    for salt in ("a", "b"):
        world.control.carry_out(KVPin(1, salt, PROMPT[:8]))
    world.control.carry_out(KVPin(1, "b", PROMPT[8:16]))
    assert world.control.carry_out(KVUnpin(2, "b", PROMPT)) == 0
    assert world.control.carry_out(KVUnpin(2, "b", PROMPT[:8])) == 2
    assert world.control.carry_out(KVUnpin(3, "b", [])) == 2
    assert world.control.carry_out(KVUnpin(4, None, [])) == 2
    assert set(world.tiers.pinned.values()) == {0}


def test_what_cannot_be_pinned() -> None:
    world = World()
    with pytest.raises(RequestError, match="a prompt of 3 tokens fills no block of 4"):
        world.control.carry_out(KVPin(1, "", [1, 2, 3]))
    world.control.carry_out(KVPin(1, "", PROMPT))
    with pytest.raises(RequestError, match="13 blocks of 2 prompts would be pinned; the limit is 8"):
        world.control.carry_out(KVPin(1, "b", PROMPT * 2))
    world.control.carry_out(KVPin(1, "b", PROMPT))
