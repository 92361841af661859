"""The greedy placement of DeepSeek's EPLB, from its published description: what `tandem bench eplb` compares with.

Heaviest first into the lightest pack with room; the expert with the most load a replica gets the next replica. Batched
over layers, the only difference to the reference, which loops over them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..eplb.placement import Topology

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


def greedy_plan(load: _Floats, topology: Topology) -> _Ints:
    """The expert of each slot. Hierarchical if nodes divide groups, else as one node.

    Args:
        load: [layers, logical] float64.
        topology: slots, ranks, nodes and groups.

    Returns:
        [layers, physical] int64.
    """
    num_layers, num_logical = load.shape
    num_nodes, num_groups = topology.num_nodes, topology.num_groups
    if num_groups % num_nodes:
        num_nodes = num_groups = 1
    group_size = num_logical // num_groups
    by_group = load.reshape(num_layers, num_groups, group_size)
    groups = _packed(by_group.sum(-1), num_nodes)
    # [layers, node, place in the node]: the experts of each node, group by group.
    experts = (groups[..., None] * group_size + np.arange(group_size)).reshape(num_layers, num_nodes, -1)
    of_node = np.take_along_axis(load[:, None], experts, -1).reshape(num_layers * num_nodes, -1)
    replicas, counts = _replicated(of_node, topology.num_physical // num_nodes)
    shares = np.take_along_axis(of_node / counts, replicas, -1)
    slots = _packed(shares, topology.num_ranks // num_nodes).reshape(num_layers * num_nodes, -1)
    local = np.take_along_axis(replicas, slots, -1).reshape(num_layers, num_nodes, -1)
    return np.take_along_axis(experts, local, -1).reshape(num_layers, -1)


def _packed(weights: _Floats, num_packs: int) -> _Ints:
    """[batch, packs, items / packs]: the items of each pack, all packs with equally many."""
    num_batches, num_items = weights.shape
    size = num_items // num_packs
    packs = np.empty((num_batches, num_packs, size), dtype=np.int64)
    filled = np.zeros((num_batches, num_packs), dtype=np.int64)
    sums = np.zeros((num_batches, num_packs))
    rows = np.arange(num_batches)
    for item in np.argsort(-weights, axis=-1, kind="stable").T:
        lightest = np.where(filled < size, sums, np.inf).argmin(-1)
        packs[rows, lightest, filled[rows, lightest]] = item
        filled[rows, lightest] += 1
        sums[rows, lightest] += weights[rows, item]
    return packs


def _replicated(weights: _Floats, num_slots: int) -> tuple[_Ints, _Ints]:
    """([batch, slots] the expert of each replica, [batch, experts] the replicas of each)."""
    num_batches, num_experts = weights.shape
    replicas = np.tile(np.arange(num_slots), (num_batches, 1))
    counts = np.ones((num_batches, num_experts), dtype=np.int64)
    rows = np.arange(num_batches)
    for slot in range(num_experts, num_slots):
        most = (weights / counts).argmax(-1)
        replicas[:, slot] = most
        counts[rows, most] += 1
    return replicas, counts
