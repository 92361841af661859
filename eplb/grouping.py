"""Which node each group of experts is in: compiled.

A node is as slow as its fullest rank, and that is not below the mean of its ranks, nor below the largest share of load
once its slots are given to replicas. Groups are swapped while that becomes less in the worst node.
"""

from __future__ import annotations

import numpy as np

from ..kernels.compiled import compiled
from .packing import Floats, Ints, count_replicas


@compiled
def regroup(weights: Floats, groups: Ints, num_slots: int, per_node: int, max_swaps: int) -> None:
    """Swap groups between the worst node and others while one helps.

    Args:
        weights: [layers, groups, experts of a group] load.
        groups: [layers, nodes, groups of a node]; updated.
        num_slots: of a node.
        per_node: ranks of a node.
        max_swaps: in a layer.
    """
    num_layers, num_nodes, size = groups.shape
    floors = np.empty(num_nodes)
    experts = np.empty((1, size * weights.shape[2]))
    counts = np.empty((1, size * weights.shape[2]), dtype=np.int32)
    for layer in range(num_layers):
        for node in range(num_nodes):
            floors[node] = _floor(weights[layer], groups[layer, node], num_slots, per_node, experts, counts)
        for _ in range(max_swaps):
            worst = 0
            for node in range(1, num_nodes):
                if floors[node] > floors[worst]:
                    worst = node
            best, best_node, best_out, best_back = floors[worst] * (1.0 - 1e-6), -1, 0, 0
            for node in range(num_nodes):
                if node == worst:
                    continue
                for out in range(size):
                    for back in range(size):
                        _exchange(groups[layer], worst, out, node, back)
                        floor = _floor(weights[layer], groups[layer, worst], num_slots, per_node, experts, counts)
                        if floor < best:
                            floor = max(
                                floor, _floor(weights[layer], groups[layer, node], num_slots, per_node, experts, counts)
                            )
                            if floor < best:
                                best, best_node, best_out, best_back = floor, node, out, back
                        _exchange(groups[layer], worst, out, node, back)
            if best_node < 0:
                break
            _exchange(groups[layer], worst, best_out, best_node, best_back)
            for node in (worst, best_node):
                floors[node] = _floor(weights[layer], groups[layer, node], num_slots, per_node, experts, counts)


@compiled
def _floor(weights: Floats, groups: Ints, num_slots: int, per_node: int, experts: Floats, counts: Ints) -> float:
    """What the fullest rank of a node with these groups cannot be below."""
    place, total = 0, 0.0
    for group in groups:
        for weight in weights[group]:
            experts[0, place] = weight
            total += weight
            place += 1
    most = per_node * ((num_slots + place * per_node - 1) // (place * per_node))
    count_replicas(experts, num_slots, most, counts)
    floor = total / per_node
    for expert in range(place):
        floor = max(floor, experts[0, expert] / counts[0, expert])
    return floor


@compiled
def _exchange(groups: Ints, node: int, place: int, other_node: int, other: int) -> None:
    group = groups[node, place]
    groups[node, place] = groups[other_node, other]
    groups[other_node, other] = group
