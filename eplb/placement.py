"""Which slot of which rank holds which expert.

A *logical* expert is one of the checkpoint. A *physical* expert is a slot that holds a replica of one. Ranks own equal,
contiguous ranges of slots: of P slots on R ranks, rank r has r · P/R … (r + 1) · P/R − 1.

Replicas of an expert share its load equally. The step of an expert-parallel group takes as long as its fullest rank
computes; so each layer's fullest rank should be as little above the mean as can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PlacementError
from .alignment import keep_slots, relabel
from .descent import descend
from .grouping import regroup
from .packing import Floats, Ints, count_replicas, fullest_of_greedy, pack
from .recounting import recount

Policy = Literal["auto", "global", "hierarchical", "incremental"]

_DONE = 1 + 1e-5
"""A fullest rank that is within this of what it cannot be below is left alone."""
_GOOD = 1 + 1e-3
"""Likewise where more than swaps would be needed."""
_SAME = 1 + 1e-9
"""Loads that differ by less are equal."""
_MAX_CHANGES = 1000
"""Of a layer. A number, not a time: all ranks that plan from the same loads come to the same placement."""


@dataclass(frozen=True)
class Topology:
    """Slots and what they lie on; the same for all layers.

    Raises:
        PlacementError: a number is below one, or one that must divide another does not.
    """

    num_physical: int
    """Slots of a layer, over all ranks."""
    num_ranks: int
    """Ranks of the expert-parallel group, which own equal ranges of slots."""
    num_nodes: int = 1
    """Nodes, which own equal ranges of ranks."""
    num_groups: int = 1
    """Groups that a router limits tokens to: equal ranges of logical experts."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise PlacementError(f"topology: {name} is {value}, expected at least 1")
        _check_divides("num_physical", self.num_physical, "num_ranks", self.num_ranks)
        _check_divides("num_ranks", self.num_ranks, "num_nodes", self.num_nodes)

    @property
    def slots_per_rank(self) -> int:
        """Slots that each rank owns."""
        return self.num_physical // self.num_ranks

    @property
    def ranks_per_node(self) -> int:
        """Ranks that each node owns."""
        return self.num_ranks // self.num_nodes


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the experts of every layer are. Treat the arrays as read-only."""

    physical_to_logical: NDArray[np.int32]
    """[layers, physical] int32: the expert that each slot holds."""
    logical_to_physical: NDArray[np.int32]
    """[layers, logical, max_replicas] int32: each expert's slots in ascending order, and then −1.

    max_replicas is physical − logical + 1, the most that an expert can have: the shape is one for all placements, as
    graphs that read a copy of this on a GPU need it.
    """
    replica_count: NDArray[np.int32]
    """[layers, logical] int32: slots that hold each expert, at least one."""

    @classmethod
    def from_physical(cls, physical_to_logical: NDArray[np.integer], num_logical: int) -> Placement:
        """The placement in which slots hold these experts.

        Args:
            physical_to_logical: [layers, physical], any integers; copied.
            num_logical: experts of a layer.

        Raises:
            PlacementError: there is no such expert, or one without a slot; names the layer.
        """
        slots = np.array(physical_to_logical, dtype=np.int32, order="C")
        if slots.ndim != 2 or not slots.size:
            raise PlacementError(f"a placement has the shape {slots.shape}, expected [layers, physical]")
        wrong = np.argwhere((slots < 0) | (slots >= num_logical))
        if len(wrong):
            layer, slot = wrong[0]
            raise PlacementError(
                f"layer {layer}, slot {slot} holds expert {slots[layer, slot]}, expected one of 0 … {num_logical - 1}"
            )
        num_layers, num_physical = slots.shape
        # Experts of different layers get different numbers, so that one sort and one count serve all layers.
        keys = (slots + np.arange(num_layers, dtype=np.int32)[:, None] * num_logical).ravel()
        counts = np.bincount(keys, minlength=num_layers * num_logical)
        missing = np.flatnonzero(counts == 0)
        if len(missing):
            layer, expert = divmod(int(missing[0]), num_logical)
            raise PlacementError(f"layer {layer}: no slot holds expert {expert}, and each needs one")
        # Numbers of 16 bits are sorted by their digits.
        order = np.argsort(keys.astype(np.uint16) if counts.size <= 1 << 16 else keys, kind="stable")
        experts = keys[order]
        nth = np.arange(len(keys)) - (np.cumsum(counts) - counts)[experts]
        places = np.full((num_layers * num_logical, num_physical - num_logical + 1), -1, dtype=np.int32)
        places[experts, nth] = order % num_physical
        return cls(
            slots,
            places.reshape(num_layers, num_logical, -1),
            counts.astype(np.int32).reshape(num_layers, num_logical),
        )

    @property
    def num_layers(self) -> int:
        """Layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_physical(self) -> int:
        """Slots of a layer."""
        return int(self.physical_to_logical.shape[1])

    @property
    def num_logical(self) -> int:
        """Experts of a layer."""
        return int(self.replica_count.shape[1])


