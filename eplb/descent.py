"""Small changes to a placement, the best first: what evens ranks out with few experts moved.

Two kinds of change. A *swap* exchanges two experts between two ranks. A *hand-over* gives the slot of a replica, of
which there are others, to a further replica of another expert: the first's load goes to its other replicas, and the
second's becomes less wherever it is. A change has a gain, the drop of Σ over ranks of (load beyond the target)², and a
price, the experts that a rank will hold and did not before. What gains most for its price is done, as long as no rank
becomes as full as the fullest was.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.compiled import compiled
from .packing import Floats, Held, Ints

_FREE = 0.25
"""What a change that moves nothing is taken to cost, in experts: such as bringing back what was there before."""


@compiled
def descend(
    weights: Floats,
    counts: Ints,
    slots: Ints,
    had: NDArray[np.bool_],
    targets: Floats,
    num_nodes: int,
    max_changes: int,
    experts_stay: bool,
) -> None:
    """Change layers until no rank is above the layer's target, or no change helps the fullest rank.

    Args:
        weights: [layers, experts] load.
        counts: [layers, experts] replicas of each expert; updated.
        slots: [layers, ranks, slots of a rank]: the expert of each slot; updated.
        had: [layers, ranks, experts]: what each rank holds already, so that it costs nothing there.
        targets: [layers] the load that no rank should exceed.
        num_nodes: nodes that no expert leaves, equal ranges of ranks.
        max_changes: in a layer.
        experts_stay: whether changes that move experts cost anything; if not, the largest gain wins.
    """
    num_layers, num_ranks, size = slots.shape
    num_experts = weights.shape[1]
    loads = np.empty(num_ranks)
    held = np.empty((num_ranks, num_experts), dtype=np.uint16)
    shares = np.empty(num_experts)
    for layer in range(num_layers):
        held[:] = 0
        for expert in range(num_experts):
            shares[expert] = weights[layer, expert] / counts[layer, expert]
        for rank in range(num_ranks):
            loads[rank] = 0.0
            for place in range(size):
                expert = slots[layer, rank, place]
                held[rank, expert] += 1
                loads[rank] += shares[expert]
        for _ in range(max_changes):
            if not _change(
                weights[layer], counts[layer], shares, slots[layer], had[layer], loads, held, targets[layer],
                num_nodes, experts_stay,
            ):  # fmt: skip
                break


@compiled
def _change(
    weights: Floats,
    counts: Ints,
    shares: Floats,
    slots: Ints,
    had: NDArray[np.bool_],
    loads: Floats,
    held: Held,
    target: float,
    num_nodes: int,
    experts_stay: bool,
) -> bool:
    """Do the best change for the fullest rank. Says whether there was one."""
    num_ranks, size = slots.shape
    fullest = 0
    for rank in range(1, num_ranks):
        if loads[rank] > loads[fullest]:
            fullest = rank
    most = loads[fullest]
    if most <= target:
        return False
    per_node = num_ranks // num_nodes
    first = fullest // per_node * per_node
    after = first + per_node
    best = 1e-12 * _excess(most, target)
    best_rank, best_place, best_other, best_expert = -1, -1, -1, -1
    for rank in range(first, after):
        if rank == fullest:
            continue
        apart = most - loads[rank]
        before = _excess(most, target) + _excess(loads[rank], target)
        for other in range(size):
            wanted = slots[fullest, other]
            if held[rank, wanted]:
                continue
            price_of_wanted = 1.0 - had[rank, wanted] - (1.0 - had[fullest, wanted]) if experts_stay else 1.0
            for place in range(size):
                given = slots[rank, place]
                # Swap `wanted`, of the fullest rank, with `given`.
                moved = shares[wanted] - shares[given]
                if 0.0 < moved < apart:
                    gain = before - _excess(most - moved, target) - _excess(loads[rank] + moved, target)
                    if gain > _FREE * best and not held[fullest, given]:
                        if experts_stay:
                            gain /= max(price_of_wanted + had[rank, given] - had[fullest, given], _FREE)
                        if gain > best:
                            best, best_rank, best_place, best_other, best_expert = gain, rank, place, other, -1
                # Or another replica of it in the place of `given`.
                if 1 < counts[given] <= per_node:
                    gain = _gain(weights, counts, shares, loads, held, target, most, rank, given, wanted, first, after)
                    if experts_stay:
                        gain /= max(0.0 + had[rank, given] - had[rank, wanted], _FREE)
                    if gain > best:
                        best, best_rank, best_place, best_other, best_expert = gain, rank, place, -1, wanted
    for place in range(size):
        given = slots[fullest, place]
        if counts[given] == 1 or counts[given] > per_node:
            continue
        # What the fullest rank has a replica of gives its slot to something lighter.
        for wanted in range(len(weights)):
            if held[fullest, wanted] or weights[wanted] / (counts[wanted] + 1) >= shares[given]:
                continue
            gain = _gain(weights, counts, shares, loads, held, target, most, fullest, given, wanted, first, after)
            if experts_stay:
                gain /= max(0.0 + had[fullest, given] - had[fullest, wanted], _FREE)
            if gain > best and _lives_in(held, wanted, first, after):
                best, best_rank, best_place, best_other, best_expert = gain, fullest, place, -1, wanted
    if best_rank < 0:
        return False
    given = slots[best_rank, best_place]
    if best_other >= 0:
        wanted = slots[fullest, best_other]
        slots[fullest, best_other], slots[best_rank, best_place] = given, wanted
        moved = shares[wanted] - shares[given]
        loads[fullest] -= moved
        loads[best_rank] += moved
        held[fullest, wanted] -= 1
        held[fullest, given] += 1
        held[best_rank, given] -= 1
        held[best_rank, wanted] += 1
        return True
    slots[best_rank, best_place] = best_expert
    held[best_rank, given] -= 1
    held[best_rank, best_expert] += 1
    counts[given] -= 1
    counts[best_expert] += 1
    shares[given] = weights[given] / counts[given]
    shares[best_expert] = weights[best_expert] / counts[best_expert]
    for rank in range(first, after):
        loads[rank] = 0.0
        for expert in slots[rank]:
            loads[rank] += shares[expert]
    return True


@compiled
def _lives_in(held: Held, expert: int, first: int, after: int) -> bool:
    found = False
    for rank in range(first, after):
        found |= held[rank, expert] > 0
    return found


@compiled
def _gain(
    weights: Floats,
    counts: Ints,
    shares: Floats,
    loads: Floats,
    held: Held,
    target: float,
    most: float,
    slot_rank: int,
    given: int,
    wanted: int,
    first: int,
    after: int,
) -> float:
    """What a hand-over of a slot of ``slot_rank`` gains; −1 if that makes a rank as full as the fullest is."""
    fewer, more = weights[given] / (counts[given] - 1), weights[wanted] / (counts[wanted] + 1)
    heavier, lighter = fewer - shares[given], shares[wanted] - more
    load = loads[slot_rank] + held[slot_rank, given] * heavier - fewer + more
    if load >= most:
        return -1.0
    gain = _excess(loads[slot_rank], target) - _excess(load, target)
    for rank in range(first, after):
        if rank != slot_rank and (held[rank, given] or held[rank, wanted]):
            load = loads[rank] + held[rank, given] * heavier - held[rank, wanted] * lighter
            if load >= most:
                return -1.0
            gain += _excess(loads[rank], target) - _excess(load, target)
    return gain


@compiled
def _excess(load: float, target: float) -> float:
    beyond = max(load - target, 0.0)
    return beyond * beyond
