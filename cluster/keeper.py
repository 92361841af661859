"""What must outlive the controller, in a process that does nothing else and has little to break.

It owns all other processes and their places: Ray ends what an actor has made when that actor ends, so that nothing is
left when the keeper is gone. It holds the controller's state as bytes that it does not understand, and tells the
controller's next life how the last one ended. Imports little: a launch waits for it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group

from ..core.errors import WorkerError
from ..core.log import configure_logging, logger
from .ray_errors import cause, reason

_STABLE_S = 60.0
_MAX_FAST = 5
"""A controller that ends so often in a row within the time above ends the cluster: what ends it will not pass."""
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 8.0
_LINGER_S = 10.0
"""For how long it can be asked why the cluster ended."""


class Logs(NamedTuple):
    """Where the keeper's log goes, and what it has."""

    folder: str
    level: str
    format: str
    max_per_s: int


class Kept(NamedTuple):
    """What a new life of the controller finds."""

    life: int
    """Its number, counted from 1."""
    state: bytes
    """What the last life kept; b"" for the first."""
    actors: dict[str, Any]
    """Handles of all that were made and not let go, dead ones too."""
    groups: dict[str, PlacementGroup]


class Keeper:
    """A Ray actor, whose methods run in threads. What older lives of the controller still ask for is refused, so that
    nothing comes that the newest does not know.

    Args:
        controller: class of the controller's actor. Its first argument is the keeper, the others are ``arguments``.
        options: of the controller's actor.
        arguments: of its constructor.
        logs: of this process.
    """

    def __init__(self, controller: type, options: dict[str, Any], arguments: tuple[Any, ...], logs: Logs) -> None:
        configure_logging("keeper", logs.level, logs.format, Path(logs.folder) / "keeper.log", logs.max_per_s)
        self._lock = threading.Lock()
        self._life = 0
        self._number = 0
        self._state = b""
        self._kinds: dict[type, Any] = {}
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, PlacementGroup] = {}
        self._verdict = ""
        self._itself = ray.get_runtime_context().current_actor
        # Whoever has a handle keeps it over the controller's lives: Ray holds calls back until the next one is there.
        self._controller: Any = (
            ray.remote(controller)
            .options(**options, max_restarts=-1, max_task_retries=-1)
            .remote(self._itself, *arguments)
        )

    # ---- for the command line ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when everything serves; from then on the controller is started again whenever it ends.

        Raises:
            TandemError: a worker could not start, or the controller died; everything is stopped.
        """
        try:
            ray.get(self._controller.start.options(max_task_retries=0).remote())
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            self._end(f"the controller died while the cluster started: {_how(error)}")
            raise WorkerError(self._verdict) from None
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def verdict(self) -> str:
        """Why the cluster has ended; "": it has not, or was stopped."""
        return self._verdict

    # ---- for the controller -----------------------------------------------------------------------------------------

    def take_over(self) -> Kept:
        """A new life of the controller begins."""
        with self._lock:
            self._life += 1
            self._number = 0
            return Kept(self._life, self._state, dict(self._actors), dict(self._groups))

    def keep(self, life: int, number: int, state: bytes) -> None:
        """Hold this for the next life. Calls may overtake each other: the highest ``number`` of the newest life
        wins."""
        with self._lock:
            if life == self._life and number > self._number:
                self._number, self._state = number, state

    def create(self, life: int, name: str, kind: type, options: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
        """Make an actor of a class, and own it until `let_go`. Blocks while Ray's head is away. Returns its handle.

        Raises:
            WorkerError: a newer life has begun.
        """
        with self._lock:
            self._check(life)
            if kind not in self._kinds:
                self._kinds[kind] = ray.remote(kind)
            self._actors[name] = self._kinds[kind].options(**options).remote(*arguments)
            return self._actors[name]

    def let_go(self, life: int, name: str) -> None:
        """Whoever was made under this name has ended, or shall."""
        with self._lock:
            actor = self._actors.pop(name, None) if life == self._life else None
        if actor is not None:
            ray.kill(actor)

    def reserve(self, life: int, worker: str, name: str, bundle: dict[str, float], node: str) -> PlacementGroup:
        """Make a placement group of one bundle for a worker, on ``node`` if it can be. Does not wait for its place.

        Raises:
            WorkerError: a newer life has begun.
        """
        with self._lock:
            self._check(life)
            group: PlacementGroup = placement_group([bundle], "STRICT_PACK", name, _soft_target_node_id=node)
            self._groups[worker] = group
            return group

    def release(self, life: int, worker: str) -> None:
        """A worker's group has been, or will be, given back to Ray by the controller."""
        with self._lock:
            if life == self._life:
                self._groups.pop(worker, None)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _check(self, life: int) -> None:
        if life != self._life:
            raise WorkerError(f"life {life} of the controller is over, and {self._life} asks for what there is to be")

    def _watch(self) -> None:
        """Have the controller live, until it has been stopped or dies too often."""
        how, num_fast = "", 0
        while True:
            began_s = time.monotonic()
            try:
                ray.get(self._controller.describe.remote())  # its next life is there
                began_s = time.monotonic()
                ray.get(self._controller.reign.options(max_task_retries=0).remote(how))
                return
            except ray.exceptions.RayTaskError as error:
                how = cause(error).message
                ray.kill(self._controller, no_restart=False)
            except ray.exceptions.RayActorError as error:
                how = _how(error)
            lived_s = time.monotonic() - began_s
            num_fast = num_fast + 1 if lived_s < _STABLE_S else 0
            if num_fast == _MAX_FAST:
                self._end(f"the controller ended {num_fast} times, each within {_STABLE_S:g} s: {how}")
                return
            pause_s = min(_FIRST_PAUSE_S * 2 ** (num_fast - 1), _MAX_PAUSE_S) if num_fast else 0.0
            logger.warning("the controller ended (%s) after %.1f s; it goes on in %g s", how, lived_s, pause_s)
            time.sleep(pause_s)

    def _end(self, verdict: str) -> None:
        """End the cluster, and soon this process, with which goes what is left of it."""
        logger.error("%s; the cluster ends", verdict)
        self._verdict = verdict
        with self._lock:
            self._life += 1  # nothing new comes
            actors: list[Any] = [self._controller, *self._actors.values()]
        for actor in actors:
            ray.kill(actor)
        last = threading.Timer(_LINGER_S, lambda: ray.kill(self._itself))
        last.daemon = True
        last.start()


def _how(error: ray.exceptions.RayActorError) -> str:
    # Ray does not know yet: it tells of a broken connection, and starts the process again.
    broken = isinstance(error, ray.exceptions.ActorUnavailableError)
    return "its process ended without a word; controller.log may tell why" if broken else reason(error)
