"""Ray placement groups: one a worker, made, found again and removed here alone.

A group has one bundle, what one worker needs, on the node that `placement` chose. Ray cannot give back or move one
bundle of a larger group, and workers come, go and lose their nodes one by one. Groups outlive their worker's lives, so
that the next life comes to the same node, and nobody else takes its place meanwhile. They end with the keeper, which
makes them: Ray removes those of an actor that is dead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
import ray.exceptions
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..core.config import Config
from ..core.errors import CapacityError, ConfigError
from ..core.ids import WorkerId
from .controller import desired_workers
from .estate import Estate
from .placement import Room, Want, plan, rooms_of, wants_of

_RESERVE_TIMEOUT_S = 20.0
_STALE_S = 3.0
"""How long Ray may take to tell that what has just ended is gone."""
_POLL_S = 0.2


def rooms() -> list[Room]:
    """The nodes of the connected Ray cluster that are alive. Asks Ray: blocks."""
    return rooms_of(ray.nodes(), available_resources_per_node())


def check_resources(config: Config) -> None:
    """Raises ConfigError if the connected Ray cluster has no room for all workers; names what lacks. Blocks."""
    wants = wants_of(config, desired_workers(config))
    deadline_s = time.monotonic() + _STALE_S
    while True:
        try:
            plan(wants, rooms())
            return
        except CapacityError as error:
            if time.monotonic() > deadline_s:
                raise ConfigError(error.message, fix=error.fix) from None
        time.sleep(_POLL_S)


def check_room(config: Config, workers: Iterable[tuple[WorkerId, str]]) -> None:
    """Raises CapacityError if the Ray cluster has no room for these, names and roles, beside all that live; names one
    that finds none. Blocks."""
    plan(wants_of(config, workers), rooms())


def choose_nodes(config: Config) -> dict[WorkerId, str]:
    """Where workers would be put now, for who looks at their places before they come: Ray's names of nodes. Where not
    all find room, those that do, one after the other. Blocks."""
    wants, free = wants_of(config, desired_workers(config)), rooms()
    placed: dict[WorkerId, Room] = {}
    try:
        placed = plan(wants, free)
    except CapacityError:
        fitting: list[Want] = []
        for want in wants:
            with contextlib.suppress(CapacityError):
                placed = plan([*fitting, want], free)
                fitting.append(want)
    return {worker: room.node for worker, room in placed.items()}


class PlacementGroups:
    """Belongs to the controller. Every method asks Ray and may block for as long as Ray's head does not answer; they
    may be called from any thread, and take turns.

    Args:
        name: of the Tandem; tells whose a group is.
        config: the cluster's.
        estate: has those that were made before, and makes more.
    """

    def __init__(self, name: str, config: Config, estate: Estate) -> None:
        self._name = name
        self._config = config
        self._here = ray.get_runtime_context().get_node_id()
        self._estate = estate
        self._groups: dict[WorkerId, PlacementGroup] = dict(estate.groups)
        self._chosen: dict[WorkerId, Room] = {}
        self._lock = threading.Lock()
        self._closed = False

    def choose(self, workers: Iterable[tuple[WorkerId, str]]) -> None:
        """Choose nodes for workers that will be placed soon, all together.

        Raises:
            CapacityError: one finds no room; nothing is chosen.
        """
        with self._lock:
            self._chosen |= plan(wants_of(self._config, workers), rooms(), self._here)

    def place(self, worker: WorkerId, role: str) -> dict[str, Any]:
        """Make sure of a worker's place. Returns the options of its actor: resources and scheduling strategy.

        Its last place, if its node is alive, else a new one.

        Raises:
            CapacityError: there is no room, or it was taken meanwhile.
        """
        with self._lock:
            [want] = wants_of(self._config, [(worker, role)])
            options: dict[str, Any] = {"num_cpus": want.cpus, "num_gpus": want.gpus}
            group = self._groups.get(worker)
            if group is not None and not self._usable(group):
                self._remove(worker)
                group = None
            if group is None:
                room = self._chosen.pop(worker, None) or plan([want], rooms(), self._here)[worker]
                if not (want.cpus or want.gpus):
                    return options | {"scheduling_strategy": NodeAffinitySchedulingStrategy(room.node, soft=True)}
                group = self._reserve(want, room)
            strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=False)
            return options | {"scheduling_strategy": strategy}

    def forget(self, worker: WorkerId) -> Callable[[], None]:
        """A worker has left: its next life gets another place. Does not ask Ray; returns what gives the place back."""
        group = self._groups.pop(worker, None)
        self._chosen.pop(worker, None)
        self._estate.release(worker)
        return lambda: self._give_back(group)

    def close(self) -> None:
        """Give back everything; nothing is placed from now on. Idempotent."""
        with self._lock:
            self._closed = True
            for worker in list(self._groups):
                self._remove(worker)

    def _reserve(self, want: Want, room: Room) -> PlacementGroup:
        if self._closed:
            raise CapacityError("the cluster is stopping")
        bundle = {name: amount for name, amount in (("CPU", want.cpus), ("GPU", want.gpus)) if amount}
        name = f"{self._name}-{want.worker}"
        group = self._estate.reserve(want.worker, name, bundle, room.node)
        self._groups[want.worker] = group
        if not group.wait(_RESERVE_TIMEOUT_S):
            self._remove(want.worker)
            told = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            if room.node not in self._alive():
                raise CapacityError(
                    f"{want.worker}: its node at {room.address}, where {told} were free a moment ago, died meanwhile",
                    fix="try again, on what is left or with another node",
                )
            raise CapacityError(
                f"{want.worker}: {told} on one node, free at {room.address} a moment ago, were taken meanwhile",
                fix="try again, or stop what else uses the Ray cluster",
            )
        return group

    @staticmethod
    def _usable(group: PlacementGroup) -> bool:
        found = placement_group_table(group)
        nodes = set(found.get("bundles_to_node_id", {}).values())
        return found.get("state") == "CREATED" and nodes <= PlacementGroups._alive()

    @staticmethod
    def _alive() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def _remove(self, worker: WorkerId) -> None:
        self.forget(worker)()

    @staticmethod
    def _give_back(group: PlacementGroup | None) -> None:
        if group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(group)
