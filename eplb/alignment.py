"""Which new rank takes the place of which old one, and which slot each expert: so that little moves. Compiled."""

from __future__ import annotations

import numpy as np

from ..kernels.compiled import compiled
from .packing import Ints


@compiled
def relabel(current: Ints, slots: Ints, num_experts: int, num_nodes: int) -> None:
    """Reorder nodes, and ranks in them, such that ranks keep many of their experts; the largest overlaps first.

    Args:
        current: [layers, ranks, slots of a rank] the expert that each slot holds now.
        slots: the same of a placement to come; reordered.
        num_experts: of a layer.
        num_nodes: equal ranges of ranks that stay together.
    """
    num_layers, num_ranks, size = slots.shape
    per_node = num_ranks // num_nodes
    holds = np.empty((num_ranks, num_experts), dtype=np.bool_)
    overlap = np.empty((num_ranks, num_ranks), dtype=np.int32)
    by_node = np.empty((num_nodes, num_nodes), dtype=np.int32)
    part = np.empty((per_node, per_node), dtype=np.int32)
    nodes = np.empty(num_nodes, dtype=np.int32)
    ranks = np.empty(per_node, dtype=np.int32)
    before = np.empty((num_ranks, size), dtype=np.int32)
    for layer in range(num_layers):
        holds[:] = False
        for rank in range(num_ranks):
            for expert in current[layer, rank]:
                holds[rank, expert] = True
        overlap[:] = 0
        by_node[:] = 0
        for rank in range(num_ranks):
            for old in range(num_ranks):
                for expert in slots[layer, rank]:
                    overlap[rank, old] += holds[old, expert]
                by_node[rank // per_node, old // per_node] += overlap[rank, old]
        _match(by_node, nodes)
        before[:] = slots[layer]
        for node in range(num_nodes):
            to = nodes[node]
            part[:] = overlap[node * per_node : (node + 1) * per_node, to * per_node : (to + 1) * per_node]
            _match(part, ranks)
            for rank in range(per_node):
                slots[layer, to * per_node + ranks[rank]] = before[node * per_node + rank]


@compiled
def _match(overlap: Ints, partners: Ints) -> None:
    """Pair rows with columns, the largest entries first."""
    size = len(partners)
    partners[:] = -1
    taken = np.zeros(size, dtype=np.bool_)
    level = overlap.max()
    while level >= 0:
        next_level = -1
        for row in range(size):
            if partners[row] >= 0:
                continue
            for column in range(size):
                if taken[column]:
                    continue
                if overlap[row, column] >= level:
                    partners[row] = column
                    taken[column] = True
                    break
                next_level = max(next_level, overlap[row, column])
        level = next_level


@compiled
def keep_slots(current: Ints, slots: Ints) -> None:
    """Reorder each rank's slots such that an expert that it had and keeps stays where it is.

    Args:
        current: [layers, ranks, slots of a rank] the expert that each slot holds now.
        slots: the same of a placement to come; reordered.
    """
    num_layers, num_ranks, size = slots.shape
    for layer in range(num_layers):
        for rank in range(num_ranks):
            old, new = current[layer, rank], slots[layer, rank]
            for place in range(size):
                if new[place] == old[place]:
                    continue
                for other in range(size):
                    if new[other] == old[place] and new[other] != old[other]:
                        new[place], new[other] = new[other], new[place]
                        break