def plan(
    load: NDArray[np.float64],
    topology: Topology,
    current: Placement | None = None,
    policy: Policy = "auto",
    *,
    wanted: float = 0.99,
) -> Placement:
    """Where experts should be for a load. Pure; milliseconds of one core; the same result everywhere.

    Replicas are counted such that the largest share of load is the least possible, packed heaviest first (as in
    DeepSeek's EPLB, https://github.com/deepseek-ai/EPLB), and then improved by swaps and by other numbers of replicas
    until nothing helps: no layer is less even than by packing alone. Replicas of an expert lie on different ranks if it
    has no more of them than there are, and only then on one where that is the more even.

    Args:
        load: [layers, logical] float64, in tokens or any other unit.
        topology: slots, ranks, nodes and groups.
        current: where experts are now; slots that need not change do not.
        policy: "global" balances over all ranks. "hierarchical" keeps the experts of a group in one node.
            "incremental" moves as few experts of ``current`` as give the balance wanted; within nodes, if groups are
            kept in those. "auto" is incremental if there is a ``current``, else hierarchical if nodes divide groups.
        wanted: for "incremental": no layer's fullest rank becomes more than 1/wanted times as full as by a new plan.

    Raises:
        PlacementError: ``load`` has a wrong shape or a value that is negative or not finite; there are fewer slots than
            experts; numbers do not divide; ``current`` does not fit; the policy lacks what it needs. Names which.
    """
    load = check_load(load, topology)
    _check_policy(policy, topology, current, wanted)
    num_layers, num_logical = load.shape
    shape = (num_layers, topology.num_ranks, topology.slots_per_rank)
    if current is not None:
        check_fits(current, topology, num_layers, num_logical)
    grouped = topology.num_groups % topology.num_nodes == 0
    num_nodes = topology.num_nodes if policy != "global" and grouped else 1
    # No sum or square is too large for a float then; by a power of two, so that what is equal stays so.
    load = np.ldexp(load, -np.frexp(load.max())[1])
    slots = _solve(load, topology, num_nodes)
    if current is not None:
        now = np.ascontiguousarray(current.physical_to_logical, dtype=np.int32).reshape(shape)
        relabel(now, slots, num_logical, num_nodes)
        if policy in ("auto", "incremental"):
            slots = _improve(load, topology, current, slots, num_nodes, wanted)
        keep_slots(now, slots)
    return Placement.from_physical(slots.reshape(num_layers, -1), num_logical)


def initial_placement(num_layers: int, num_logical: int, topology: Topology) -> Placement:
    """Where experts are before any load is known: slot i holds expert i mod experts, in all layers.

    Args:
        num_layers: layers.
        num_logical: experts of a layer.
        topology: the slots.

    Raises:
        PlacementError: there are fewer slots than experts.
    """
    slots = np.arange(topology.num_physical, dtype=np.int32) % num_logical
    return Placement.from_physical(np.tile(slots, (num_layers, 1)), num_logical)


