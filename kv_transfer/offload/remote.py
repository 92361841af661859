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
from .indexed import OpenJob
from .keys import TierKey, tenant_of
from .network import Network
from .remote_reader import Forgetting, RemoteReader
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
        self._clock = clock
        self._timeout_s = timeout_s
        self._notify = notify
        self._stats = TierStats()
        self._jobs: dict[int, OpenJob] = {}
        self._ended: list[JobResult] = []
        self._number = 0
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
        for forgetting in self._forgettings:
            for place, key in enumerate(keys):
                if _covers(forgetting, key):
                    answers[place] = Lookup.MISS
        return answers

    def submit_store(self, job: StoreJob) -> int:
        """See `Tier`. It has no room for anything."""
        open_job = self._open(job, len(job.keys))
        self._end(open_job)
        return open_job.number

    def submit_load(self, job: LoadJob) -> int:
        """See `Tier`."""
        open_job = self._open(job, len(job.keys))
        if self._closed or Lookup.HIT not in self.lookup(job.keys):
            self._end(open_job)
        else:
            self._reader.send(open_job)
        return open_job.number

    def poll(self) -> list[JobResult]:
        """See `Tier`."""
        self._take_done()
        now_s = self._clock.monotonic_s()
        for job in [job for job in self._jobs.values() if job.deadline_s <= now_s]:
            job.error = f"{self.name} took longer than {self._timeout_s:g} s"
            self._stats.failures["slow"] += len(job.good) - sum(job.good)
            self._end(job)
        ended, self._ended = self._ended, []
        return ended

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
        return min((job.deadline_s for job in self._jobs.values()), default=None)

    def close(self) -> None:
        """See `Tier`."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        self._take_done()
        for job in list(self._jobs.values()):
            job.error = f"{self.name} is closed"
            self._end(job)

    def _open(self, job: StoreJob | LoadJob, num_keys: int) -> OpenJob:
        self._number += 1
        open_job = OpenJob(self._number, job, num_keys, self._clock.monotonic_s() + self._timeout_s)
        self._jobs[self._number] = open_job
        self._stats.job_began(job, self._clock.monotonic_s())
        return open_job

    def _end(self, job: OpenJob) -> None:
        with job.lock:
            job.ended = True
        del self._jobs[job.number]
        if job.job is not None:
            self._stats.job_ended(job.job, self._clock.monotonic_s())
        if isinstance(job.job, LoadJob):
            self._stats.loaded += sum(job.good)
        self._ended.append(JobResult(job.number, tuple(job.good), job.error))

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


def _covers(forgetting: Forgetting, key: TierKey) -> bool:
    if forgetting.keys is not None:
        return key in forgetting.keys
    return forgetting.tenant is None or tenant_of(key) == forgetting.tenant
