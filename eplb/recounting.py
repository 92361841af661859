"""Other numbers of replicas, where the least possible largest share does not pack well: compiled.

With few slots a rank, or few heavy experts, what decides is what meets on a rank: two heavy experts with five replicas
each must share two of eight ranks, with four each they need not. So replicas are first taken back from where they help
least, one after the other, and given to the lightest; then a replica goes from one expert to another as long as that
helps. Each time all is packed anew.
"""

from __future__ import annotations

import numpy as np

from ..kernels.compiled import compiled
from .packing import Floats, Held, Ints, pack_one, settle

_LEAST_TRIALS = 2
_WORK = 1 << 15
"""Of a problem: trials times slots times ranks. Large problems pack well, small ones are cheap."""


@compiled
def recount(weights: Floats, counts: Ints, slots: Ints, bounds: Floats, max_swaps: int) -> None:
    """Try other numbers of replicas where the fullest rank is above its bound; keep what is better.

    Args:
        weights: [problems, experts] load.
        counts: [problems, experts] replicas of each; updated.
        slots: [problems, ranks, slots of a rank] the expert of each slot; updated.
        bounds: [problems] a load that is good enough for the fullest rank.
        max_swaps: as of `pack`.
    """
    num_problems, num_experts = weights.shape
    num_ranks, size = slots.shape[1:]
    loads = np.empty(num_ranks)
    held = np.empty((num_ranks, num_experts), dtype=np.uint16)
    trial = np.empty((num_ranks, size), dtype=np.int32)
    shares = np.empty(num_experts)
    order = np.empty(num_experts, dtype=np.int32)
    takers = np.empty(num_experts, dtype=np.int32)
    for problem in range(num_problems):
        left = max(_WORK // (num_ranks * num_ranks * size), _LEAST_TRIALS)
        count = counts[problem]
        for expert in range(num_experts):
            shares[expert] = weights[problem, expert] / count[expert]
        most = _fullest(slots[problem], shares)
        if most <= bounds[problem]:
            continue
        for expert in range(num_experts):
            order[expert] = expert
            for place in range(expert, 0, -1):
                if shares[order[place - 1]] >= shares[order[place]]:
                    break
                order[place - 1], order[place] = order[place], order[place - 1]
        left = _spend_less(
            weights[problem], count, shares, order, slots[problem], trial, loads, held, most, bounds[problem],
            max_swaps, left,
        )  # fmt: skip
        better = True
        while better and left > 0:
            better = False
            most = _fullest(slots[problem], shares)
            if most <= bounds[problem]:
                break
            takers[:] = order
            for taker in takers:
                for giver in range(num_experts):
                    if better or left <= 0 or giver == taker or count[giver] == 1 or count[taker] >= num_ranks:
                        continue
                    left -= 1
                    _change_count(weights[problem], count, shares, order, giver, -1)
                    _change_count(weights[problem], count, shares, order, taker, 1)
                    pack_one(shares, count, order, trial, loads, held, bounds[problem], max_swaps, True)
                    if loads.max() < most * (1.0 - 1e-9):
                        slots[problem] = trial
                        better = True
                    else:
                        _change_count(weights[problem], count, shares, order, taker, -1)
                        _change_count(weights[problem], count, shares, order, giver, 1)


@compiled
def _spend_less(
    weights: Floats,
    counts: Ints,
    shares: Floats,
    order: Ints,
    slots: Ints,
    trial: Ints,
    loads: Floats,
    held: Held,
    most: float,
    bound: float,
    max_swaps: int,
    left: int,
) -> int:
    """Take back replicas, the last given first. Leaves the best, and says how many trials are left."""
    num_ranks, num_experts = len(loads), len(weights)
    best_counts = counts.copy()
    lightest = np.zeros(num_experts, dtype=np.bool_)
    while left > 0 and most > bound:
        giver = taker = -1
        for expert in range(num_experts):
            if lightest[expert]:
                continue
            if counts[expert] > 1 and (
                giver < 0 or weights[expert] * (counts[giver] - 1) < weights[giver] * (counts[expert] - 1)
            ):
                giver = expert
            if counts[expert] == 1 and num_ranks > 1 and (taker < 0 or weights[expert] < weights[taker]):
                taker = expert
        if giver < 0 or taker < 0:
            break
        left -= 1
        lightest[taker] = True
        _change_count(weights, counts, shares, order, giver, -1)
        _change_count(weights, counts, shares, order, taker, 1)
        pack_one(shares, counts, order, trial, loads, held, bound, max_swaps, True)
        if loads.max() < most * (1.0 - 1e-9):
            most = loads.max()
            slots[:] = trial
            best_counts[:] = counts
    for expert in range(num_experts):
        if counts[expert] != best_counts[expert]:
            _change_count(weights, counts, shares, order, expert, best_counts[expert] - counts[expert])
    return left


@compiled
def _fullest(slots: Ints, shares: Floats) -> float:
    most = 0.0
    for row in slots:
        load = 0.0
        for expert in row:
            load += shares[expert]
        most = max(most, load)
    return most


@compiled
def _change_count(
    weights: Floats, counts: Ints, shares: Floats, order: Ints, expert: np.integer | int, change: int
) -> None:
    """Give an expert more or fewer replicas, and keep the order of shares."""
    counts[expert] += change
    shares[expert] = weights[expert] / counts[expert]
    for place in range(len(order)):
        if order[place] == expert:
            settle(shares, order, place)
            break
