"""How ranks agree: the machines of several ranks in any order of events, with ranks that fail, lag and die."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.core.clock import ManualClock
from tandem.core.errors import IllegalTransition, WorkerError
from tandem.eplb.placement import Placement
from tandem.eplb.rebalance import Commit, End, Phase, ReadPlan, Reason, Rebalance, Stage, Word
from tandem.eplb.standing import Standing, agree

SIZE, LAYERS, SLOTS, LOGICAL = 3, 2, 2, 4
TIMEOUT_S = 1.0


def placement(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = [
        generator.permutation([*range(LOGICAL), *generator.integers(0, LOGICAL, SIZE * SLOTS - LOGICAL)])
        for _ in range(LAYERS)
    ]
    return np.array(rows, np.int32)


class Rank:
    """A rank with weights: of each slot the number of the expert whose they are. Reads happen one by one."""

    def __init__(self, number: int, clock: ManualClock, standing: Standing) -> None:
        self.number = number
        self.machine = Rebalance(number, SIZE, clock, TIMEOUT_S)
        self.machine.resume(standing.attempt)
        self.rows = [list(row) for row in standing.rows]
        self.generations = list(standing.generations)
        self.live = [list(row[number * SLOTS : (number + 1) * SLOTS]) for row in standing.rows]
        self.staged: list[int | None] = [None] * SLOTS
        self.job: Any = None
        self.todo: list[tuple[int, int]] = []
        self.late: list[tuple[int, int]] = []
        """Reads that were given up, and that may write all the same until they are drained."""
        self.plan: np.ndarray = placement(0)
        self.layers: list[int] = []
        self.said: list[Word] = []
        self.num_decided = 0

    def swap_in(self, layer: int) -> None:
        for slot in range(SLOTS):
            wanted = int(self.plan[layer, self.number * SLOTS + slot])
            if self.live[layer][slot] != wanted:
                assert self.staged[slot] == wanted, "what is committed was not staged, or not all of it"
                self.live[layer][slot] = wanted
        self.generations[layer] += 1
        self.rows[layer] = self.plan[layer].tolist()
        self.staged = [None] * SLOTS


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ranks = [
            Rank(n, self.clock, Standing.first(Placement.from_physical(placement(0), LOGICAL))) for n in range(SIZE)
        ]
        self.plan = placement(0)
        self.seen: Counter[str] = Counter()

    def offer(self, seed: int) -> None:
        leader = self.ranks[0].machine
        if leader.phase is Phase.IDLE:
            self.plan = placement(seed)
            leader.offer(seed)

    def boundary(self, rank: Rank, words: list[Word] | None = None) -> None:
        """A rank comes to its next exchange, unless it would have to wait for the last."""
        if rank.said:
            last = rank.num_decided
            if words is None:
                if any(len(other.said) <= last for other in self.ranks):
                    return
                words = [other.said[last] for other in self.ranks]
            self.follow(rank, rank.machine.decide([Word.unpack(word.pack()) for word in words]))
            rank.num_decided += 1
        if (ended := rank.machine.withdraw()) is not None:
            self.follow(rank, [ended])
        rank.said.append(rank.machine.say())

    def follow(self, rank: Rank, instructions: list[Any]) -> None:
        for instruction in instructions:
            if not isinstance(instruction, Commit):
                rank.late, rank.todo = rank.late + rank.todo, []
            match instruction:
                case Commit():
                    self.seen["committed"] += 1
                    rank.swap_in(rank.layers[instruction.position - 1])
                case End():
                    self.seen[instruction.reason.name] += 1
                    rank.job = instruction
                case Stage() | ReadPlan():
                    rank.job = instruction

    def work(self, rank: Rank, late: bool) -> None:
        """The rank's other thread does a little."""
        if late and rank.late:
            self.read(rank, rank.late)
            return
        match rank.job:
            case ReadPlan(attempt=attempt):
                rank.plan = self.plan.copy()
                rank.layers = [layer for layer in range(LAYERS) if rank.rows[layer] != rank.plan[layer].tolist()]
                rank.machine.ready(attempt, 0, len(rank.layers))
                rank.job = None
            case Stage(attempt=attempt, position=position):
                layer = rank.layers[position - 1]
                if not rank.todo:
                    rank.staged = [None] * SLOTS
                    rank.todo = [(layer, slot) for slot in range(SLOTS)]
                if self.read(rank, rank.todo):
                    rank.machine.ready(attempt, position, len(rank.layers))
                    rank.job = None
            case End(attempt=attempt):
                rank.late = []
                rank.machine.freed(attempt)
                rank.job = None

    def read(self, rank: Rank, todo: list[tuple[int, int]]) -> bool:
        """One slot, from whoever holds its expert by the placement that this rank knows; whether it was the last."""
        layer, slot = todo.pop()
        expert = int(rank.plan[layer, rank.number * SLOTS + slot])
        holder = rank.rows[layer].index(expert)
        peer = self.ranks[holder // SLOTS]
        assert peer.generations[layer] == rank.generations[layer], "a layer is read that was overwritten"
        rank.staged[slot] = peer.live[layer][holder % SLOTS]
        return not todo

    def crash(self, dead: Rank, sees: int) -> None:
        """A rank dies; of its last words, some of the others may have had all and decided. Another takes its place."""
        for rank in self.ranks:
            if rank is not dead and sees >> rank.number & 1:
                self.boundary(rank)  # where all have said their word
        standings: list[Standing | None] = []
        for rank in self.ranks:
            promised = rank.machine.promised
            layer = rank.layers[promised - 1] if promised else None
            row = rank.plan[layer].tolist() if layer is not None else []
            self.follow(rank, rank.machine.leave(Reason.PEER_LOST))
            standing = Standing(rank.machine.attempt, rank.generations, rank.rows, LOGICAL, layer, row)
            standings.append(None if rank is dead else standing)
        agreed = agree(standings)
        assert agreed is not None
        for number, rank in enumerate(self.ranks):
            if rank is dead:
                self.ranks[number] = Rank(number, self.clock, agreed)
                continue
            old = standings[number]
            assert old is not None
            if old.promised is not None and agreed.generations[old.promised] != rank.generations[old.promised]:
                self.seen["rolled forward"] += 1
                rank.swap_in(old.promised)
            while rank.job is not None:
                self.work(rank, late=False)
            rank.machine.resume(agreed.attempt)
            rank.said, rank.num_decided = [], 0
        assert len({str((rank.rows, rank.generations)) for rank in self.ranks}) == 1

    def check(self) -> None:
        for rank in self.ranks:
            for layer in range(LAYERS):
                mine = rank.rows[layer][rank.number * SLOTS : (rank.number + 1) * SLOTS]
                assert rank.live[layer] == mine, "a slot holds what the maps do not say"
        by_time: dict[int, str] = {}
        for rank in self.ranks:
            rows = by_time.setdefault(rank.num_decided, str(rank.rows))
            assert rows == str(rank.rows), "two ranks have other maps in the same step"

    def settle(self) -> None:
        """Leave all alone: soon nothing is under way any more."""
        for _ in range(24):
            for rank in self.ranks:
                self.boundary(rank)
                for _ in range(SLOTS + 1):
                    self.work(rank, late=True)
                self.check()
        assert [rank.machine.phase for rank in self.ranks] == [Phase.IDLE] * SIZE


EVENTS = st.tuples(
    st.sampled_from(["boundary"] * 8 + ["work"] * 8 + ["offer", "offer", "fail", "tick", "crash"]),
    st.integers(0, SIZE - 1),
    st.integers(0, 7),
)


def test_whatever_happens_ranks_stay_equal() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=150)
    @given(st.lists(EVENTS, min_size=60, max_size=300))
    def play(events: list[tuple[str, int, int]]) -> None:
        world = World()
        for kind, number, choice in events:
            rank = world.ranks[number]
            match kind:
                case "boundary":
                    world.boundary(rank)
                case "work":
                    world.work(rank, late=bool(choice & 1))
                case "offer":
                    world.offer(choice)
                case "fail":
                    rank.machine.failed(rank.machine.attempt, Reason.EXCEPTION)
                case "tick":
                    world.clock.advance(TIMEOUT_S * (0.3 + choice / 4))
                case "crash":
                    world.crash(rank, choice)
            world.check()
        world.settle()
        world.offer(99)
        world.settle()
        assert all(rank.rows == placement(99).tolist() for rank in world.ranks), "the next attempt did not succeed"
        seen.update(world.seen)

    play()
    assert {"committed", "DONE", "EXCEPTION", "TIMEOUT", "PEER_LOST", "NOT_BEGUN"} <= seen.keys(), seen


