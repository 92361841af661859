"""How even a placement is for a load, and how even any could be."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from .packing import count_replicas
from .pairs import raise_for_pairs
from .placement import Placement, Topology, check_fits, check_load

_Floats = NDArray[np.float64]

_MOST_NODES = 100
"""Different nodes, by their groups, that a bound looks at."""


def rank_loads(load: _Floats, placement: Placement, topology: Topology) -> _Floats:
    """[layers, ranks] the load of each rank, if the replicas of an expert share its load equally.

    Args:
        load: [layers, logical].
        placement: of the same layers and experts.
        topology: the ranks.

    Raises:
        PlacementError: these do not fit each other, or the load is none.
    """
    load = check_load(load, topology)
    check_fits(placement, topology, *load.shape)
    shares = np.take_along_axis(load / placement.replica_count, placement.physical_to_logical, -1)
    loads: _Floats = shares.reshape(len(load), topology.num_ranks, -1).sum(-1)
    return loads


def balancedness(loads: _Floats) -> float:
    """Σ over layers of the mean over ranks ÷ Σ over layers of the fullest rank; 1 if all are equal, or without load.

    Layers follow each other, so that a step takes as long as all fullest ranks together. Measured and predicted alike.

    Args:
        loads: [layers, ranks].
    """
    fullest = float(loads.max(-1).sum())
    return float(loads.mean(-1).sum()) / fullest if fullest else 1.0


def num_moved(current: Placement, new: Placement, topology: Topology) -> tuple[int, int]:
    """Experts that ranks will hold and do not hold now, in all layers: (of all ranks, of the rank with the most)."""
    before, after = (_held(placement, topology) for placement in (current, new))
    by_rank = (after & ~before).sum((0, 2))
    return int(by_rank.sum()), int(by_rank.max())


def _held(placement: Placement, topology: Topology) -> NDArray[np.bool_]:
    held = np.zeros((placement.num_layers, topology.num_ranks, placement.num_logical), dtype=np.bool_)
    np.put_along_axis(
        held, placement.physical_to_logical.reshape(placement.num_layers, topology.num_ranks, -1), True, -1
    )
    return held


def least_fullest(load: _Floats, topology: Topology) -> _Floats:
    """[layers] what the fullest rank cannot be below, whatever the placement. For comparing; takes its time.

    If groups are kept in nodes, of the best way to spread those. For the ranks of a node, the largest of three: the
    mean; the largest share, as small as it can be, with the lightest that can lie beside it; and what must meet
    somewhere because there are more experts without a second replica than ranks. Of ranks with two slots, more is
    known (`pairs`).

    Args:
        load: [layers, logical].
        topology: slots and ranks.

    Raises:
        PlacementError: the load is none.
    """
    load = check_load(load, topology)
    num_nodes, num_groups = topology.num_nodes, topology.num_groups
    size = num_groups // num_nodes
    if num_nodes > 1 and num_groups % num_nodes == 0 and math.comb(num_groups, size) <= _MOST_NODES:
        by_group = load.reshape(len(load), num_groups, -1)
        node = Topology(topology.num_physical // num_nodes, topology.ranks_per_node)
        floors = {
            groups: least_fullest(by_group[:, groups].reshape(len(load), -1), node)
            for groups in itertools.combinations(range(num_groups), size)
        }
        return _best_spread(floors, tuple(range(num_groups)))
    num_logical, num_slots, num_ranks = load.shape[1], topology.num_physical, topology.num_ranks
    size, spare = topology.slots_per_rank, num_slots - num_logical
    counts = np.empty(load.shape, dtype=np.int32)
    count_replicas(load, num_slots, num_ranks * -(-num_slots // (num_logical * num_ranks)), counts)
    largest = (load / counts).max(-1)
    least = np.maximum(load.sum(-1) / num_ranks, largest)
    descending = -np.sort(-load, axis=-1)
    for more in range(1, size):
        # Of so many unreplicated experts, some rank has more + 1; replicas take at most `spare` experts out of them.
        last = more * num_ranks + 1 + spare
        if last > num_logical:
            break
        least = np.maximum(least, descending[:, last - more - 1 : last].sum(-1))
    if size <= num_logical:
        for layer, weights in enumerate(load):
            least[layer] = max(least[layer], _with_the_lightest(weights, largest[layer], num_slots, num_ranks))
    least = np.asarray(least, dtype=np.float64)
    return raise_for_pairs(load, num_slots, least) if size == 2 else least


def _best_spread(floors: dict[tuple[int, ...], _Floats], groups: tuple[int, ...]) -> _Floats:
    """[layers] the least, over all ways to spread groups over nodes, of the largest floor of a node."""
    if groups in floors:
        return floors[groups]
    size = len(next(iter(floors)))
    ways = []
    for others in itertools.combinations(groups[1:], size - 1):
        rest = tuple(group for group in groups[1:] if group not in others)
        ways.append(np.maximum(floors[groups[0], *others], _best_spread(floors, rest)))
    least: _Floats = np.min(ways, axis=0)
    return least


def _with_the_lightest(weights: _Floats, largest: float, num_slots: int, num_ranks: int) -> float:
    """The least, over all largest shares, of that share and the least that fills up its rank."""
    if largest <= 0:
        return 0.0
    others = num_slots // num_ranks - 1
    lightest = others * weights.min()
    candidates = np.unique(weights[:, None] / np.arange(1, num_ranks + 1))
    candidates = candidates[(candidates >= largest * (1 - 1e-12)) & (candidates <= largest + lightest)]
    if not 0 < len(candidates) <= 1000:
        return 0.0
    # Experts need so many replicas at least; what is left could all go to one, and make that light. All of the others
    # could be its replicas.
    needed = np.maximum(np.ceil(weights / candidates[:, None] - 1e-9), 1)
    left = num_slots - needed.sum(-1, keepdims=True)
    beside = others * (weights / (needed + left)).min(-1)
    return float((candidates + beside).min())
