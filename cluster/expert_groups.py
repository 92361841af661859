"""Where workers that share experts meet, who goes when one is gone, and what their group leaves to the next.

Owned by one event loop; no I/O.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from ..core.config import Config
from ..core.errors import WorkerError
from ..core.ids import PeerId, WorkerId, index_of, worker_of
from .state import KeptGroup, KeptLearned


class GroupId(NamedTuple):
    """Consecutive workers of a role that share experts."""

    role: str
    number: int


class _Arrival(NamedTuple):
    peer: PeerId
    rendezvous: str
    answer: asyncio.Future[str]


class ExpertGroups:
    """All groups of a cluster.

    Args:
        config: says how many workers are a group.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._arrived: dict[GroupId, dict[WorkerId, _Arrival]] = {}
        self._formed: dict[GroupId, frozenset[PeerId]] = {}
        self._rendezvous: dict[GroupId, str] = {}
        self._learned: dict[GroupId, bytes] = {}

    def state(self) -> tuple[list[KeptGroup], list[KeptLearned]]:
        """Groups that have formed, and what any have left, for `restore`."""
        return (
            [KeptGroup(sorted(peers), self._rendezvous[group]) for group, peers in self._formed.items()],
            [KeptLearned(*group, learned) for group, learned in self._learned.items()],
        )

    def restore(self, kept: list[KeptGroup], left: list[KeptLearned]) -> None:
        """These groups have formed before, and left this."""
        self._learned = {GroupId(group.role, group.number): group.learned for group in left}
        for formed in kept:
            group, _ = self._group_of(formed.peers[0])
            if group is not None:
                self._formed[group], self._rendezvous[group] = frozenset(formed.peers), formed.rendezvous

    async def meet(self, peer: PeerId, rendezvous: str) -> str:
        """Wait until all workers of a group are about to join it.

        Args:
            peer: who comes.
            rendezvous: where the others would find it, if it is the first rank.

        Returns:
            the first rank's.

        Raises:
            WorkerError: it shares no experts, or has been replaced meanwhile.
        """
        group, size = self._group_of(peer)
        if group is None:
            raise WorkerError(f"{peer} shares no experts with anybody")
        if peer in self._formed.get(group, ()):
            return self._rendezvous[group]  # it did not hear the answer, as the controller ended
        arrived = self._arrived.setdefault(group, {})
        self._give_up(arrived.pop(worker_of(peer), None))
        mine = _Arrival(peer, rendezvous, asyncio.get_running_loop().create_future())
        arrived[worker_of(peer)] = mine
        if len(arrived) == size:
            first = min(arrived.values(), key=lambda arrival: index_of(worker_of(arrival.peer)))
            self._formed[group] = frozenset(arrival.peer for arrival in arrived.values())
            self._rendezvous[group] = first.rendezvous
            for arrival in arrived.values():
                arrival.answer.set_result(first.rendezvous)
            del self._arrived[group]
        return await mine.answer

    def keep(self, peer: PeerId, learned: bytes) -> None:
        """What the group of ``peer`` leaves. Without effect when that has ended: its followers may have asked already,
        and all of them get the same."""
        group, _ = self._group_of(peer)
        if group is not None and peer in self._formed.get(group, ()):
            self._learned[group] = learned

    def learned(self, peer: PeerId) -> bytes:
        """What the groups before that of ``peer`` left last, or b"". Does not change until that has formed."""
        group, _ = self._group_of(peer)
        return self._learned.get(group, b"") if group is not None else b""

    def gone(self, peer: PeerId) -> frozenset[PeerId]:
        """A worker's life has ended; returns the others of its group, which cannot go on without it. Once."""
        group, _ = self._group_of(peer)
        if group is None:
            return frozenset()
        arrived = self._arrived.get(group, {})
        if worker_of(peer) in arrived and arrived[worker_of(peer)].peer == peer:
            self._give_up(arrived.pop(worker_of(peer)))
        formed = self._formed.get(group, frozenset())
        if peer not in formed:
            return frozenset()
        del self._formed[group]
        return formed - {peer}

    def _group_of(self, peer: PeerId) -> tuple[GroupId | None, int]:
        worker = worker_of(peer)
        role = worker.rpartition("-")[0]
        size = self._config.expert_parallel(role)
        return (GroupId(role, index_of(worker) // size) if size > 1 else None), size

    @staticmethod
    def _give_up(arrival: _Arrival | None) -> None:
        if arrival is not None and not arrival.answer.done():
            arrival.answer.set_exception(WorkerError(f"{arrival.peer} is gone"))
            arrival.answer.exception()  # whoever waited may be gone too