@pytest.mark.parametrize("sees", range(8))
def test_a_commit_that_only_some_have_heard_of_is_everybodys(sees: int) -> None:
    world = World()
    world.offer(7)
    while any(rank.machine.phase is not Phase.READY or rank.machine.position == 0 for rank in world.ranks):
        for rank in world.ranks:
            world.boundary(rank)
            world.work(rank, late=False)
    last = max(len(rank.said) for rank in world.ranks)
    while any(rank.said[-1].phase is not Phase.READY or len(rank.said) < last for rank in world.ranks):
        for rank in world.ranks:
            if rank.machine.promised == 0:
                world.boundary(rank)
        last = max(len(rank.said) for rank in world.ranks)
    world.crash(world.ranks[2], sees)
    world.check()
    assert world.seen["committed"] == (sees & 3).bit_count()
    assert world.seen["rolled forward"] == (2 - (sees & 3).bit_count() if sees & 3 else 0)
    assert [rank.generations for rank in world.ranks] == [[int(bool(sees & 3)), 0]] * SIZE
    world.offer(99)
    world.settle()
    assert all(rank.rows == placement(99).tolist() for rank in world.ranks)


def test_no_attempt_begins_before_every_read_of_the_last_has_drained() -> None:
    world = World()
    world.offer(7)
    slow = world.ranks[1]
    while slow.machine.position == 0:
        for rank in world.ranks:
            world.boundary(rank)
            if rank.machine.position == 0:
                world.work(rank, late=False)
    world.work(slow, late=False)  # some of its reads, not all
    world.ranks[2].machine.failed(1, Reason.EXCEPTION)
    for _ in range(6):
        for rank in world.ranks:
            world.boundary(rank)
            if rank is not slow:
                world.work(rank, late=False)
    assert world.seen["EXCEPTION"] == SIZE
    world.offer(8)
    for _ in range(6):
        for rank in world.ranks:
            world.boundary(rank)
    assert [rank.machine.phase for rank in world.ranks] == [Phase.OFFERS, Phase.DRAINING, Phase.IDLE]
    world.settle()
    assert all(rank.rows == placement(8).tolist() for rank in world.ranks)


