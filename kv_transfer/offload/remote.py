"""Other nodes' host tiers, as one tier that owns no memory: what they keep can be loaded, nothing can be stored.

Lookups read a copy of their indexes, which a thread keeps up to date (`remote_reader`); it may lag behind, and then a
load fails. What is removed here is removed there; what is used or pinned is each node's own affair, but for loads,
which count as uses where the blocks are.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence

from ...core.clock import Clock
from .base import Change, JobResult, LoadJob, Lookup, Notify, StoreJob, TierStats
from .forgetting import Forgetting, forgotten
from .jobs import Jobs, OpenJob
from .keys import TierKey
from .network import Network
from .remote_reader import RemoteReader
from .remote_wire import MAX_KEYS
from .replica import look_up


class RemoteTier:
    """See `Tier`.

    Args:
        network: through which other nodes are reached.
        block_bytes: of a block.
        clock: for deadlines.
        timeout_s: after which a job ends with what it has, and a node that does not answer is left alone for a while.
        notify: see `base`.
        name: in logs and metrics.
    """

    shared = True

    def __init__(
        self, network: Network, block_bytes: int, clock: Clock, timeout_s: float, notify: Notify, name: str = "remote"
    ) -> None:
        self.name = name
        self._notify = notify
        self._stats = TierStats()
        self._jobs = Jobs(name, clock, timeout_s, self._stats)
        self._forgettings: list[Forgetting] = []
        self._closed = False
        self._done: queue.SimpleQueue[OpenJob | Forgetting] = queue.SimpleQueue()
        self._reader = RemoteReader(network, block_bytes, clock, timeout_s, self._put_done, self._stats, name)

    @property
    def num_forgetting(self) -> int:
        """Calls of `remove` and `clear` that some node has yet to hear of."""
        return len(self._forgettings)

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        """See `Tier`."""
        answers = look_up(keys, () if self._closed else self._reader.replicas)
        for place in forgotten(self._forgettings, keys):
            answers[place] = Lookup.MISS
        return answers

    def submit_store(self, job: StoreJob) -> int:
        """See `Tier`. It has no room for anything."""
        open_job = self._jobs.open(job)
        self._end(open_job)
        return open_job.number

    def submit_load(self, job: LoadJob) -> int:
        """See `Tier`."""
        open_job = self._jobs.open(job)
        if self._closed or Lookup.HIT not in self.lookup(job.keys):
            self._end(open_job)
        else:
            self._reader.send(open_job)
        return open_job.number

    def poll(self) -> list[JobResult]:
        """See `Tier`."""
        self._take_done()
        for job in self._jobs.late():
            self._end(job)
        return self._jobs.take_ended()

    def touch(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`. What is used here is kept here."""

    def pin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`. Each node pins its own."""

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""

    def remove(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`. Of all nodes that can be reached."""
        for start in range(0, len(keys), MAX_KEYS):
            self._forget(Forgetting(frozenset(keys[start : start + MAX_KEYS]), None))

    def clear(self, tenant: bytes | None = None) -> None:
        """See `Tier`. Of all nodes that can be reached."""
        self._forget(Forgetting(None, tenant))

    def watch(self) -> list[TierKey]:
        """See `Tier`. What other nodes keep, they tell themselves."""
        return []

    def changes(self) -> list[Change]:
        """See `watch`."""
        return []

    def stats(self) -> TierStats:
        """See `Tier`. Slots are those of all other nodes that can be reached."""
        replicas = self._reader.replicas
        self._stats.away = "no other node can be reached" if self._reader.num_hosts and not replicas else ""
        self._stats.num_slots = sum(replica.num_slots for replica in replicas)
        self._stats.num_used = sum(len(replica.slots) for replica in replicas)
        return self._stats

    def next_event_s(self) -> float | None:
        """See `Tier`."""
        return self._jobs.next_deadline_s()

    def close(self) -> None:
        """See `Tier`."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        self._take_done()
        for job in self._jobs.left():
            self._end(job)

    def _end(self, job: OpenJob) -> None:
        self._jobs.end(job)
        if isinstance(job.job, LoadJob):
            self._stats.loaded += sum(job.good)

    def _take_done(self) -> None:
        while not self._done.empty():
            done = self._done.get()
            if isinstance(done, Forgetting):
                self._forgettings.remove(done)
            elif not done.ended:
                self._end(done)

    def _forget(self, forgetting: Forgetting) -> None:
        if not self._closed:
            self._forgettings.append(forgetting)
            self._reader.send(forgetting)

    def _put_done(self, done: OpenJob | Forgetting) -> None:
        self._done.put(done)
        self._notify()
