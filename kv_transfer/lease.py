"""How long finished blocks are kept for a reader: the prefill side of a handoff. Sans-IO.

::

            publish            renew*
    HELD ──────────► READING ──────────► READING
      │ release/expire   │ release        │ expire
      ▼                  ▼                ▼
    RELEASED          RELEASED          EXPIRED

HELD: nothing has been published, so nobody can be reading. READING: the reader may be. A lease keeps its blocks from
being reused; when it expires, they may be, and the reader's generation check tells it so.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable

from ..core.clock import Clock
from ..core.errors import IllegalTransition
from ..core.ids import PeerId, TransferId


class LeaseState(enum.Enum):
    """See the module's diagram."""

    HELD = "held"
    READING = "reading"
    RELEASED = "released"
    EXPIRED = "expired"


class Lease:
    """One transfer's claim on its blocks. Changed by its `LeaseTable` alone."""

    def __init__(self, transfer: TransferId, deadline_s: float) -> None:
        self.transfer = transfer
        self.state = LeaseState.HELD
        self.deadline_s = deadline_s
        self.history: list[str] = [f"held until {deadline_s:.3f}"]


class LeaseTable:
    """All leases of a worker. Owned by one thread; never blocks.

    Args:
        duration_s: from a grant or a renewal to expiry.
        clock: tells the time.
    """

    def __init__(self, duration_s: float, clock: Clock) -> None:
        self.duration_s = duration_s
        self._clock = clock
        self._leases: dict[TransferId, Lease] = {}
        # One entry a lease at least; a renewed lease is pushed again when its old entry surfaces.
        self._heap: list[tuple[float, TransferId]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, transfer: TransferId) -> bool:
        return transfer in self._leases

    def grant(self, transfer: TransferId) -> Lease:
        """Start a lease.

        Raises:
            IllegalTransition: the transfer has one already: ids are never used twice.
        """
        if transfer in self._leases:
            raise IllegalTransition(f"a second lease for {transfer}", history=tuple(self._leases[transfer].history))
        lease = Lease(transfer, self._clock.monotonic_s() + self.duration_s)
        self._leases[transfer] = lease
        heapq.heappush(self._heap, (lease.deadline_s, transfer))
        return lease

    def publish(self, transfer: TransferId) -> None:
        """Its blocks are about to be readable.

        Raises:
            IllegalTransition: there is no such lease.
        """
        lease = self._leases.get(transfer)
        if lease is None:
            raise IllegalTransition(f"publish without a lease: {transfer}")
        if lease.state is LeaseState.HELD:
            self._move(lease, LeaseState.READING)

    def renew(self, transfers: Iterable[TransferId]) -> int:
        """Extend leases to a full duration from now. Unknown ones are ignored: they have ended. Returns how many."""
        deadline_s = self._clock.monotonic_s() + self.duration_s
        renewed = 0
        for transfer in transfers:
            lease = self._leases.get(transfer)
            if lease is not None:
                lease.deadline_s = deadline_s
                renewed += 1
        return renewed

    def release(self, transfer: TransferId) -> bool:
        """End a lease: the reader is done. Returns whether there was one."""
        return self._end(transfer, LeaseState.RELEASED)

    def expire(self) -> list[TransferId]:
        """End the leases whose time is over."""
        now_s = self._clock.monotonic_s()
        expired = []
        while self._heap and self._heap[0][0] <= now_s:
            _, transfer = heapq.heappop(self._heap)
            lease = self._leases.get(transfer)
            if lease is None:
                continue
            if lease.deadline_s > now_s:
                heapq.heappush(self._heap, (lease.deadline_s, transfer))
            else:
                self._end(transfer, LeaseState.EXPIRED)
                expired.append(transfer)
        return expired

    def of_reader(self, reader: PeerId) -> list[TransferId]:
        """The transfers that a peer holds."""
        return [transfer for transfer in self._leases if transfer.reader == reader]

    def next_deadline_s(self) -> float | None:
        """When `expire` has something to look at, on the clock's monotonic scale; None: never."""
        return self._heap[0][0] if self._heap else None

    def _end(self, transfer: TransferId, state: LeaseState) -> bool:
        lease = self._leases.pop(transfer, None)
        if lease is None:
            return False
        self._move(lease, state)
        if len(self._heap) > 2 * len(self._leases) + 64:
            self._heap = [(lease.deadline_s, transfer) for transfer, lease in self._leases.items()]
            heapq.heapify(self._heap)
        return True

    def _move(self, lease: Lease, state: LeaseState) -> None:
        lease.state = state
        lease.history.append(f"{state.value} at {self._clock.monotonic_s():.3f}")
