"""From one placement of a layer's experts to the next: what each rank keeps, copies and pulls. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .placement import Topology


class Move(NamedTuple):
    """An expert that comes into one of a rank's slots. Slots are counted within their rank."""

    target: int
    """The slot, of the rank that moves."""
    rank: int
    """Whose slot holds the expert now; may be the rank itself."""
    source: int
    """That slot."""


def plan_moves(old: NDArray[np.int32], new: NDArray[np.int32], topology: Topology) -> list[list[Move]]:
    """What each rank does in one layer, in ascending order of target. Slots that are not named stay as they are.

    An expert that a rank holds already is copied on the spot. Each of the others is pulled by each rank once, from a
    holder in the rank's own node if there is one, of several from the one that has given the fewest, so that no link
    carries all; a rank's further slots for it are copies of the first, with the same source.

    Args:
        old: [physical] int32: the expert that each slot holds.
        new: likewise, afterwards; of experts that ``old`` holds.
        topology: of the slots.

    Returns:
        a list for each rank. The same on all ranks.
    """
    size = topology.slots_per_rank
    holders: dict[int, list[int]] = defaultdict(list)
    for slot, expert in enumerate(old.tolist()):
        holders[expert].append(slot)
    num_given = [0] * topology.num_ranks
    moves: list[list[Move]] = [[] for _ in range(topology.num_ranks)]
    chosen: dict[tuple[int, int], int] = {}
    for slot in np.flatnonzero(old != new).tolist():
        expert, rank = int(new[slot]), slot // size
        source = chosen.get((rank, expert))
        if source is None:
            node = rank // topology.ranks_per_node

            def distance(holder: int, rank: int = rank, node: int = node) -> tuple[bool, bool, int, int]:
                owner = holder // size
                near = owner // topology.ranks_per_node == node
                return owner != rank, not near, num_given[owner], holder

            source = chosen[rank, expert] = min(holders[expert], key=distance)
            if source // size != rank:
                num_given[source // size] += 1
        moves[rank].append(Move(slot % size, source // size, source % size))
    return moves


def changed_layers(old: NDArray[np.int32], new: NDArray[np.int32]) -> list[int]:
    """The layers of two [layers, physical] placements that differ, in the order in which they are moved."""
    return [int(layer) for layer in np.flatnonzero((old != new).any(axis=1))]


def first_pulls(moves: Sequence[Move], rank: int) -> tuple[list[Move], list[tuple[int, int]]]:
    """What travels, and what is copied from it afterwards.

    Args:
        moves: of one rank.
        rank: that rank.

    Returns:
        the moves whose experts come from peers, one for each expert; and pairs (from, to) of targets that get the same.
    """
    pulled: dict[tuple[int, int], Move] = {}
    again: list[tuple[int, int]] = []
    for move in moves:
        if move.rank == rank:
            continue
        first = pulled.setdefault((move.rank, move.source), move)
        if first is not move:
            again.append((first.target, move.target))
    return list(pulled.values()), again
