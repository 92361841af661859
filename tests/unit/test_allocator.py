"""Blocks of several KV groups, against a model that knows what every block holds and which a step in flight touches."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.engine.allocator import Allocator, num_blocks_needed
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.layout import KVGroup

GROUPS = (KVGroup((0,), 0), KVGroup((1,), 5), KVGroup((2,), 13))
BLOCK_TOKENS, CHUNK, LONGEST = 4, 8, 64
NUM_BLOCKS = num_blocks_needed(GROUPS, LONGEST, CHUNK, BLOCK_TOKENS) + 6
Content = tuple[int, tuple[int, ...]]
"""A group, and the tokens up to and including the one whose KV it is."""


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence("r", tokens, len(tokens), [Child(0, 0)], Sampling(), root_hash("m"))


class Loads(RuleBasedStateMachine):
    """Sequences that start, are computed in chunks, loaded, continued, forked, freed and thrown away, with up to two
    steps in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, np.zeros(NUM_BLOCKS, np.uint64))
        self.allocator = Allocator(self.pool, GROUPS, BLOCK_TOKENS, CHUNK)
        self.sequences: list[Sequence] = []
        self.content: dict[tuple[int, int], Content] = {}
        self.flights: list[tuple[int, set[int]]] = []
        self.announced: dict[int, tuple[int, list[list[int]]]] = {}

    # ---- what a step does ----

    def place(self, sequence: Sequence, group: int, position: int) -> tuple[int, int]:
        block = sequence.tables[group][position // BLOCK_TOKENS]
        assert block >= 0, f"group {group} has no block for position {position}"
        assert sequence.arrays[group][position // BLOCK_TOKENS] == block
        return block, position % BLOCK_TOKENS

    def write(self, sequence: Sequence, group: int, position: int) -> int:
        block, offset = self.place(sequence, group, position)
        assert self.pool._references[block] == 1, "somebody else has this block"
        self.content[block, offset] = group, tuple(sequence.tokens[: position + 1])
        return block

    def compute(self, sequence: Sequence, num_new: int, ahead: bool) -> None:
        first = sequence.num_computed
        assert first + num_new <= sequence.num_reserved
        touched = set()
        for number, group in enumerate(GROUPS):
            for position in range(max(0, first - group.window + 1) if group.window else 0, first):
                block, offset = self.place(sequence, number, position)
                assert self.content[block, offset] == (number, tuple(sequence.tokens[: position + 1]))
                touched.add(block)
            touched |= {self.write(sequence, number, position) for position in range(first, first + num_new)}
        sequence.num_computed += num_new
        self.allocator.num_submitted += 1
        sequence.last_step = self.allocator.num_submitted
        self.flights.append((sequence.last_step, touched))
        while len(self.flights) > (2 if ahead else 0):
            self.collect()

    def collect(self) -> None:
        number, _ = self.flights.pop(0)
        self.allocator.collected(number)

    def tails(self, sequence: Sequence) -> list[list[int]]:
        """The blocks that whoever continues after the known tokens needs."""
        end = -(-sequence.num_tokens // BLOCK_TOKENS)
        firsts = [group.first_block(sequence.num_tokens, BLOCK_TOKENS) for group in GROUPS]
        return [table[first:end] for first, table in zip(firsts, sequence.tables, strict=True)]

    # ---- rules ----

    @rule(
        prompt=st.integers(1, LONGEST - 1),
        own=st.integers(0, 20),
        letter=st.integers(2, 4),
        announced=st.booleans(),
        loaded=st.sampled_from(["no", "no", "well", "badly"]),
    )
    def start(self, prompt: int, own: int, letter: int, announced: bool, loaded: str) -> None:
        tokens = [position % 2 for position in range(max(prompt - own, 0))]
        sequence = sequence_of(tokens + [letter] * (prompt - len(tokens)))
        hit = self.allocator.match(sequence)
        assert hit < sequence.num_tokens
        if not self.allocator.reserve_prompt(sequence, 0, announced=announced):
            assert self.sequences or self.flights, "alone, a sequence must fit"
            self.allocator.release(sequence)
            return
        self.sequences.append(sequence)
        if announced:
            tails = self.tails(sequence)
            assert all(block >= 0 for tail in tails for block in tail)
            self.announced[id(sequence)] = prompt, tails
        if loaded != "no":
            before = self.pool.num_free
            self.allocator.expect(sequence)
            assert self.pool.num_free >= before or announced
            assert self.allocator.reserve(sequence, prompt, prompt), "a reader's blocks are there"
        if loaded == "well":
            for number, group in enumerate(GROUPS):
                first = group.first_block(prompt, BLOCK_TOKENS) * BLOCK_TOKENS
                for position in range(max(first, hit), prompt):
                    self.write(sequence, number, position)
            sequence.num_computed = prompt
            self.allocator.commit(sequence)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 9), wanted=st.integers(1, CHUNK), ahead=st.booleans())
    def step(self, which: int, wanted: int, ahead: bool) -> None:
        sequence = self.sequences[which % len(self.sequences)]
        if sequence.num_computed < sequence.num_tokens:
            num_new = self.allocator.room(sequence, min(wanted, sequence.num_tokens - sequence.num_computed))
            if num_new:
                self.compute(sequence, num_new, ahead)
                self.allocator.commit(sequence)
            if sequence.num_computed == sequence.num_tokens:
                prompt, tails = self.announced.get(id(sequence), (0, []))
                assert prompt != sequence.num_tokens or tails == self.tails(sequence), "a reader was told otherwise"
        elif sequence.num_tokens < LONGEST:
            sequence.tokens.append(sequence.num_tokens % 2)
            if self.allocator.reserve(sequence, sequence.num_tokens):
                self.compute(sequence, 1, ahead)
                self.allocator.commit(sequence)
            else:  # preempted
                assert len(self.sequences) > 1 or self.flights
                self.end(which, False)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        parent = self.sequences[which % len(self.sequences)]
        if parent.num_computed < parent.num_tokens:
            return
        child = sequence_of(parent.tokens)
        copies = self.allocator.fork(parent, child)
        if copies is None:
            return
        for source, target in copies:
            for offset in range(BLOCK_TOKENS):
                self.content.pop((target, offset), None)
                if (source, offset) in self.content:
                    self.content[target, offset] = self.content[source, offset]
        child.tokens.append(7)
        self.sequences.append(child)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 9), wrong=st.booleans())
    def end(self, which: int, wrong: bool) -> None:
        sequence = self.sequences.pop(which % len(self.sequences))
        self.announced.pop(id(sequence), None)
        self.allocator.commit(sequence)
        if wrong:
            num_known, keys = sequence.num_committed, sequence.keys(sequence.num_committed, BLOCK_TOKENS)
            self.allocator.uncache(sequence)
            for key in keys[:num_known]:
                for group in (1, 2):
                    assert self.pool.find(key + group.to_bytes(2, "little")) is None
        self.allocator.release(sequence)
        assert sequence.tables == [[]]

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 9))
    def trim(self, which: int) -> None:
        sequence = self.sequences[which % len(self.sequences)]
        self.allocator.trim(sequence)
        for number, group in enumerate(GROUPS):
            dead = group.first_block(sequence.num_computed, BLOCK_TOKENS)
            assert all(block < 0 for block in sequence.tables[number][:dead])

    @precondition(lambda self: self.flights)
    @rule()
    def land(self) -> None:
        self.collect()

    # ---- invariants ----

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        held = {block for s in self.sequences for table in s.tables for block in table if block >= 0}
        busy = {block for _, blocks in self.allocator._busy for block in blocks}
        assert self.pool.num_free == NUM_BLOCKS - len(held | busy)
        for _, touched in self.flights:
            assert all(self.pool._references[block] > 0 for block in touched), "a step in flight uses a free block"

    def teardown(self) -> None:
        while self.sequences:
            self.end(0, False)
        while self.flights:
            self.collect()
        self.consistent()
        assert self.pool.num_free == NUM_BLOCKS


