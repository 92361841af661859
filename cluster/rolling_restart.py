"""Another life of worker after worker, none before the last one serves again; a next life of the controller goes on
with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from ..core.errors import CapacityError, NotFoundError, WorkerError
from ..core.ids import PeerId, WorkerId
from .controller import Controller, Desired
from .state import KeptRestart

_ALONE_S = 5.0
"""What a worker takes to finish while nobody else of its pool is there: what comes meanwhile waits."""
_DISMISS_S = 600.0
"""What a spare worker takes to finish at most."""
_RETURN_S = 60.0
"""For how long a next life of the controller waits for the caller of the last one, and goes on without him."""


class RollingRestart:
    """At most one goes on at a time; how the last one ended is known until the next begins. Belongs to the controller's
    event loop.

    Args:
        controller: of the cluster.
        one_more: has one more worker of a pool start; None where there is no room for it.
        on_change: called when what it keeps has changed.
    """

    def __init__(
        self, controller: Controller, one_more: Callable[[str], Desired | None], on_change: Callable[[], None]
    ) -> None:
        self._controller = controller
        self._one_more = one_more
        self._on_change = on_change
        self.kept: KeptRestart | None = None
        self.spares: list[WorkerId] = []
        """Workers that live until another of their pool serves."""
        self._num_callers = 0
        self._num_told = 0
        """Of `KeptRestart.done`, those that a caller has heard of."""
        self._waits_for_caller = False
        """Whether the caller of the controller's last life may still come."""
        self._news = asyncio.Event()

    @property
    def goes_on(self) -> bool:
        """Whether some workers are still to come."""
        return self.kept is not None and self.kept.outcome is None

    def begin(self, key: str, workers: list[WorkerId], grace_s: float) -> None:
        """Begin; `follow` comes next.

        Args:
            key: tells it from others.
            workers: in their order.
            grace_s: what one has not finished or handed over by then goes on elsewhere.

        Raises:
            CapacityError: another one goes on.
        """
        if self.goes_on:
            raise CapacityError("another restart is under way", fix="`tandem watch` shows how it goes on")
        self.kept = KeptRestart(key, grace_s, workers)
        self._num_told = 0
        self._on_change()
        self._controller.background(self._run())

    def take_over(self, kept: KeptRestart | None, spares: list[WorkerId]) -> None:
        """Go on where the last life of the controller ended. The caller may come back, by `follow`; without him no
        further worker is begun after a minute."""
        self.kept, self.spares = kept, spares
        for spare in spares:
            if kept is None or kept.outcome is not None or kept.spare != spare:
                self._controller.background(self._dismiss(spare))
        if self.goes_on:
            self._waits_for_caller = True
            asyncio.get_running_loop().call_later(_RETURN_S, self._wait_no_more)
            self._controller.background(self._run())

    async def follow(self, key: str) -> AsyncGenerator[WorkerId, None]:
        """How a restart goes on, or went. When its last caller leaves, no further worker is begun.

        Yields:
            each worker that serves again, from the first on.

        Raises:
            WorkerError: one did not come back; those that are left have not been touched.
        """
        self._num_callers += 1
        num_told = 0
        try:
            self._wait_no_more()
            while True:
                if self.kept is None or self.kept.key != key:
                    raise WorkerError("another restart has begun meanwhile")
                if num_told < len(self.kept.done):
                    yield self.kept.done[num_told]
                    num_told += 1
                    self._num_told = max(self._num_told, num_told)
                    self._tell()
                elif self.kept.outcome is not None:
                    break
                else:
                    await self._news.wait()
        finally:
            self._num_callers -= 1
            self._tell()
        if self.kept.outcome:
            raise WorkerError(self.kept.outcome, fix="`tandem watch` tells why; then begin again")

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _wait_no_more(self) -> None:
        self._waits_for_caller = False
        self._tell()

    def _set(self, **changes: Any) -> None:
        assert self.kept is not None
        self.kept = msgspec.structs.replace(self.kept, **changes)

    async def _run(self) -> None:
        assert self.kept is not None
        try:
            while self.kept.to_come:
                await self._until_heard()
                self._check_caller()
                await self._next(self.kept.to_come[0])
            outcome = ""
        except (WorkerError, CapacityError, NotFoundError) as error:
            outcome = error.message
        self._let_spare_go()
        await self._until_heard()
        self._set(outcome=outcome)
        self._on_change()
        self._tell()

    async def _until_heard(self) -> None:
        """Wait until the caller, if he is there, has heard of all that serve again."""
        assert self.kept is not None
        while self._num_callers and self._num_told < len(self.kept.done):
            await self._news.wait()

    def _check_caller(self) -> None:
        """Raises WorkerError if he has left."""
        assert self.kept is not None
        if self.kept.after or self._num_callers or self._waits_for_caller:
            return  # who has been asked to end is waited for in any case
        raise WorkerError(f"whoever asked for the restart has left; to come were {', '.join(self.kept.to_come)}")

    async def _next(self, name: WorkerId) -> None:
        """Begin another life of the next worker, or go on with that."""
        assert self.kept is not None
        worker = self._find(name)
        if worker.wanted or self.kept.after:
            await self._accompany(worker)
            await self._replace(worker)
            self._set(done=[*self.kept.done, name])
        self._let_spare_go()
        self._set(to_come=self.kept.to_come[1:], after="")
        self._on_change()
        self._tell()

    async def _accompany(self, worker: Desired) -> None:
        """Have another worker of the pool meanwhile, if this is the only one and there is room."""
        assert self.kept is not None
        if not self.kept.spare and not self.kept.after and not any(other.wanted for other in self._others(worker)):
            spare = self._one_more(worker.role)
            if spare is None:
                return
            self.spares.append(spare.worker)
            self._set(spare=spare.worker)
            self._on_change()
        if self.kept.spare:
            spare = self._find(self.kept.spare)
            try:
                await self._serves(spare, "")
            except WorkerError:
                self.spares.remove(spare.worker)
                self._set(spare="")
                self._controller.take_out(spare, 0, restart=False)
                raise

    async def _replace(self, worker: Desired) -> None:
        assert self.kept is not None
        if not self.kept.after:
            alone = not any(other.phase == "ready" for other in self._others(worker))
            grace_s = min(self.kept.grace_s, _ALONE_S) if alone else self.kept.grace_s
            # Kept together with what it makes of the worker: a next life that knew of one alone would be misled.
            self._set(after=worker.peer)
            self._controller.take_out(worker, grace_s, restart=True)
        await self._serves(worker, self.kept.after)

    async def _serves(self, worker: Desired, after: PeerId) -> None:
        """Wait until a worker serves, in another life than ``after``."""

        def settled() -> bool:
            return worker.peer != after and (worker.phase == "ready" or worker.failed or not worker.wanted)

        await self._controller.until(settled)
        if worker.failed:
            raise WorkerError(f"{worker.worker} does not come back")

    def _let_spare_go(self) -> None:
        assert self.kept is not None
        if self.kept.spare:
            self._controller.background(self._dismiss(self.kept.spare))
            self._set(spare="")

    async def _dismiss(self, name: WorkerId) -> None:
        """Take a spare worker out as soon as it is not the only one that serves."""
        spare = self._find(name)
        others = self._others(spare)
        await self._controller.until(lambda: any(worker.phase == "ready" for worker in others))
        self.spares.remove(name)
        self._controller.take_out(spare, _DISMISS_S, restart=False)

    def _find(self, name: WorkerId) -> Desired:
        found = next((worker for worker in self._controller.desired if worker.worker == name), None)
        if found is None:
            raise NotFoundError(f"no worker is called {name!r}")
        return found

    def _others(self, worker: Desired) -> list[Desired]:
        return [other for other in self._controller.desired if other.role == worker.role and other is not worker]
