"""What is known of a node's ranks, and what follows from it. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...core.clock import Clock
from ...core.health import Judgement, LocalRank, Vitals
from ...core.ids import PeerId, WorkerId

SILENT_AFTER_S = 15.0
"""A process that has not answered for so long is not ready."""


class NodeHealth:
    """Owned by one event loop.

    Args:
        clock: tells the time.
        stalled_after_s: a rank that has had work for so long and taken no step is not ready.
    """

    def __init__(self, clock: Clock, stalled_after_s: float) -> None:
        self._clock = clock
        self._stalled_after_s = stalled_after_s
        self._ranks: dict[WorkerId, LocalRank] = {}
        self._answers: dict[PeerId, tuple[float, Vitals]] = {}
        self._gone: dict[PeerId, str] = {}
        self._started: set[WorkerId] = set()

    def follow(self, ranks: Sequence[LocalRank]) -> None:
        """These are, or should be, on the node."""
        self._ranks = {rank.worker: rank for rank in ranks}
        peers = {rank.peer for rank in ranks}
        now_s = self._clock.monotonic_s()
        # One that has just become known counts as heard of.
        self._answers = {peer: self._answers.get(peer, (now_s, Vitals(0.0))) for peer in peers}
        self._gone = {peer: why for peer, why in self._gone.items() if peer in peers}
        self._started &= self._ranks.keys()
        self._started |= {rank.worker for rank in ranks if rank.phase in ("ready", "leaving", "drained")}

    def answered(self, peer: PeerId, vitals: Vitals) -> None:
        """A process has told how it is."""
        if peer in self._answers:
            self._answers[peer] = (self._clock.monotonic_s(), vitals)

    def lost(self, peer: PeerId, why: str) -> None:
        """A process has died; the controller will know too, and start its next life."""
        if peer in self._answers:
            self._gone[peer] = why

    def judge(self) -> Iterator[Judgement]:
        """Every rank that should be there."""
        now_s = self._clock.monotonic_s()
        for rank in self._ranks.values():
            if rank.phase == "drained":
                continue
            answered_s, vitals = self._answers[rank.peer]
            silent_s = now_s - answered_s
            # What it said last grows as long as it says nothing else.
            stalled_s = vitals.stalled_s + silent_s if vitals.stalled_s else 0.0
            yield Judgement(rank, self._problem(rank, silent_s, stalled_s), stalled_s)

    def not_ready(self) -> dict[WorkerId, str]:
        """The ranks that are not ready, and why."""
        return {found.rank.worker: found.problem for found in self.judge() if found.problem}

    def not_started(self) -> dict[WorkerId, str]:
        """The ranks that have not been ready once."""
        return {worker: rank.phase for worker, rank in self._ranks.items() if worker not in self._started}

    def _problem(self, rank: LocalRank, silent_s: float, stalled_s: float) -> str:
        if rank.peer in self._gone:
            return self._gone[rank.peer]
        if rank.phase == "leaving":  # as it was asked to
            return ""
        if rank.phase != "ready":
            return rank.phase
        if silent_s >= SILENT_AFTER_S:
            return f"has not answered for {silent_s:.0f} s"
        if stalled_s >= self._stalled_after_s:
            return f"has work, and has taken no step for {stalled_s:.0f} s"
        return ""
