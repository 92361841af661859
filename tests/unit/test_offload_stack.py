"""The stack of tiers against a slow model of lists, and under random interleavings of everything."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from support.tiers import LAYOUT
from tandem.core.clock import ManualClock
from tandem.core.metrics import WorkerMetrics
from tandem.kv_transfer.offload.base import HostBlocks, LoadJob, Lookup, Spill, StoreJob
from tandem.kv_transfer.offload.indexed import FIRST_AWAY_S
from tandem.kv_transfer.offload.keys import key_space, tenant_tag
from tandem.kv_transfer.offload.simulated import Cost, SimulatedTier
from tandem.kv_transfer.offload.stack import Level, OffloadStack, StackResult, Write

BLOCK_BYTES = 16
KEYS = [key_space("", LAYOUT).of([number.to_bytes(16, "little")])[0] for number in range(14)]
OTHERS = [key_space("b", LAYOUT).of([number.to_bytes(16, "little")])[0] for number in range(4)]
COST = Cost(latency_s=0.5, load_bytes_per_s=BLOCK_BYTES, store_bytes_per_s=BLOCK_BYTES)


def content(key: bytes) -> np.ndarray:
    return np.frombuffer(key[:15] + bytes([255]), np.uint8)


class World:
    """A stack of simulated tiers, and blocks to copy from and to."""

    def __init__(
        self, sizes: list[int], writes: list[Write | None], num_spill: int = 100, timeout_s: float = float("inf")
    ) -> None:
        self.clock = ManualClock()
        self.tiers = [
            SimulatedTier(f"tier-{number}", size, BLOCK_BYTES, "lru", COST, self.clock, timeout_s)
            for number, size in enumerate(sizes)
        ]
        self.spill = Spill(num_spill, HostBlocks(np.zeros(num_spill * BLOCK_BYTES, np.uint8), BLOCK_BYTES))
        levels = [Level(tier, write) for tier, write in zip(self.tiers, writes, strict=True)]
        self.stack = OffloadStack(levels, self.spill)
        self.memory = HostBlocks(np.zeros(400 * BLOCK_BYTES, np.uint8), BLOCK_BYTES)
        self.next_block = 0

    def blocks(self, count: int) -> list[int]:
        self.next_block = self.next_block + count if self.next_block + 2 * count <= 400 else 0
        return list(range(self.next_block, self.next_block + count))

    def store(self, keys: list[bytes], evicted: bool = False) -> int:
        blocks = self.blocks(len(keys))
        for key, block in zip(keys, blocks, strict=True):
            self.memory.array[block] = content(key)
        return self.stack.store(keys, self.memory, blocks, evicted=evicted)

    def drain(self) -> list[StackResult]:
        results = self.stack.poll()
        while (at_s := self.stack.next_event_s()) is not None:
            self.clock.advance(max(0.0, at_s - self.clock.monotonic_s()))
            results += self.stack.poll()
        return results

    def held(self, level: int) -> set[bytes]:
        keys = KEYS + OTHERS
        return {key for key, state in zip(keys, self.tiers[level].lookup(keys), strict=True) if state is Lookup.HIT}


class Model:
    """Lists, the least recently used first. What a level gives up goes to the next after everything else."""

    def __init__(self, sizes: list[int], writes: list[Write]) -> None:
        self.sizes = sizes
        self.writes = writes
        self.levels: list[list[bytes]] = [[] for _ in sizes]
        self.seen: list[list[bytes]] = [[] for _ in sizes]

    def use(self, level: int, keys: list[bytes]) -> None:
        for key in reversed(keys):
            if key in self.levels[level]:
                self.levels[level].remove(key)
                self.levels[level].append(key)

    def second(self, level: int, key: bytes) -> bool:
        known = key in self.seen[level]
        self.seen[level].append(key)
        return known

    def put(self, level: int, keys: list[bytes]) -> list[bytes]:
        """Returns what had to go; none of these keys."""
        gone = []
        kept = [key for key in keys if key in self.levels[level]]
        others = [key for key in self.levels[level] if key not in kept]
        for key in keys:
            if key not in kept:
                if len(others) + len(kept) == self.sizes[level]:
                    if not others:
                        continue
                    gone.append(others.pop(0))
                kept.append(key)
        self.levels[level] = others + [key for key in reversed(keys) if key in kept]
        return gone

    def move_down(self, level: int, keys: list[bytes]) -> None:
        if level == len(self.sizes) or not keys or self.writes[level] is Write.THROUGH:
            return
        wanted = [key for key in keys if key not in self.levels[level]]
        if self.writes[level] is Write.SECOND_USE:
            wanted = [key for key in wanted if self.second(level, key)]
        self.move_down(level + 1, self.put(level, wanted))

    def store(self, keys: list[bytes], evicted: bool) -> set[bytes]:
        pushed, kept = [], set()
        for level, write in enumerate(self.writes):
            if write is Write.BACK and not (evicted and level == 0):
                pushed.append([])
                continue
            wanted = keys
            if write is Write.SECOND_USE:
                wanted = [] if evicted else [key for key in keys if self.second(level, key)]
            pushed.append(self.put(level, wanted))
            kept |= set(wanted) & set(self.levels[level])
        for level, gone in enumerate(pushed):
            self.move_down(level + 1, gone)
        return kept

    def load(self, keys: list[bytes]) -> list[int]:
        sources = []
        for key in keys:
            sources.append(next((level for level, held in enumerate(self.levels) if key in held), -1))
        for level in range(len(self.sizes)):
            mine = [key for key, source in zip(keys, sources, strict=True) if source == level]
            for below in range(level, len(self.sizes)):
                self.use(below, mine)
        return sources


some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True)
shapes = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(Write)), min_size=1, max_size=3)
steps = st.lists(st.tuples(st.sampled_from(["store", "store", "evict", "load", "remove"]), some_keys), max_size=40)


@settings(max_examples=300)
@given(shape=shapes, steps=steps)
def test_a_stack_is_its_model(shape: list[tuple[int, Write]], steps: list[tuple[str, list[bytes]]]) -> None:
    """One thing at a time: what is where afterwards is what lists say."""
    sizes, writes = [size for size, _ in shape], [write for _, write in shape]
    world, model = World(sizes, writes), Model(sizes, writes)
    for what, keys in steps:
        if what == "remove":
            world.stack.remove(keys)
            model.levels = [[key for key in held if key not in keys] for held in model.levels]
            world.drain()
        elif what == "load":
            blocks = world.blocks(len(keys))
            number = world.stack.load(keys, world.memory, blocks)
            [result] = world.drain()
            assert result.number == number
            assert list(result.levels) == model.load(keys)
            assert [level >= 0 for level in result.levels] == list(result.good)
            for block, key, good in zip(blocks, keys, result.good, strict=True):
                assert not good or bytes(world.memory.array[block]) == bytes(content(key))
        else:
            number = world.store(keys, evicted=what == "evict")
            [result] = world.drain()
            kept = model.store(keys, what == "evict")
            assert result.number == number
            assert {key for key, good in zip(keys, result.good, strict=True) if good} == kept
        for level, held in enumerate(model.levels):
            assert world.held(level) == set(held)
        for key, found in zip(KEYS, world.stack.lookup(KEYS), strict=True):
            nearest = next((level for level, held in enumerate(model.levels) if key in held), -1)
            assert found == ((Lookup.HIT, nearest) if nearest >= 0 else (Lookup.MISS, -1))
        assert world.spill.num_free == world.spill.num_blocks


actions = st.one_of(
    st.tuples(st.just("store"), some_keys),
    st.tuples(st.just("store other"), st.lists(st.sampled_from(OTHERS), min_size=1, max_size=3, unique=True)),
    st.tuples(st.just("evict"), some_keys),
    st.tuples(st.just("load"), some_keys),
    st.tuples(st.just("touch"), some_keys),
    st.tuples(st.just("lose"), some_keys),
    st.tuples(st.just("clear"), st.just([])),
    st.tuples(st.just("wait"), st.just([])),
    st.tuples(st.just("wait longer"), st.just([])),
)


@settings(max_examples=400)
@given(
    shape=shapes,
    steps=st.lists(actions, max_size=60),
    num_spill=st.integers(0, 6),
    timeout_s=st.sampled_from([2.0, 6.0, float("inf")]),
)
def test_whatever_overlaps(
    shape: list[tuple[int, Write]], steps: list[tuple[str, list[bytes]]], num_spill: int, timeout_s: float
) -> None:
    """Jobs under way, tiers that are late, keys that get lost or are cleared in between: every job ends once, what
    counts as good is right, nothing exceeds its bound, and what was cleared stays away."""
    world = World([size for size, _ in shape], [write for _, write in shape], num_spill, timeout_s)
    expected: dict[int, tuple[list[bytes], list[int] | None]] = {}
    ended: Counter[int] = Counter()

    def check(results: list[StackResult]) -> None:
        for result in results:
            ended[result.number] += 1
            keys, blocks = expected[result.number]
            assert len(result.good) == len(keys)
            if blocks is not None:
                for block, key, good, level in zip(blocks, keys, result.good, result.levels, strict=True):
                    assert good == (level >= 0)
                    assert not good or bytes(world.memory.array[block]) == bytes(content(key))
        for tier, (size, _) in zip(world.tiers, shape, strict=True):
            tier._index.check()
            assert tier.stats().num_used <= size

    cleared = False
    for what, keys in steps:
        if what in ("store", "evict", "store other"):
            if what == "store other" and cleared:
                continue
            expected[world.store(keys, evicted=what == "evict")] = keys, None
        elif what == "load":
            blocks = world.blocks(len(keys))
            world.memory.array[blocks] = 0
            expected[world.stack.load(keys, world.memory, blocks)] = keys, blocks
        elif what == "touch":
            world.stack.touch(keys)
        elif what == "lose":
            world.tiers[0].remove(keys)
        elif what == "clear":
            world.stack.clear(tenant_tag("b"))
            cleared = True
        else:
            world.clock.advance(0.7 if what == "wait" else 5.0)
        check(world.stack.poll())
        if cleared:
            assert all(found.state is not Lookup.HIT for found in world.stack.lookup(OTHERS))
    check(world.drain())
    world.clock.advance(100.0)
    check(world.drain())
    assert ended == Counter(expected.keys())
    assert world.spill.num_free == num_spill
    assert not world.stack._moving
    if cleared:
        assert all(found.state is Lookup.MISS for found in world.stack.lookup(OTHERS))


def test_what_the_first_tier_gives_up_is_found_in_the_second() -> None:
    world = World([2, 4], [Write.THROUGH, Write.BACK])
    world.store(KEYS[:2])
    world.drain()
    world.store(KEYS[2:4])
    world.clock.advance(2.5)
    world.stack.poll()
    assert [found.state for found in world.stack.lookup(KEYS[:2])] == [Lookup.PENDING] * 2, "on their way down"
    world.drain()
    assert world.stack.lookup(KEYS[:4]) == [(Lookup.HIT, 1)] * 2 + [(Lookup.HIT, 0)] * 2
    world.stack.load(KEYS[:1], world.memory, [300])
    [result] = world.drain()
    assert result.levels == (1,)
    # Up again, as whoever loaded it stores it.
    world.memory.array[300] = content(KEYS[0])
    world.stack.store(KEYS[:1], world.memory, [300])
    world.drain()
    assert world.stack.lookup(KEYS[:1]) == [(Lookup.HIT, 0)]


def test_nothing_is_stored_where_others_store() -> None:
    """What the first tier gives up goes past it, and what it has is loaded from it."""
    world = World([4, 4, 8], [Write.THROUGH, None, Write.BACK])
    for start in range(0, 8, 4):
        world.store(KEYS[start : start + 4])
        world.drain()
    assert world.held(0) == set(KEYS[4:8])
    assert world.held(1) == set()
    assert world.held(2) == set(KEYS[:4])
    others = world.blocks(1)
    world.memory.array[others[0]] = content(KEYS[9])
    world.tiers[1].submit_store(StoreJob([KEYS[9]], world.memory, others))
    while KEYS[9] not in world.held(1):
        world.clock.advance(0.1)
        world.tiers[1].poll()
    number = world.stack.load([KEYS[0], KEYS[9], KEYS[5]], world.memory, world.blocks(3))
    result = next(result for result in world.drain() if result.number == number)
    assert result.levels == (2, 1, 0)


def test_a_block_that_fails_comes_from_the_next_tier() -> None:
    world = World([4, 4], [Write.THROUGH, Write.THROUGH], timeout_s=60)
    world.store(KEYS[:2])
    world.drain()
    number = world.stack.load(KEYS[:2], world.memory, [10, 11])
    upper = world.tiers[0]
    # The first tier forgets what it has while it reads, as a keeper's death makes it do.
    waiting = [item for lane in upper._lanes.values() for _, item in lane]
    for item in [item for _, _, item in upper._under_way] + waiting:
        item.error, item.harmless = "gone", True
    [result] = world.drain()
    assert (result.number, result.good, result.levels) == (number, (True, True), (1, 1))


def test_close_ends_everything() -> None:
    world = World([2, 4], [Write.THROUGH, Write.BACK])
    world.store(KEYS[:2])
    world.drain()
    numbers = {world.store(KEYS[2:4]), world.stack.load(KEYS[:1], world.memory, [300])}
    world.stack.close()
    assert {result.number for result in world.stack.poll()} == numbers
    assert world.spill.num_free == world.spill.num_blocks
    assert world.stack.load(KEYS[:1], None, [0])
    [result] = world.stack.poll()
    assert result.good == (False,)


def test_numbers_are_told_once() -> None:
    world, metrics = World([2, 4], [Write.THROUGH, Write.BACK]), WorkerMetrics(CollectorRegistry())
    for _ in range(2):
        world.store(KEYS[:2])
        world.drain()
        world.store(KEYS[2:4])
        world.drain()
        world.stack.publish(metrics)
        world.stack.publish(metrics)
    value = metrics.registry.get_sample_value
    assert value("tandem_offload_blocks_total", {"tier": "tier-0", "event": "stored"}) == 8
    assert value("tandem_offload_blocks_total", {"tier": "tier-0", "event": "evicted"}) == 6
    assert value("tandem_offload_blocks_total", {"tier": "tier-1", "event": "stored"}) == 4
    assert value("tandem_offload_slots", {"tier": "tier-1", "state": "used"}) == 4
    assert value("tandem_offload_away", {"tier": "tier-1"}) == 0
    world.tiers[1].stats().failures["slow"] += 3
    world.stack.publish(metrics)
    assert value("tandem_offload_failures_total", {"tier": "tier-1", "cause": "slow"}) == 3


def test_a_simulation_needs_no_memory_and_costs_what_it_says() -> None:
    clock = ManualClock()
    tier = SimulatedTier("disk", 8, 1000, "lru", Cost(0.25, 1000.0, 500.0), clock)
    stack = OffloadStack([Level(tier, Write.THROUGH)], Spill(4, None))
    stack.store(KEYS[:3], None, range(3))
    times = []
    while (at_s := stack.next_event_s()) is not None:
        clock.advance(at_s - clock.monotonic_s())
        stack.poll()
        times.append(at_s)
    assert times == pytest.approx([2.25, 4.25, 6.25])
    tier.submit_load(LoadJob(KEYS[:2], None, [0, 1]))
    assert stack.next_event_s() == pytest.approx(6.25 + 1.25)


def test_what_is_late_does_not_keep_a_simulated_tier_busy() -> None:
    """As in a tier of threads: nothing is moved for a job whose end was told."""
    clock = ManualClock()
    tier = SimulatedTier("disk", 8, 1000, "lru", Cost(0.25, 1000.0, 500.0), clock, timeout_s=5.0)
    stack = OffloadStack([Level(tier, Write.THROUGH)], Spill(4, None))
    stack.store(KEYS[:6], None, range(6))
    clock.advance_to(5.0)
    [result] = stack.poll()
    assert result.good == (True, True, False, False, False, False)
    stack.store(KEYS[6:7], None, range(1))
    times = []
    while (at_s := stack.next_event_s()) is not None:
        clock.advance_to(at_s)
        stack.poll()
        times.append(at_s)
    assert times[-1] == pytest.approx(8.25)
    assert tier.lookup(KEYS[:7]) == [Lookup.HIT] * 2 + [Lookup.MISS] * 4 + [Lookup.HIT]


def test_a_tier_that_was_slow_asks_for_a_poll_and_returns_by_itself() -> None:
    clock = ManualClock()
    tier = SimulatedTier("disk", 8, 1000, "lru", Cost(0.0, 500.0, 1e9), clock, timeout_s=5.0)
    stack = OffloadStack([Level(tier, Write.THROUGH)], Spill(4, None))
    stack.store(KEYS[:4], None, range(4))
    clock.advance(0.1)
    stack.poll()
    stack.load(KEYS[:4], None, range(4))
    clock.advance(5.0)
    stack.poll()
    assert (stack.reports()[0].away, tier.lookup(KEYS[:1])) == ("slow", [Lookup.MISS])
    times = []
    while (at_s := stack.next_event_s()) is not None:
        clock.advance_to(at_s)
        stack.poll()
        times.append(at_s)
    assert times[-1] == pytest.approx(5.1 + FIRST_AWAY_S)
    assert (stack.reports()[0].away, tier.lookup(KEYS[:1])) == ("", [Lookup.HIT])


def test_figures_of_each_tier() -> None:
    """What `tandem status --kv` and the metrics show, against a count by hand."""
    world = World([4, 8], [Write.THROUGH, Write.THROUGH])
    metrics = WorkerMetrics(CollectorRegistry())
    world.clock.advance(100)
    world.store(KEYS[:6])  # the first has room for four; a block takes a second, and half a one to arrive
    world.drain()
    world.stack.lookup(KEYS[:7])
    world.stack.load(KEYS[2:6], world.memory, world.blocks(4))
    world.drain()
    near, far = world.stack.reports()
    assert (near.num_used, near.num_blocks, near.lookups, near.hits) == (4, 4, 7, 4)
    assert (far.num_used, far.num_blocks, far.lookups, far.hits) == (6, 8, 3, 2)
    assert (near.stored_bytes, near.loaded_bytes, far.loaded_bytes) == (64, 32, 32)
    assert (near.store_s, near.load_s, far.store_s, far.load_s) == (4.5, 2.5, 6.5, 2.5)
    assert near.oldest_at_s == 101.5
    world.stack.remove(KEYS[:1])
    assert world.stack.reports()[0].oldest_at_s == 102.5
    for _ in range(2):
        world.stack.publish(metrics)
    value = metrics.registry.get_sample_value
    assert value("tandem_offload_hits_total", {"tier": "tier-1"}) == 2
    assert value("tandem_offload_bytes_total", {"tier": "tier-0", "direction": "store"}) == 64
    assert value("tandem_offload_copy_seconds_total", {"tier": "tier-1", "direction": "load"}) == 2.5
    assert value("tandem_offload_oldest_timestamp_seconds", {"tier": "tier-0"}) == 102.5
