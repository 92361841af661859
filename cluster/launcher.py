"""What the controller asks of whoever starts processes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..core.expert_messages import LoadEntries
from ..core.ids import PeerId, WorkerId
from ..core.messages import Member, Membership, Report


class Handle(Protocol):
    """A process that was launched."""

    async def ready(self) -> Member:
        """Wait until it serves. Raises what its start raised."""
        ...

    async def link_offer(self) -> bytes:
        """What its end offers to readers, told before it serves. Raises WorkerError."""
        ...

    async def link_refusals(self, offers: list[bytes]) -> list[str]:
        """Why it could not read KV from the ends of these offers, or "" each. Raises WorkerError."""
        ...

    async def end_trial(self) -> None:
        """What it opened for `link_offer` or `link_refusals` is needed no more. Errors are ignored."""
        ...

    async def gone(self) -> str:
        """Wait until it has ended, and tell how."""
        ...

    async def follow(self, membership: Membership) -> None:
        """Tell it who is there. Errors are ignored: a process that cannot hear is about to be gone."""
        ...

    async def report(self) -> Report | None:
        """Its load, or None if it does not answer in time."""
        ...

    async def rebalance(self, timeout_s: float) -> str:
        """Place the experts of its group anew, and tell what became of it. Raises TandemError."""
        ...

    async def expert_load(self, after: int) -> LoadEntries:
        """What the experts of its group computed since entry ``after``. Raises WorkerError."""
        ...

    async def stop(self, grace_s: float, *, leaves: bool = False) -> None:
        """End it, gently for ``grace_s`` seconds. Idempotent.

        Args:
            grace_s: what is not finished by then is lost here.
            leaves: the cluster goes on without it.
        """
        ...


class Launcher(Protocol):
    """Starts processes."""

    def launch(self, peer: PeerId, role: str, on_phase: Callable[[str], None]) -> Handle:
        """Start a process; ``on_phase`` is told how its start goes on. Does not wait."""
        ...

    def adopt(self, peer: PeerId, on_phase: Callable[[str], None]) -> Handle | None:
        """A process that the controller's last life launched, dead or alive, or None if it did not get that far."""
        ...

    def check_room(self, workers: Sequence[tuple[WorkerId, str]]) -> None:
        """Raises CapacityError if there is no room for these, names and roles, beside all that live; names one that
        finds none."""
        ...

    def release(self, worker: WorkerId) -> None:
        """A worker has left: what was kept for its next life is free. Does not wait. Idempotent."""
        ...
