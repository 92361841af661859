"""A launcher for the real controller, whose processes are ready and die when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tandem.core.errors import CapacityError, WorkerError
from tandem.core.expert_messages import LoadEntries, LoadEntry
from tandem.core.ids import PeerId, WorkerId
from tandem.core.messages import Member, Membership, Report


class Process:
    """A launched process, as the launcher's handle."""

    def __init__(self, peer: PeerId, role: str, fails: Exception | None) -> None:
        self.grace_s: float | None = None
        """That the last stop gave it."""
        self.lingers = False
        """Whether it has something to finish, until the test lets it die."""
        self.refuses = False
        self.peer = peer
        self.role = role
        self.memberships: list[Membership] = []
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_ready = asyncio.Event()
        self._fails = fails

    async def ready(self) -> Member:
        await self.is_ready.wait()
        if self.death.done():
            raise WorkerError(f"{self.peer} died while it started: {self.death.result()}")
        if self._fails is not None:
            raise self._fails
        return Member(self.peer, self.role, "node", "tcp://127.0.0.1:1")

    async def gone(self) -> str:
        return await asyncio.shield(self.death)

    async def follow(self, membership: Membership) -> None:
        self.memberships.append(membership)

    async def report(self) -> Report | None:
        return Report(1, 2, 3, 4, 5)

    async def rebalance(self, timeout_s: float) -> str:
        if self.refuses:
            raise CapacityError("experts.balance is off")
        return f"done: within {timeout_s:g} s"

    async def expert_load(self, after: int) -> LoadEntries:
        return LoadEntries([LoadEntry(after + 1, 5, bytes(16))], 1, 2, "tiny", after + 1)

    async def stop(self, grace_s: float, *, leaves: bool = False) -> None:
        self.grace_s = grace_s
        if self.lingers and grace_s:
            await asyncio.shield(self.death)
        self.die("stopped")

    def die(self, how: str = "SIGKILL") -> None:
        if not self.death.done():
            self.death.set_result(how)


class Launched:
    """A launcher that remembers; ``fails`` says whose start goes wrong, ``room`` how many more find room."""

    def __init__(self, fails: dict[PeerId, Exception] | None = None, hold: bool = False, room: int = 1000) -> None:
        self.room = room
        self.processes: dict[PeerId, Process] = {}
        self.order: list[PeerId] = []
        self.released: list[WorkerId] = []
        self.fails = fails or {}
        self.hold = hold

    def launch(self, peer: PeerId, role: str, on_phase: Callable[[str], None]) -> Process:
        process = self.processes[peer] = Process(peer, role, self.fails.get(peer))
        self.order.append(peer)
        on_phase("reading the model")
        if not self.hold:
            process.is_ready.set()
        return process

    def adopt(self, peer: PeerId, on_phase: Callable[[str], None]) -> Process | None:
        return self.processes.get(peer)

    def check_room(self, workers: Sequence[tuple[WorkerId, str]]) -> None:
        if len(workers) > self.room:
            raise CapacityError(f"{workers[self.room][0]} finds no room")

    def release(self, worker: WorkerId) -> None:
        self.released.append(worker)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)
