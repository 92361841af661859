"""How replicas are counted and packed: compiled loops over one layer after the other.

A *problem* is a layer, or the experts of one node in it. A *share* is the load of one replica: its expert's load
divided by the number of its replicas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Held = NDArray[np.uint16]
"""[ranks, experts]: how many replicas of an expert a rank holds."""


@compiled
def count_replicas(weights: Floats, num_slots: int, most: int, counts: Ints) -> None:
    """Give each expert a number of slots such that the largest share is the least possible.

    One for each, and then one at a time to the largest share: any other choice leaves a larger one, because shares only
    shrink. A heap finds it. Of equal ones the first expert's comes first, as in greedy packing by arrays.

    Args:
        weights: [problems, experts] load.
        num_slots: slots to give away, experts … experts · most.
        most: the most that one expert may have.
        counts: [problems, experts], written.
    """
    num_problems, num_experts = weights.shape
    heap = np.empty(num_experts, dtype=np.int32)
    shares = np.empty(num_experts)
    for problem in range(num_problems):
        count = counts[problem]
        for expert in range(num_experts):
            count[expert] = 1
            heap[expert] = expert
            shares[expert] = weights[problem, expert]
        for start in range(num_experts // 2 - 1, -1, -1):
            _sift_down(heap, shares, start)
        for _ in range(num_slots - num_experts):
            expert = heap[0]
            count[expert] += 1
            shares[expert] = weights[problem, expert] / count[expert] if count[expert] < most else -1.0
            _sift_down(heap, shares, 0)


@compiled
def _sift_down(heap: Ints, keys: Floats, start: int) -> None:
    """Restore a heap whose largest key comes first, after the key of the entry at ``start`` became smaller."""
    size, place, entry = len(heap), start, heap[start]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _heavier(keys, heap[child + 1], heap[child]):
            child += 1
        if not _heavier(keys, heap[child], entry):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = entry


@compiled
def _heavier(keys: Floats, one: int, other: int) -> bool:
    """Whether an entry comes first, the largest key before the others; of equal keys the lower number."""
    return keys[one] > keys[other] or (keys[one] == keys[other] and one < other)


@compiled
def _lighter(keys: Floats, one: int, other: int) -> bool:
    """Likewise, the least key before the others."""
    return keys[one] < keys[other] or (keys[one] == keys[other] and one < other)


@compiled
def pack(
    shares: Floats,
    counts: Ints,
    order: Ints,
    bounds: Floats,
    max_swaps: int,
    apart: bool,
    slots: Ints,
    met: NDArray[np.bool_],
) -> None:
    """Put replicas on ranks: heaviest first onto the lightest rank with room, and then swaps while one helps.

    A swap takes from the fullest rank and helps if both ranks are then less full than that was.

    Args:
        shares: [problems, experts] load of one replica.
        counts: [problems, experts] replicas of each.
        order: [problems, experts] the experts, largest share first.
        bounds: [problems] a load that is good enough for the fullest rank.
        max_swaps: after so many swaps in a problem it stays as it is.
        apart: whether replicas of an expert lie on different ranks, as far as there are ranks.
        slots: [problems, ranks, slots of a rank], written: the expert of each slot, largest share of a rank first.
        met: [problems], written: whether replicas would lie on one rank if they did not have to lie apart; where not,
            no rank is fuller than the fullest of greedy packing.
    """
    num_problems, num_experts = shares.shape
    num_ranks = slots.shape[1]
    loads = np.empty(num_ranks)
    held = np.empty((num_ranks, num_experts), dtype=np.uint16)
    for problem in range(num_problems):
        met[problem] = pack_one(
            shares[problem], counts[problem], order[problem], slots[problem], loads, held, bounds[problem], max_swaps,
            apart,
        )  # fmt: skip


@compiled
def pack_one(
    shares: Floats,
    counts: Ints,
    order: Ints,
    slots: Ints,
    loads: Floats,
    held: Held,
    bound: float,
    max_swaps: int,
    apart: bool,
) -> bool:
    """`pack` of one problem; ``loads`` [ranks] and ``held`` are written. Says whether replicas would have met."""
    held[:] = 0
    met = _pack_greedily(shares, counts, order, slots, loads, held, apart)
    _swap(shares, slots, loads, held, bound, max_swaps)
    return met


@compiled
def fullest_of_greedy(shares: Floats, size: int, fullest: Floats) -> None:
    """What the fullest rank has if replicas go, heaviest first, to the lightest with room, wherever others are.

    Args:
        shares: [problems, replicas], the largest first.
        size: slots of a rank.
        fullest: [problems], written.
    """
    num_problems, num_slots = shares.shape
    num_ranks = num_slots // size
    loads = np.empty(num_ranks)
    filled = np.empty(num_ranks, dtype=np.int32)
    heap = np.empty(num_ranks, dtype=np.int32)
    for problem in range(num_problems):
        for rank in range(num_ranks):
            loads[rank], filled[rank], heap[rank] = 0.0, 0, rank
        with_room = num_ranks
        for share in shares[problem]:
            rank = heap[0]
            loads[rank] += share
            filled[rank] += 1
            if filled[rank] == size:
                with_room -= 1
                heap[0] = heap[with_room]
            _sink(heap, loads, with_room)
        fullest[problem] = loads.max()


@compiled
def _pack_greedily(
    shares: Floats, counts: Ints, order: Ints, slots: Ints, loads: Floats, held: Held, apart: bool
) -> bool:
    """Says whether replicas would have met on the lightest rank, which they do if they need not lie apart."""
    num_ranks, size = slots.shape
    filled = np.zeros(num_ranks, dtype=np.int32)
    loads[:] = 0.0
    # Ranks with room, the lightest first. An expert's replicas go to ranks that are taken out one after the other, and
    # so differ.
    heap = np.arange(num_ranks).astype(np.int32)
    taken = np.empty(num_ranks, dtype=np.int32)
    with_room = num_ranks
    met = False
    for expert in order:
        left = counts[expert]
        if left == 1 or not apart:
            for _ in range(left):
                rank = heap[0]
                _put(shares, expert, rank, slots, loads, held, filled)
                if filled[rank] == size:
                    with_room -= 1
                    heap[0] = heap[with_room]
                _sink(heap, loads, with_room)
            continue
        # One round, unless there are more replicas than ranks.
        while left > 0:
            wanted = min(left, num_ranks)
            num_taken = min(wanted, with_room)
            met |= num_taken < left
            lightest = -1
            for number in range(num_taken):
                rank = heap[0]
                with_room -= 1
                heap[0] = heap[with_room]
                _sink(heap, loads, with_room)
                taken[number] = rank
                met |= lightest >= 0 and _lighter(loads, lightest, rank)
                _put(shares, expert, rank, slots, loads, held, filled)
                if filled[rank] < size and (lightest < 0 or _lighter(loads, rank, lightest)):
                    lightest = rank
            for number in range(num_taken):
                rank = taken[number]
                if filled[rank] < size:
                    heap[with_room] = rank
                    _rise(heap, loads, with_room)
                    with_room += 1
            for _ in range(wanted - num_taken):
                rank = _make_room(shares, expert, heap[0], slots, loads, held, filled)
                _put(shares, expert, rank, slots, loads, held, filled)
                # What had to go to the one with room made that heavier, or full.
                if filled[heap[0]] == size:
                    with_room -= 1
                    heap[0] = heap[with_room]
                _sink(heap, loads, with_room)
            left -= wanted
    return met


@compiled
def _put(shares: Floats, expert: int, rank: int, slots: Ints, loads: Floats, held: Held, filled: Ints) -> None:
    slots[rank, filled[rank]] = expert
    filled[rank] += 1
    held[rank, expert] += 1
    loads[rank] += shares[expert]


@compiled
def _sink(heap: Ints, keys: Floats, size: int) -> None:
    """Restore a heap whose least key comes first, after the key of the first entry became larger."""
    if size == 0:
        return
    place, entry = 0, heap[0]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _lighter(keys, heap[child + 1], heap[child]):
            child += 1
        if not _lighter(keys, heap[child], entry):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = entry


@compiled
def _rise(heap: Ints, keys: Floats, place: int) -> None:
    """Likewise, after an entry was put at the end."""
    entry = heap[place]
    while place > 0:
        parent = (place - 1) // 2
        if not _lighter(keys, entry, heap[parent]):
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = entry


@compiled
def _make_room(shares: Floats, expert: int, roomy: int, slots: Ints, loads: Floats, held: Held, filled: Ints) -> int:
    """Free a slot of the rank with the fewest replicas of the expert: what is there moves to ``roomy``.

    That has a free slot, and more of the expert; so the other holds more of something else.
    """
    needy = 0
    for rank in range(1, slots.shape[0]):
        if held[rank, expert] < held[needy, expert]:
            needy = rank
    place = 0
    while held[roomy, slots[needy, place]] >= held[needy, slots[needy, place]]:
        place += 1
    other = slots[needy, place]
    _put(shares, other, roomy, slots, loads, held, filled)
    filled[needy] -= 1
    held[needy, other] -= 1
    loads[needy] -= shares[other]
    for later in range(place, filled[needy]):
        slots[needy, later] = slots[needy, later + 1]
    return needy


@compiled
def _swap(
    shares: Floats,
    slots: Ints,
    loads: Floats,
    held: Held,
    bound: float,
    max_swaps: int,
) -> None:
    num_ranks, size = slots.shape
    for rank in range(num_ranks):
        for place in range(1, size):
            settle(shares, slots[rank], place)
    for _ in range(max_swaps):
        fullest = 0
        for rank in range(1, num_ranks):
            if loads[rank] > loads[fullest]:
                fullest = rank
        if loads[fullest] <= bound:
            return
        best, best_rank, best_from, best_to = 1e-9 * loads[fullest], -1, 0, 0
        for rank in range(num_ranks):
            excess = loads[fullest] - loads[rank]
            if excess <= 2.0 * best:
                continue
            # Both lists descend, so that what is nearest to half the excess lies ever further down in the other.
            other = 0
            for place in range(size):
                share = shares[slots[fullest, place]]
                while other < size and share - shares[slots[rank, other]] < 0.5 * excess:
                    other += 1
                for near in range(max(other - 1, 0), min(other + 1, size)):
                    moved = share - shares[slots[rank, near]]
                    gain = min(moved, excess - moved)
                    if (
                        gain > best
                        and held[rank, slots[fullest, place]] < held[fullest, slots[fullest, place]]
                        and held[fullest, slots[rank, near]] < held[rank, slots[rank, near]]
                    ):
                        best, best_rank, best_from, best_to = gain, rank, place, near
        if best_rank < 0:
            return
        out, back = slots[fullest, best_from], slots[best_rank, best_to]
        slots[fullest, best_from], slots[best_rank, best_to] = back, out
        settle(shares, slots[fullest], best_from)
        settle(shares, slots[best_rank], best_to)
        moved = shares[out] - shares[back]
        loads[fullest] -= moved
        loads[best_rank] += moved
        held[fullest, out] -= 1
        held[fullest, back] += 1
        held[best_rank, back] -= 1
        held[best_rank, out] += 1


@compiled
def settle(shares: Floats, row: Ints, place: int) -> None:
    """Move one entry of a row that descends otherwise to where it belongs."""
    entry = row[place]
    share = shares[entry]
    while place > 0 and shares[row[place - 1]] < share:
        row[place] = row[place - 1]
        place -= 1
    while place + 1 < len(row) and shares[row[place + 1]] > share:
        row[place] = row[place + 1]
        place += 1
    row[place] = entry
