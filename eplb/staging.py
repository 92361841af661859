"""Brings a layer's next experts into the staging memory, and makes sure that they are what they should be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.clock import Clock
from ..core.errors import TandemError
from ..kv_transfer.layout import Runs
from ..kv_transfer.memory import Buffer
from .ledger import Ledger
from .moves import Move, first_pulls
from .peers import Peers, Ticket
from .rebalance import Reason
from .store import ExpertStore, checksum

EXPERTS = "experts"
STAGING = "staging"
LEDGER = "ledger"
LANDING = "landing"

_WORD_BYTES = 8
_PIECE_BYTES = 16
"""Transports between GPUs copy ranges of whole pieces at full speed."""


class StageError(TandemError):
    """A layer, or the plan, could not be staged. ``reason`` is a `Reason`."""

    reason: Reason = Reason.EXCEPTION


class Staged(NamedTuple):
    """A layer in the staging memory."""

    slots: tuple[int, ...]
    """That it has experts for."""
    sums: tuple[int, ...]
    """Their checksums; 0 where none are kept."""
    num_bytes: int
    """That came from peers."""


class Stager:
    """One thread at a time uses it. Its calls block; `interrupt` is for other threads.

    Args:
        store: the experts.
        ledger: this rank's.
        peers: the others.
        landing: of `landing_bytes`: where numbers of the peers' ledgers come.
        rank: this one.
        clock: for deadlines.
    """

    def __init__(
        self, store: ExpertStore, ledger: Ledger, peers: Peers, landing: Buffer, rank: int, clock: Clock
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._peers = peers
        self._landing = landing
        self._rank = rank
        self._clock = clock
        self._draining: set[Ticket] = set()

    def read_plan(self, leader: int, deadline_s: float, wanted: Callable[[], bool]) -> np.ndarray:
        """The leader's plan: [layers, physical] int32.

        Args:
            leader: whose.
            deadline_s: on the clock's monotonic scale.
            wanted: asked whenever something happens: whether to go on.

        Raises:
            StageError: it did not come in time, or it is not wanted any more.
        """
        if leader == self._rank:
            return self._ledger.plan.copy()
        runs = _runs([(self._ledger.plan_offset, 0, self._ledger.plan_bytes)])
        self._finish({self._peers.start(leader, LEDGER, LANDING, runs): leader}, deadline_s, wanted)
        plan: np.ndarray = (
            self._landing.array[: self._ledger.plan_bytes].view(np.int32).reshape(self._ledger.plan.shape)
        )
        return plan.copy()

    def stage(
        self, layer: int, moves: Sequence[Move], checksums: bool, deadline_s: float, wanted: Callable[[], bool]
    ) -> Staged:
        """Bring experts into the staging memory. On a GPU, copies within the rank are queued on the current stream.

        Args:
            layer: of the model.
            moves: of this rank.
            checksums: whether to compare with the peers' what came from them.
            deadline_s: on the clock's monotonic scale.
            wanted: asked whenever something happens: whether to go on.

        Raises:
            StageError: bytes did not come in time, or are not what they should be; or are not wanted any more.
        """
        pulls, again = first_pulls(moves, self._rank)
        by_peer: dict[int, list[Move]] = defaultdict(list)
        for pull in pulls:
            by_peer[pull.rank].append(pull)
        reads: dict[Ticket, int] = {}
        try:
            for peer, theirs in by_peer.items():
                for runs in self._runs_of(layer, theirs):
                    reads[self._peers.start(peer, EXPERTS, STAGING, runs)] = peer
            live, staged = self._store.live[layer], self._store.staged
            for move in moves:
                if move.rank == self._rank:
                    for name, tensor in live.items():
                        staged[name][move.target].copy_(tensor[move.source], non_blocking=True)
        except BaseException:
            self._draining |= self._peers.cancel(reads)
            raise
        self._finish(reads, deadline_s, wanted)
        found = self._verify(layer, by_peer, checksums, deadline_s, wanted)
        for first, target in again:
            for tensor in staged.values():
                tensor[target].copy_(tensor[first], non_blocking=True)
            found[target] = found[first]
        for move in moves:
            if move.rank == self._rank:
                found[move.target] = int(self._ledger.sums[layer, move.source])
        slots = tuple(sorted(found))
        return Staged(slots, tuple(found[s] for s in slots), len(pulls) * self._store.layout.expert_bytes)

    def interrupt(self) -> None:
        """Let a call that blocks ask whether it is still wanted. Any thread's."""
        self._peers.news.set()

    def drain(self, wanted: Callable[[], bool]) -> bool:
        """Block until no read that was given up can write any more, or it is not ``wanted``; whether none can."""
        while self._draining:
            self._draining -= self._peers.poll().keys()
            if not self._draining or not wanted():
                break
            self._peers.news.wait()
        return not self._draining

    def _runs_of(self, layer: int, pulls: Iterable[Move]) -> list[Runs]:
        """Where a peer has experts and where they go; ranges of whole pieces, and the others, apart."""
        layout = self._store.layout
        start = layer * layout.layer_bytes
        kinds: tuple[list[tuple[int, int, int]], ...] = [], []
        for number, tensor in enumerate(layout.tensors):
            kind = kinds[tensor.num_bytes % _PIECE_BYTES > 0]
            for pull in pulls:
                source, target = layout.offset(number, pull.source), layout.offset(number, pull.target)
                kind.append((start + source, target, tensor.num_bytes))
        return [_runs(kind) for kind in kinds if kind]

    def _verify(
        self,
        layer: int,
        by_peer: dict[int, list[Move]],
        checksums: bool,
        deadline_s: float,
        wanted: Callable[[], bool],
    ) -> dict[int, int]:
        """Checksums of what was pulled, by target, after comparing it with what the peers say now."""
        ledger, reads = self._ledger, {}
        base = max(by_peer, default=0) + 1
        for peer, pulls in by_peer.items():
            ranges = [(ledger.generation_offset(layer), peer * _WORD_BYTES, _WORD_BYTES)]
            if checksums:
                ranges += [
                    (ledger.sum_offset(layer, pull.source), (base + pull.target) * _WORD_BYTES, _WORD_BYTES)
                    for pull in pulls
                ]
            reads[self._peers.start(peer, LEDGER, LANDING, _runs(ranges))] = peer
        self._finish(reads, deadline_s, wanted)
        words = self._landing.array[: len(self._landing.array) // _WORD_BYTES * _WORD_BYTES].view(np.uint64)
        found = {}
        for peer, pulls in by_peer.items():
            if words[peer] != ledger.generations[layer]:
                raise StageError(
                    f"layer {layer} of rank {peer} is number {words[peer]}, expected {ledger.generations[layer]}",
                    reason=Reason.GENERATION,
                )
            for pull in pulls:
                found[pull.target] = int(words[base + pull.target]) if checksums else 0
                if checksums and (got := checksum(self._store.staged, pull.target)) != found[pull.target]:
                    raise StageError(
                        f"layer {layer}, slot {pull.source} of rank {peer} arrived with the checksum {got:016x}, "
                        f"expected {found[pull.target]:016x}",
                        reason=Reason.CORRUPTED,
                    )
        return found

    def _finish(self, reads: dict[Ticket, int], deadline_s: float, wanted: Callable[[], bool]) -> None:
        """Wait for reads, each of a peer; of those that are given up, remember which drain."""
        pending = dict(reads)
        try:
            while pending:
                ended = self._peers.poll()
                self._draining -= ended.keys()
                for ticket, error in ended.items():
                    peer = pending.pop(ticket, None)
                    if peer is not None and error:
                        raise StageError(f"experts of rank {peer} did not arrive: {error}", reason=Reason.TRANSFER)
                if not pending:
                    return
                if not wanted():
                    raise StageError("given up: the attempt is over", reason=Reason.CLOSED)
                left_s = deadline_s - self._clock.monotonic_s()
                if left_s <= 0:
                    raise StageError(
                        f"experts of ranks {sorted(set(pending.values()))} did not arrive in time",
                        reason=Reason.TIMEOUT,
                    )
                self._peers.news.wait(left_s)
        finally:
            if pending:
                self._draining |= self._peers.cancel(pending)


def landing_bytes(ledger: Ledger, num_ranks: int, num_slots: int) -> int:
    """What numbers that are read from peers need for landing."""
    return max(ledger.plan_bytes, (num_ranks + 1 + num_slots) * _WORD_BYTES)


def _runs(ranges: list[tuple[int, int, int]]) -> Runs:
    """Of (source, target, bytes)."""
    columns = np.array(sorted(ranges, key=lambda one: one[1]), np.int64).reshape(-1, 3).T
    return Runs(*(np.ascontiguousarray(column) for column in columns))