TestLoads = Loads.TestCase
TestLoads.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@given(
    st.lists(st.sampled_from([0, 3, 9, 20]), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 2**32),
    st.floats(0.5, 1),
)
def test_the_longest_prefix_of_which_every_group_has_what_it_needs(
    windows: list[int], num_tokens: int, seed: int, share: float
) -> None:
    groups = [KVGroup((n,), window) for n, window in enumerate(windows)]
    pool = BlockPool(200, np.zeros(200, np.uint64))
    allocator = Allocator(pool, groups, 2, 8)
    sequence = sequence_of(list(range(num_tokens)))
    whole = (num_tokens - 1) // 2
    rng = random.Random(seed)
    cached = {(g, i) for g in range(len(groups)) for i in range(whole) if rng.random() < share}
    for group, index in cached:
        [block] = pool.allocate(1) or []
        key = sequence.keys(whole, 2)[index]
        pool.commit(block, key + group.to_bytes(2, "little") if group else key, b"")
        pool.release([block])

    def complete(length: int) -> bool:
        return all(
            (number, index) in cached
            for number, group in enumerate(groups)
            for index in range(group.first_block(2 * length, 2), length)
        )

    want = next(length for length in range(whole, -1, -1) if complete(length))
    assert allocator.match(sequence) == 2 * want
    for number, group in enumerate(groups):
        table = sequence.tables[number] if number < len(sequence.tables) else []
        assert [block >= 0 for block in table] == [i >= group.first_block(2 * want, 2) for i in range(len(table))]
    allocator.release(sequence)
    pool.check()
    assert pool.num_free == 200


def test_what_a_sequence_needs() -> None:
    full, narrow = KVGroup((0,), 0), KVGroup((1,), 64)
    assert num_blocks_needed([full], 4000, 256, 16) == 250
    assert num_blocks_needed([full, narrow], 4000, 256, 16) == 250 + 21 + 5
    assert num_blocks_needed([full, narrow], 100, 256, 16) == 14
