"""Which node each worker goes to. Pure: knows rooms and wishes, and nothing of Ray.

Workers with GPUs are packed: prefill and decode lie near each other, such that KV moves inside a node where it can, and
every node gets its share of both. Workers without GPUs are spread: near each other they would share cores and gain
nothing. Those that share experts go to one node, or to as few as they fit on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..core.config import Config
from ..core.errors import CapacityError
from ..core.ids import WorkerId, index_of

_SLACK = 1e-6
"""Ray counts resources in ten-thousandths; sums of floats are off by less."""


class Room(NamedTuple):
    """A node that is alive."""

    node: str
    """Ray's name of it."""
    address: str
    cpus: float
    """Free."""
    gpus: float
    """Free."""
    all_cpus: float
    all_gpus: float


class Want(NamedTuple):
    """What a worker needs of one node. All ranks of its model are in it: they share a host."""

    worker: WorkerId
    role: str
    cpus: float
    gpus: float
    group: int
    """Workers of a role with the same number share experts; those that share none have numbers of their own."""


def wants_of(config: Config, workers: Iterable[tuple[WorkerId, str]]) -> list[Want]:
    """What workers need; gateways need nothing.

    Args:
        config: the cluster's.
        workers: names and roles.
    """
    wants = []
    for worker, role in workers:
        if role != "gateway":
            pool = getattr(config.pools, role)
            group = index_of(worker) // config.expert_parallel(role)
            wants.append(Want(worker, role, pool.cpus_per_replica, pool.gpus_per_replica, group))
    return wants


def plan(wants: Sequence[Want], rooms: Sequence[Room], near: str = "") -> dict[WorkerId, Room]:
    """The node of each worker.

    Args:
        wants: workers to place.
        rooms: nodes.
        near: a node that is preferred among equals: the gateway's.

    Raises:
        CapacityError: one finds no room; names it, what it needs and what there is.
    """
    units = _in_turns(wants)
    placed = _try(units, rooms, near)
    if isinstance(placed, Want):
        # Small ones may have taken what a large one needs.
        placed = _try(sorted(units, key=_size, reverse=True), rooms, near)
    if isinstance(placed, Want):
        raise _no_room(placed, rooms, others=len(wants) > 1)
    return placed


def _in_turns(wants: Sequence[Want]) -> list[list[Want]]:
    """Units that should stay together, the roles mixed in proportion to their numbers."""
    units: dict[tuple[str, int], list[Want]] = {}
    for want in wants:
        units.setdefault((want.role, want.group), []).append(want)
    counts: dict[str, int] = {}
    for role, _ in units:
        counts[role] = counts.get(role, 0) + 1
    seen = dict.fromkeys(counts, 0)
    turns = []
    for (role, _), unit in units.items():
        turns.append(((seen[role] + 0.5) / counts[role], unit))
        seen[role] += 1
    # Those that share experts need a whole node, as long as there is one.
    return [unit for _, unit in sorted(turns, key=lambda turn: (len(turn[1]) == 1, turn[0]))]


def _size(unit: Sequence[Want]) -> tuple[float, float]:
    return sum(want.gpus for want in unit), sum(want.cpus for want in unit)