def _solve(load: Floats, topology: Topology, num_nodes: int) -> Ints:
    """[layers, ranks, slots of a rank] the expert of each slot; groups stay in one of so many nodes."""
    if num_nodes == 1 and (topology.num_groups == 1 or topology.num_nodes > 1):
        return _pack_ranks(load, topology.num_physical, topology.num_ranks)
    num_layers = len(load)
    weights = load.reshape(num_layers, topology.num_groups, -1)
    totals = weights.sum(-1)
    once = np.ones(totals.shape, dtype=np.int32)
    groups = np.empty((num_layers, num_nodes, topology.num_groups // num_nodes), dtype=np.int32)
    floor = totals.mean(-1) * groups.shape[-1]
    pack(totals, once, _descending(totals), floor, 0, True, groups, np.empty(num_layers, dtype=np.bool_))
    packed = _pack_nodes(load, topology, groups)
    if num_nodes == 1:  # groups only say which of equal experts comes first, as in greedy packing
        return packed
    # What a node's ranks come to is known when they are packed: the better of two, in each layer.
    regroup(weights, groups, topology.num_physical // num_nodes, topology.ranks_per_node, _MAX_CHANGES)
    regrouped = _pack_nodes(load, topology, groups)
    better = _fullest(load, regrouped) < _fullest(load, packed)
    return np.where(better[:, None, None], regrouped, packed)


def _pack_nodes(load: Floats, topology: Topology, groups: Ints) -> Ints:
    """As `_solve`, with the groups of each node given: [layers, nodes, groups of a node]."""
    num_layers, num_nodes, _ = groups.shape
    size = load.shape[1] // topology.num_groups
    experts = (groups[..., None] * size + np.arange(size, dtype=np.int32)).reshape(num_layers, num_nodes, -1)
    weights = np.take_along_axis(load[:, None], experts, -1).reshape(num_layers * num_nodes, -1)
    slots = _pack_ranks(weights, topology.num_physical // num_nodes, topology.ranks_per_node)
    local = slots.reshape(num_layers, num_nodes, -1)
    return np.take_along_axis(experts, local, -1).reshape(num_layers, topology.num_ranks, -1)


def _pack_ranks(weights: Floats, num_slots: int, num_ranks: int) -> Ints:
    """[problems, ranks, slots of a rank] the expert of each slot, for loads [problems, experts]."""
    num_problems, num_experts = weights.shape
    # An expert that is on every rank gets another replica only if all are.
    most = num_ranks * -(-num_slots // (num_experts * num_ranks))
    counts = np.empty((num_problems, num_experts), dtype=np.int32)
    count_replicas(weights, num_slots, most, counts)
    shares = weights / counts
    floor = np.maximum(weights.sum(-1) / num_ranks, shares.max(-1))
    slots = np.empty((num_problems, num_ranks, num_slots // num_ranks), dtype=np.int32)
    met = np.empty(num_problems, dtype=np.bool_)
    pack(shares, counts, _descending(shares), floor * _DONE, _MAX_CHANGES, True, slots, met)
    # Greedy packing gives one that is on every rank yet more replicas, if its share is still the largest.
    met |= ((counts == most) & (shares == shares.max(-1, keepdims=True))).any(-1)
    nobody = np.zeros((num_problems, num_ranks, num_experts), dtype=np.bool_)
    descend(weights, counts, slots, nobody, floor * _GOOD, 1, _MAX_CHANGES, False)
    recount(weights, counts, slots, floor * _GOOD, _MAX_CHANGES)
    _let_meet(weights, floor, met, slots)
    return slots


def _let_meet(weights: Floats, floor: Floats, met: NDArray[np.bool_], slots: Ints) -> None:
    """Put replicas of an expert on one rank, as greedy packing does, where that is more even.

    Args:
        weights: [problems, experts].
        floor: [problems] the load that no fullest rank can be below.
        met: [problems] where greedy packing does so.
        slots: [problems, ranks, slots of a rank] the expert of each slot; updated.
    """
    fullest = _fullest(weights, slots)
    problems = np.flatnonzero(met & (fullest > floor * _SAME))
    weights, floor, fullest = weights[problems], floor[problems], fullest[problems]
    _, num_ranks, size = slots.shape
    num_slots = num_ranks * size
    counts = np.empty(weights.shape, dtype=np.int32)
    count_replicas(weights, num_slots, num_slots, counts)
    shares = weights / counts
    reached = np.empty(len(problems))
    each = np.repeat(-shares.ravel(), counts.ravel()).reshape(len(problems), num_slots)
    # Also for none: so whoever has planned once compiles nothing later.
    fullest_of_greedy(-np.sort(each, axis=-1), size, reached)
    better = np.flatnonzero(reached * _SAME < fullest)
    if len(better):
        shares, counts = shares[better], counts[better]
        found = np.empty((len(better), num_ranks, size), dtype=np.int32)
        floor = floor[better] * _DONE
        pack(shares, counts, _descending(shares), floor, _MAX_CHANGES, False, found, met[: len(better)])
        slots[problems[better]] = found


def _improve(load: Floats, topology: Topology, current: Placement, fresh: Ints, num_nodes: int, wanted: float) -> Ints:
    """``current`` with few changes, and ``fresh`` in those layers where that is not enough."""
    slots = np.array(current.physical_to_logical, dtype=np.int32).reshape(fresh.shape)
    had = np.zeros((len(load), topology.num_ranks, load.shape[1]), dtype=np.bool_)
    np.put_along_axis(had, slots, True, -1)
    scattered = ~_kept_in_nodes(slots, topology, load.shape[1], num_nodes)
    slots[scattered] = fresh[scattered]
    reachable = _fullest(load, fresh)
    enough = reachable.sum() / wanted * _DONE
    # Where a layer ends above its target, others make up for it by going below theirs.
    for margin in (1.0, 0.5, 0.0):
        counts = _counts(slots, load.shape[1])
        descend(load, counts, slots, had, reachable * (1 + margin * (1 / wanted - 1)), num_nodes, _MAX_CHANGES, True)
        fullest = _fullest(load, slots)
        if fullest.sum() <= enough or wanted == 1:
            break
    moved = (~np.take_along_axis(had, fresh, -1)).sum((1, 2))
    for layer in np.argsort((reachable - fullest) / np.maximum(moved, 1)):
        if fullest.sum() <= enough:
            break
        slots[layer], fullest[layer] = fresh[layer], reachable[layer]
    return slots


def _kept_in_nodes(slots: Ints, topology: Topology, num_logical: int, num_nodes: int) -> NDArray[np.bool_]:
    """[layers]: whether every group's experts are all in one node."""
    if num_nodes == 1:
        return np.ones(len(slots), dtype=np.bool_)
    groups = slots.reshape(len(slots), num_nodes, -1) // (num_logical // topology.num_groups)
    here = np.zeros((len(slots), num_nodes, topology.num_groups), dtype=np.bool_)
    np.put_along_axis(here, groups, True, -1)
    kept: NDArray[np.bool_] = (here.sum(1) == 1).all(-1)
    return kept


def _fullest(load: Floats, slots: Ints) -> Floats:
    """[layers] the load of the fullest rank."""
    shares = load / _counts(slots, load.shape[1])
    fullest: Floats = np.take_along_axis(shares[:, None], slots, -1).sum(-1).max(-1)
    return fullest


def _counts(slots: Ints, num_logical: int) -> Ints:
    """[layers, logical] replicas of each expert."""
    keys = slots.reshape(len(slots), -1) + np.arange(len(slots))[:, None] * num_logical
    counts = np.bincount(keys.ravel(), minlength=len(slots) * num_logical)
    return counts.astype(np.int32).reshape(len(slots), num_logical)


def _descending(weights: Floats) -> Ints:
    """[problems, items] the items, heaviest first."""
    return np.argsort(-weights, axis=-1, kind="stable").astype(np.int32)


def check_load(load: NDArray[np.floating], topology: Topology) -> Floats:
    """A load as contiguous float64, if it is one that can be planned for.

    Args:
        load: [layers, logical].
        topology: what it is planned for.

    Raises:
        PlacementError: see `plan`.
    """
    checked = np.ascontiguousarray(load, dtype=np.float64)
    if checked.ndim != 2 or not checked.size:
        raise PlacementError(f"load has the shape {checked.shape}, expected [layers, logical experts]")
    wrong = np.argwhere(~(np.isfinite(checked) & (checked >= 0)))
    if len(wrong):
        layer, expert = (int(index) for index in wrong[0])
        value = checked[layer, expert]
        what = "negative" if value < 0 else "not finite"
        raise PlacementError(f"load of layer {layer}, expert {expert} is {value:g}: it is {what}")
    num_logical = checked.shape[1]
    if num_logical > topology.num_physical:
        raise PlacementError(
            f"{num_logical} experts do not fit in num_physical = {topology.num_physical} slots, and each needs one"
        )
    if num_logical % topology.num_groups:
        raise PlacementError(f"num_groups = {topology.num_groups} does not divide the {num_logical} experts of a layer")
    return checked


def check_fits(placement: Placement, topology: Topology, num_layers: int, num_logical: int) -> None:
    """Refuse a placement of other numbers.

    Raises:
        PlacementError: names what differs.
    """
    for name, found, expected in (
        ("layers", placement.num_layers, num_layers),
        ("slots", placement.num_physical, topology.num_physical),
        ("experts", placement.num_logical, num_logical),
    ):
        if found != expected:
            raise PlacementError(f"the current placement has {found} {name}, expected {expected}")


def _check_policy(policy: Policy, topology: Topology, current: Placement | None, wanted: float) -> None:
    if policy not in get_args(Policy):
        raise PlacementError(f"policy is {policy!r}, expected one of {', '.join(get_args(Policy))}")
    if policy == "incremental" and current is None:
        raise PlacementError("policy is 'incremental', which starts from a current placement, and there is none")
    if not 0 < wanted <= 1:
        raise PlacementError(f"wanted is {wanted}, expected more than 0 and at most 1")
    if policy == "hierarchical":
        _check_divides("num_groups", topology.num_groups, "num_nodes", topology.num_nodes)


def _check_divides(name: str, number: int, divisor_name: str, divisor: int) -> None:
    if number % divisor:
        raise PlacementError(f"topology: {name} is {number}, which {divisor_name} = {divisor} does not divide")
