"""One placement for prefill's load and decode's, which are skewed differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PlacementError
from ..kernels.compiled import compiled
from .packing import Floats, Held, Ints
from .placement import Placement, Topology, check_load, plan

Objective = Literal["worst", "sum"]

_MAX_SWAPS = 1000
_GOOD = 1e-4


def plan_phases(
    loads: Sequence[NDArray[np.float64]],
    topology: Topology,
    weights: Sequence[float] | None = None,
    objective: Objective = "worst",
    policy: Literal["auto", "global", "hierarchical"] = "auto",
) -> Placement:
    """A placement that is even in each of several phases, whose steps do not overlap. Pure, as `plan` is.

    A load is measured in the mean of its ranks, so that phases count by their weights and not by their tokens. Starts
    from the plan for all loads together, and swaps replicas as long as the objective becomes less.

    Args:
        loads: [layers, logical] float64 of each phase.
        topology: slots, ranks, nodes and groups.
        weights: of each phase; equal if None.
        objective: "worst" makes the worst phase's weighted fullest rank as little full as it can, "sum" the weighted
            sum of the phases' fullest ranks.
        policy: as of `plan`.

    Raises:
        PlacementError: as of `plan`; there is no load, or weights and loads do not fit.
    """
    checked = [check_load(load, topology) for load in loads]
    factors = [1.0] * len(checked) if weights is None else list(weights)
    if objective not in get_args(Objective):
        raise PlacementError(f"objective is {objective!r}, expected one of {', '.join(get_args(Objective))}")
    if not checked or len({load.shape for load in checked}) > 1 or len(factors) != len(checked):
        raise PlacementError(
            f"there are loads of the shapes {[load.shape for load in checked]} and {len(factors)} weights, expected "
            "equal shapes, and a weight for each"
        )
    if not all(np.isfinite(factor) and factor >= 0 for factor in factors) or not sum(factors):
        raise PlacementError(f"weights are {factors}, expected finite ones from 0 on, and not all 0")
    phases = np.stack([factor * _in_means(load, topology) for factor, load in zip(factors, checked, strict=True)])
    start = plan(phases.sum(0), topology, policy=policy)
    num_layers, num_logical = checked[0].shape
    slots = start.physical_to_logical.reshape(num_layers, topology.num_ranks, -1).copy()
    grouped = topology.num_groups % topology.num_nodes == 0 and policy != "global"
    shares = np.ascontiguousarray((phases / start.replica_count).transpose(1, 0, 2))
    _even_out(shares, slots, topology.num_nodes if grouped else 1, objective == "worst", _MAX_SWAPS)
    return Placement.from_physical(slots.reshape(num_layers, -1), num_logical)


def _in_means(load: Floats, topology: Topology) -> Floats:
    """The load in units of the mean rank's, in each layer."""
    load = load / (load.max() or 1.0)
    mean = load.sum(-1, keepdims=True) / topology.num_ranks
    scaled: Floats = load / np.where(mean > 0, mean, 1.0)
    return scaled


@compiled
def _even_out(shares: Floats, slots: Ints, num_nodes: int, worst: bool, max_swaps: int) -> None:
    """Swap replicas between a phase's fullest rank and others while the objective becomes less.

    Args:
        shares: [layers, phases, experts] weighted load of one replica.
        slots: [layers, ranks, slots of a rank] the expert of each slot; updated.
        num_nodes: nodes that no expert leaves.
        worst: whether the largest over phases counts, else their sum.
        max_swaps: in a layer.
    """
    num_layers, num_phases, num_experts = shares.shape
    num_ranks, size = slots.shape[1:]
    per_node = num_ranks // num_nodes
    loads = np.empty((num_phases, num_ranks))
    held = np.empty((num_ranks, num_experts), dtype=np.uint16)
    top = np.empty((num_phases, 3), dtype=np.int32)
    for layer in range(num_layers):
        _sum_up(shares[layer], slots[layer], loads, held)
        for _ in range(max_swaps):
            _find_fullest(loads, top)
            now = _objective(loads, top, -1, -1, shares[layer], -1, -1, worst)
            best, best_from, best_to, best_out, best_back = now * (1.0 - _GOOD), -1, -1, -1, -1
            for phase in range(num_phases):
                source = top[phase, 0]
                first = source // per_node * per_node
                for rank in range(first, first + per_node):
                    if rank == source:
                        continue
                    for place in range(size):
                        out = slots[layer, source, place]
                        if held[rank, out]:
                            continue
                        for other in range(size):
                            back = slots[layer, rank, other]
                            if shares[layer, phase, back] >= shares[layer, phase, out] or held[source, back]:
                                continue
                            value = _objective(loads, top, source, rank, shares[layer], out, back, worst)
                            if value < best:
                                best, best_from, best_to, best_out, best_back = value, source, rank, place, other
            if best_from < 0:
                break
            out, back = slots[layer, best_from, best_out], slots[layer, best_to, best_back]
            slots[layer, best_from, best_out], slots[layer, best_to, best_back] = back, out
            _sum_up(shares[layer], slots[layer], loads, held)


@compiled
def _sum_up(shares: Floats, slots: Ints, loads: Floats, held: Held) -> None:
    loads[:] = 0.0
    held[:] = 0
    for rank in range(slots.shape[0]):
        for expert in slots[rank]:
            held[rank, expert] += 1
            for phase in range(len(loads)):
                loads[phase, rank] += shares[phase, expert]


@compiled
def _find_fullest(loads: Floats, top: Ints) -> None:
    """The three fullest ranks of each phase, so that what is fullest beside two is known; −1 where there are fewer."""
    top[:] = -1
    for phase in range(len(loads)):
        for rank in range(loads.shape[1]):
            entry = rank
            for place in range(3):
                if top[phase, place] < 0 or loads[phase, entry] > loads[phase, top[phase, place]]:
                    top[phase, place], entry = entry, top[phase, place]
                    if entry < 0:
                        break


@compiled
def _objective(
    loads: Floats, top: Ints, source: int, rank: int, shares: Floats, out: int, back: int, worst: bool
) -> float:
    """The objective if ``source`` gave ``out`` to ``rank`` and got ``back``; as it is if ``source`` is −1."""
    value = 0.0
    for phase in range(len(loads)):
        fullest = 0.0
        for place in range(3):
            if top[phase, place] >= 0 and top[phase, place] != source and top[phase, place] != rank:
                fullest = loads[phase, top[phase, place]]
                break
        if source >= 0:
            moved = shares[phase, out] - shares[phase, back]
            fullest = max(fullest, loads[phase, source] - moved, loads[phase, rank] + moved)
        value = max(value, fullest) if worst else value + fullest
    return value
