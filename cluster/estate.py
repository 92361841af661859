"""What a life of the controller got from the keeper, and how it asks for more."""

from __future__ import annotations

from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup

from ..core.errors import WorkerError
from .keeper import Kept
from .ray_errors import cause, reason


class Estate:
    """Belongs to the controller. Blocks until the keeper has answered when it is made.

    Args:
        keeper: handle of the cluster's.
    """

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper
        kept = Kept(*ray.get(keeper.take_over.remote()))
        self._life = kept.life
        self._number = 0
        self.state = kept.state
        """What the last life kept; b"": this is the first."""
        self.actors = kept.actors
        """By name, those that the last lives made, the dead among them too."""
        self.groups = kept.groups

    def keep(self, state: bytes) -> None:
        """Have the next life know this. Does not wait."""
        self._number += 1
        self._keeper.keep.remote(self._life, self._number, state)

    async def create(self, name: str, kind: type, options: dict[str, Any], *arguments: Any) -> Any:
        """Make an actor that outlives the controller; returns its handle. Waits while Ray's head is away.

        Raises:
            WorkerError: Ray cannot.
        """
        try:
            return await self._keeper.create.remote(self._life, name, kind, options, arguments)
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"{name} cannot be started: the keeper is gone: {reason(error)}") from None

    def let_go(self, name: str) -> None:
        """End an actor, if it has not ended, and forget it. Does not wait. Idempotent."""
        self._keeper.let_go.remote(self._life, name)

    def reserve(self, worker: str, name: str, bundle: dict[str, float], node: str) -> PlacementGroup:
        """Make a placement group that outlives the controller; see `Keeper.reserve`. Blocks."""
        group: PlacementGroup = ray.get(self._keeper.reserve.remote(self._life, worker, name, bundle, node))
        return group

    def release(self, worker: str) -> None:
        """A worker's group is, or will be, given back. Does not wait. Idempotent."""
        self._keeper.release.remote(self._life, worker)
