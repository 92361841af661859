"""Operators' orders about experts: place them anew, and tell what they computed. Owned by one event loop; no I/O."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import NamedTuple

from ..core.config import Config
from ..core.errors import CapacityError, NotFoundError, RequestError, TandemError
from ..core.expert_messages import LoadEntries
from ..core.ids import WorkerId, index_of
from .controller import Controller, Desired

REBALANCE_S = 120.0
"""How long a group may take, where nobody says."""
_MAX_S = 3600.0


class Rebalanced(NamedTuple):
    """What became of a group."""

    worker: WorkerId
    """Its first."""
    outcome: str


class Rebalancing:
    """For the workers of one cluster.

    Args:
        config: says how many workers are a group.
        controller: knows them.
    """

    def __init__(self, config: Config, controller: Controller) -> None:
        self._config = config
        self._controller = controller
        self._busy: defaultdict[WorkerId, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def possible(self) -> bool:
        """Whether any workers share experts."""
        return any(self._config.expert_parallel(worker.role) > 1 for worker in self._controller.desired)

    async def rebalance(self, pool: str, timeout_s: float) -> list[Rebalanced]:
        """Place the experts of all groups of a pool anew, or of all pools if none is named. Waits for all of them.

        Args:
            pool: prefill, decode or colocated, or "".
            timeout_s: of each group.

        Raises:
            NotFoundError: no workers of this pool share experts.
            RequestError: the time is none.
            CapacityError: no group is ready.
        """
        if not 0 < timeout_s <= _MAX_S:
            raise RequestError(f"timeout_s is {timeout_s:g}, expected more than 0 and at most {_MAX_S:g}")
        firsts = [worker for worker in self._firsts() if pool in ("", worker.role)]
        if not firsts:
            raise NotFoundError(f"no workers of the pool {pool[:100]!r} share experts", param="pool")
        ready = [worker for worker in firsts if worker.phase == "ready"]
        if not ready:
            raise CapacityError(f"{firsts[0].worker} is not ready: {firsts[0].phase}", fix="try again when it serves")
        return list(await asyncio.gather(*(self._one(worker, timeout_s) for worker in ready)))

    async def load(self, worker: WorkerId, after: int) -> LoadEntries:
        """What the experts of a group computed since entry ``after``.

        Args:
            worker: the group's first; "": that of the only group.

        Raises:
            NotFoundError: it is not the first of a group.
            CapacityError: it is not ready.
            WorkerError: it does not answer.
        """
        firsts = self._firsts()
        if not worker and len(firsts) == 1:
            worker = firsts[0].worker
        found = next((one for one in firsts if one.worker == worker), None)
        if found is None:
            names = ", ".join(one.worker for one in firsts) or "none"
            raise NotFoundError(f"give the first worker of a group that shares experts: {names}", param="worker")
        if found.handle is None or found.phase != "ready":
            raise CapacityError(f"{found.worker} is not ready: {found.phase}", fix="try again when it serves")
        return await found.handle.expert_load(after)

    def _firsts(self) -> list[Desired]:
        sizes = [(worker, self._config.expert_parallel(worker.role)) for worker in self._controller.desired]
        return [worker for worker, size in sizes if size > 1 and index_of(worker.worker) % size == 0]

    async def _one(self, worker: Desired, timeout_s: float) -> Rebalanced:
        async with self._busy[worker.worker]:
            try:
                assert worker.handle is not None, "who is ready has one"
                return Rebalanced(worker.worker, await worker.handle.rebalance(timeout_s))
            except TandemError as error:
                return Rebalanced(worker.worker, f"failed: {error.message}")
