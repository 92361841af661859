"""Other numbers of replicas, where the least possible largest share does not pack well: compiled.

With few slots a rank, what decides is what fits beside what. Then an expert of the fullest rank gets a replica that
another expert has too many, and all is packed anew.
"""

from __future__ import annotations

import numpy as np

from ..kernels.compiled import compiled
from .packing import Floats, Ints, pack_greedily, settle, swap

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
    trial_slots = np.empty((num_ranks, size), dtype=np.int32)
    shares = np.empty(num_experts)
    order = np.empty(num_experts, dtype=np.int32)
    takers = np.empty(size, dtype=np.int32)
    for problem in range(num_problems):
        left = _WORK // (num_ranks * num_ranks * size)
        count = counts[problem]
        for expert in range(num_experts):
            shares[expert] = weights[problem, expert] / count[expert]
            order[expert] = expert
            for place in range(expert, 0, -1):
                if shares[order[place - 1]] >= shares[order[place]]:
                    break
                order[place - 1], order[place] = order[place], order[place - 1]
        better = True
        while better and left > 0:
            better = False
            most, fullest = -1.0, 0
            for rank in range(num_ranks):
                load = 0.0
                for expert in slots[problem, rank]:
                    load += shares[expert]
                if load > most:
                    most, fullest = load, rank
            if most <= bounds[problem]:
                break
            takers[:] = slots[problem, fullest]
            for taker in takers:
                for giver in range(num_experts):
                    if better or left <= 0 or giver == taker or count[giver] == 1 or count[taker] >= num_ranks:
                        continue
                    left -= 1
                    _change_count(weights[problem], count, shares, order, giver, -1)
                    _change_count(weights[problem], count, shares, order, taker, 1)
                    held[:] = 0
                    pack_greedily(shares, count, order, trial_slots, loads, held)
                    swap(shares, count, trial_slots, loads, held, bounds[problem], max_swaps)
                    if loads.max() < most * (1.0 - 1e-9):
                        slots[problem] = trial_slots
                        better = True
                    else:
                        _change_count(weights[problem], count, shares, order, taker, -1)
                        _change_count(weights[problem], count, shares, order, giver, 1)


@compiled
def _change_count(weights: Floats, counts: Ints, shares: Floats, order: Ints, expert: int, change: int) -> None:
    """Give an expert more or fewer replicas, and keep the order of shares."""
    counts[expert] += change
    shares[expert] = weights[expert] / counts[expert]
    for place in range(len(order)):
        if order[place] == expert:
            settle(shares, order, place)
            break