def test_a_promise_holds_though_the_rank_fails_meanwhile() -> None:
    clock = ManualClock()
    a, b = (Rebalance(rank, 2, clock, TIMEOUT_S) for rank in range(2))
    a.offer(5)

    def exchange() -> list[Any]:
        words = [a.say(), b.say()]
        return [a.decide(words), b.decide(words)]

    assert exchange() == [[ReadPlan(1, 5)]] * 2
    for machine in (a, b):
        machine.ready(1, 0, 1)
    assert exchange() == [[Stage(1, 1)]] * 2
    for machine in (a, b):
        machine.ready(1, 1, 1)
    words = [a.say(), b.say()]
    b.failed(1, Reason.EXCEPTION)
    assert [type(one) for one in a.decide(words)] == [Commit, End]
    assert [type(one) for one in b.decide(words)] == [Commit, End]


def test_ranks_with_other_plans_do_not_commit() -> None:
    clock = ManualClock()
    machines = [Rebalance(rank, 2, clock, TIMEOUT_S) for rank in range(2)]
    machines[0].offer(5)
    words = [machine.say() for machine in machines]
    for machine in machines:
        machine.decide(words)
    machines[0].ready(1, 0, 1)
    machines[1].ready(1, 0, 2)
    words = [machine.say() for machine in machines]
    assert [machine.decide(words) for machine in machines] == [[End(1, Reason.DISAGREE, 1, 0)]] * 2


def test_misuse_is_an_error() -> None:
    clock = ManualClock()
    with pytest.raises(IllegalTransition, match="rank 1 offers"):
        Rebalance(1, 2, clock, TIMEOUT_S).offer(1)
    leader = Rebalance(0, 2, clock, TIMEOUT_S)
    leader.offer(1)
    with pytest.raises(IllegalTransition, match="while it is OFFERS"):
        leader.offer(1)
    for bad in (b"", b"\xff" * 64, Word(1, 0, 77, 0, 0, 0).pack()):  # type: ignore[arg-type]
        with pytest.raises(WorkerError, match="cannot be understood"):
            Word.unpack(bad)


def test_ranks_that_did_not_serve_together_are_refused() -> None:
    first = Standing.first(Placement.from_physical(placement(1), LOGICAL))
    other = Standing.first(Placement.from_physical(placement(2), LOGICAL))
    assert agree([first, None, first]) == first
    assert agree([None, None]) is None
    with pytest.raises(WorkerError, match=r"rank \d has layer 0 in a version"):
        agree([first, other])
    ahead = Standing(3, [2, 0], other.rows, LOGICAL)
    with pytest.raises(WorkerError, match="did not serve together"):
        agree([first, ahead])
