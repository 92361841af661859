"""From one placement to the next: what each rank does."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tandem.eplb.moves import Move, changed_layers, first_pulls, plan_moves
from tandem.eplb.placement import Topology


@st.composite
def changes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Topology]:
    nodes = draw(st.integers(1, 3))
    ranks = nodes * draw(st.integers(1, 3))
    slots = draw(st.integers(1, 4))
    num_physical = ranks * slots
    num_logical = draw(st.integers(1, num_physical))

    def placement() -> np.ndarray:
        rest = draw(st.lists(st.integers(0, num_logical - 1), min_size=num_physical, max_size=num_physical))
        row = [*range(num_logical), *rest][:num_physical]
        return np.array(draw(st.permutations(row)), np.int32)

    return placement(), placement(), Topology(num_physical, ranks, nodes)


@given(changes())
def test_moves_make_the_new_placement_out_of_the_old(change: tuple[np.ndarray, np.ndarray, Topology]) -> None:
    old, new, topology = change
    size = topology.slots_per_rank
    live = old.reshape(topology.num_ranks, size)
    result = live.copy()
    all_moves = plan_moves(old, new, topology)
    for rank, moves in enumerate(all_moves):
        pulls, again = first_pulls(moves, rank)
        staged = {pull.target: live[pull.rank, pull.source] for pull in pulls}
        staged |= {move.target: live[rank, move.source] for move in moves if move.rank == rank}
        staged |= {target: staged[first] for first, target in again}
        for target, expert in staged.items():
            result[rank, target] = expert
    np.testing.assert_array_equal(result.reshape(-1), new)
    for rank, moves in enumerate(all_moves):
        assert [move.target for move in moves] == np.flatnonzero(live[rank] != new.reshape(-1, size)[rank]).tolist()
        pulls, _ = first_pulls(moves, rank)
        experts = [live[pull.rank, pull.source] for pull in pulls]
        assert len(set(experts)) == len(experts), "an expert travels twice to one rank"
        assert not set(experts) & set(live[rank]), "an expert travels to a rank that has it"
        for pull, expert in zip(pulls, experts, strict=True):
            nodes = {int(holder) // size // topology.ranks_per_node for holder in np.flatnonzero(old == expert)}
            if (node := rank // topology.ranks_per_node) in nodes:
                assert pull.rank // topology.ranks_per_node == node, "it comes from afar though a neighbour has it"


def test_holders_share_the_work() -> None:
    # Expert 0 is on ranks 0 and 1, and comes to ranks 2 to 5.
    old = np.array([0, 0, 1, 2, 3, 4], np.int32)
    moves = plan_moves(old, np.array([0, 0, 0, 0, 0, 0], np.int32), Topology(6, 6))
    assert sorted(move[0].rank for move in moves[2:]) == [0, 0, 1, 1]
    assert moves[:2] == [[], []]


def test_a_second_slot_is_filled_from_the_first() -> None:
    moves = plan_moves(np.array([0, 0, 1, 2], np.int32), np.array([2, 2, 1, 0], np.int32), Topology(4, 2))
    assert moves == [[Move(0, 1, 1), Move(1, 1, 1)], [Move(1, 0, 0)]]
    assert first_pulls(moves[0], 0) == ([Move(0, 1, 1)], [(0, 1)])


def test_layers_that_stay_are_not_named() -> None:
    old = np.array([[0, 1], [1, 0], [0, 1]], np.int32)
    assert changed_layers(old, old) == []
    assert changed_layers(old, np.array([[1, 0], [1, 0], [1, 0]], np.int32)) == [0, 2]