def _try(units: Sequence[Sequence[Want]], rooms: Sequence[Room], near: str) -> dict[WorkerId, Room] | Want:
    """A node for each worker, or a worker that finds none."""
    gpus, cpus = (sum(_size(unit)[part] for unit in units) for part in (0, 1))
    free = {room.node: (room.gpus, room.cpus) for room in rooms}
    by_node = {room.node: room for room in rooms}

    def fullness(node: str) -> tuple[bool, float, float, bool, str]:
        # One that holds all, and the smallest of those; else the largest first.
        room = by_node[node]
        holds_all = room.gpus + _SLACK >= gpus and room.cpus + _SLACK >= cpus
        sign = 1 if holds_all else -1
        return (not holds_all, sign * room.gpus, sign * room.cpus, node != near, room.address)

    packed = sorted(by_node, key=fullness)

    placed: dict[WorkerId, Room] = {}
    num_of_role: Counter[tuple[str, str]] = Counter()

    def by_room(node: str, role: str) -> tuple[float, float, int, bool, str]:
        # A node with GPUs is the last that a worker without is given, and one that dies shall not take all of a role.
        room = by_node[node]
        return room.all_gpus, -free[node][1], num_of_role[node, role], node != near, room.address

    for unit in units:
        on_gpus = _size(unit)[0] > 0
        order = packed if on_gpus else sorted(free, key=lambda node: by_room(node, unit[0].role))
        whole = next((node for node in order if _fits(_size(unit), free[node])), None)
        for want in unit:
            need = (want.gpus, want.cpus)
            node = whole or next((node for node in order if _fits(need, free[node])), None)
            if node is None:
                return want
            free[node] = (free[node][0] - need[0], free[node][1] - need[1])
            placed[want.worker] = by_node[node]
            num_of_role[node, want.role] += 1
    return placed


def _fits(need: tuple[float, float], free: tuple[float, float]) -> bool:
    return need[0] <= free[0] + _SLACK and need[1] <= free[1] + _SLACK


def _no_room(want: Want, rooms: Sequence[Room], *, others: bool) -> CapacityError:
    def told(gpus: float, cpus: float) -> str:
        parts = [f"{amount:g} {name}{'s' * (amount != 1)}" for amount, name in ((gpus, "GPU"), (cpus, "CPU")) if amount]
        return " and ".join(parts) or "nothing"

    key = f"pools.{want.role}"
    needs = f"{want.worker} needs {told(want.gpus, want.cpus)} on one node"
    if not rooms:
        return CapacityError(f"{needs}; the Ray cluster has no node", fix="`ray start` on a node")
    if want.gpus and not any(room.all_gpus for room in rooms):
        return CapacityError(
            f"{needs}; none of the {len(rooms)} nodes of the Ray cluster has a GPU",
            fix=f"{key}.gpus_per_replica: 0 computes on CPUs; or add nodes with GPUs, or tell of them: "
            "`ray start --num-gpus`",
        )
    if not any(_fits((want.gpus, want.cpus), (room.all_gpus, room.all_cpus)) for room in rooms):
        largest = max(rooms, key=lambda room: (room.all_gpus if want.gpus else 0.0, room.all_cpus))
        return CapacityError(
            f"{needs}; the largest has {told(largest.all_gpus, largest.all_cpus)}",
            fix=f"lower {key}.gpus_per_replica, tensor_parallel or cpus_per_replica, or add a larger node",
        )
    there = ", ".join(f"{told(room.gpus, room.cpus)} at {room.address}" for room in rooms[:8])
    more = f" and {len(rooms) - 8} more" if len(rooms) > 8 else ""
    return CapacityError(
        f"{needs}{', beside the other workers' * others}; free are {there}{more}",
        fix=f"lower {key}.replicas or cpus_per_replica, stop what else runs there, or add nodes",
    )


def rooms_of(nodes: Iterable[Mapping[str, object]], free: Mapping[str, Mapping[str, float]]) -> list[Room]:
    """Rooms out of what Ray tells.

    Args:
        nodes: as of `ray.nodes`.
        free: resources by node.
    """
    rooms = []
    for node in nodes:
        resources = node["Resources"]
        if node["Alive"] and isinstance(resources, Mapping):
            name, address = str(node["NodeID"]), str(node["NodeManagerAddress"])
            there = free.get(name, {})
            rooms.append(
                Room(
                    name,
                    address,
                    there.get("CPU", 0.0),
                    there.get("GPU", 0.0),
                    resources.get("CPU", 0.0),
                    resources.get("GPU", 0.0),
                )
            )
    return sorted(rooms, key=lambda room: (room.address, room.node))
