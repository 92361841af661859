"""A tier whose index lives in this process: what disk, objects and simulations share. Everything but the bytes.

A job becomes one item for each slot that it needs; a subclass carries items out, in any order, and hands them back. A
job ends with its last item, or at its deadline: items that are late are settled in the index when they do come back.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterable, Sequence

from ...core.clock import Clock
from ...core.log import RateLimited, logger
from .base import Change, JobResult, LoadJob, Lookup, Spilled, StoreJob, TierStats
from .index import Evicted, TierIndex
from .jobs import Jobs, OpenJob
from .keys import TierKey

FIRST_AWAY_S = 1.0
LONGEST_AWAY_S = 30.0
_WARN_PERIOD_S = 300.0


class Kind(enum.Enum):
    """What is to be done with a slot."""

    LOAD = "load"
    STORE = "store"
    ERASE = "erase"
    RECOVER = "recover"


# Of each block: a member of an enumeration takes Python 3.11 as long to find as a short function to call.
_LOAD, _STORE, _ERASE, _MISS = Kind.LOAD, Kind.STORE, Kind.ERASE, Lookup.MISS


class Item:
    """One slot's part of a job."""

    evicted: Evicted | None = None
    place: int | None = None
    """Of the spill, for what was evicted."""
    saved = False
    """Whether the evicted block is in its place."""
    error = ""
    """A cause in a word or two, for the metric."""
    detail = ""
    harmless = False
    """Whether ``error`` says something of this block alone, and nothing of the tier."""

    def __init__(self, job: OpenJob, kind: Kind, position: int, key: TierKey, slot: int, generation: int) -> None:
        self.job = job
        self.kind = kind
        self.position = position
        self.key = key
        self.slot = slot
        self.generation = generation


class IndexedTier(abc.ABC):
    """See `Tier`.

    Args:
        name: in logs and metrics.
        index: where everything is.
        clock: for deadlines.
        timeout_s: after which a job ends with what it has, and the tier counts as slow.
    """

    shared = False

    def __init__(self, name: str, index: TierIndex, clock: Clock, timeout_s: float) -> None:
        self.name = name
        self._index = index
        self._clock = clock
        self._timeout_s = timeout_s
        self._stats = TierStats()
        self._stats.num_slots = index.num_slots
        self._jobs = Jobs(name, clock, timeout_s, self._stats)
        self._away_until_s = 0.0
        self._away_for_s = 0.0
        self._retry_s: float | None = None
        """When `poll` finds the tier no longer away, or tries it again."""
        self._log = RateLimited(_WARN_PERIOD_S)

    @property
    def away(self) -> bool:
        """Whether it answers nothing at present."""
        return self._backing_off

    @property
    def _backing_off(self) -> bool:
        return self._clock.monotonic_s() < self._away_until_s

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        """See `Tier`."""
        return [Lookup.MISS] * len(keys) if self.away else self._index.lookup(keys)

    def submit_store(self, job: StoreJob) -> int:
        """See `Tier`."""
        open_job = self._jobs.open(job)
        if self.away:
            return self._refuse(open_job)
        index, stats, items = self._index, self._stats, []
        states = index.lookup(job.keys)
        unknown = [position for position, state in enumerate(states) if state is _MISS]
        if len(unknown) < len(states):
            index.touch(job.keys)
            # What is there of a prefix must not go for what continues it.
            for position, key in enumerate(job.keys):
                held = index.hold(key)
                if held is not None:
                    open_job.good[position] = True
                    open_job.held[position] = held[0]
        for position in unknown:
            key = job.keys[position]
            reservation = index.reserve(key, job.priority)
            if reservation is None:
                stats.refused += 1
                continue
            slot, generation, evicted = reservation
            item = Item(open_job, _STORE, position, key, slot, generation)
            if evicted is not None:
                item.evicted = evicted
                stats.evicted += 1
                if job.spill is not None:
                    item.place = job.spill.take()
            items.append(item)
        self._begin(open_job, items)
        return open_job.number

    def submit_load(self, job: LoadJob) -> int:
        """See `Tier`."""
        open_job = self._jobs.open(job)
        if self.away:
            return self._refuse(open_job)
        items = []
        self._index.touch(job.keys)
        for position, key in enumerate(job.keys):
            held = self._index.hold(key)
            if held is not None:
                items.append(Item(open_job, _LOAD, position, key, *held))
        self._begin(open_job, items)
        return open_job.number

    def poll(self) -> list[JobResult]:
        """See `Tier`."""
        for item in self._finished():
            self._settle(item)
        late = self._jobs.late()
        for job in late:
            self._end(job)
        # Loads go first: one that is late has not merely waited for its turn.
        if any(isinstance(job.job, LoadJob) for job in late):
            self._go_away("slow", f"a load took longer than {self._timeout_s:g} s")
        if self._retry_s is not None and not self._backing_off:
            self._retry_s = None
        return self._jobs.take_ended()

    def touch(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        self._index.touch(keys)

    def pin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        self._index.pin(keys)

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        self._index.unpin(keys)

    def remove(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        erasing = OpenJob(0, None, 0, 0.0)
        items = []
        for key in keys:
            held = self._index.hold(key)
            if held is not None:
                items.append(Item(erasing, Kind.ERASE, 0, key, *held))
            self._index.remove(key)
        self._start(items)

    def clear(self, tenant: bytes | None = None) -> None:
        """See `Tier`."""
        self.remove(self._index.keys_of(tenant))

    def watch(self) -> list[TierKey]:
        """See `Tier`."""
        self._index.journal = []
        return self._index.stored_keys()

    def changes(self) -> list[Change]:
        """See `Tier`."""
        if not self._index.journal:
            return []
        changes, self._index.journal = self._index.journal, []
        return changes

    def stats(self) -> TierStats:
        """See `Tier`."""
        self._stats.num_used = self._index.num_used
        self._stats.oldest_at_s = self._index.oldest_at_s()
        if not self.away:
            self._stats.away = ""
        return self._stats

    def next_event_s(self) -> float | None:
        """See `Tier`."""
        times = (self._jobs.next_deadline_s(), self._retry_s)
        return min((at_s for at_s in times if at_s is not None), default=None)

    def close(self) -> None:
        """See `Tier`."""
        self._stop()
        for item in self._finished():
            self._settle(item)
        for job in self._jobs.left():
            self._end(job)
        self._away_until_s, self._retry_s = float("inf"), None

    @abc.abstractmethod
    def _start(self, items: Sequence[Item]) -> None:
        """Take items on, in their order. Does not block."""

    @abc.abstractmethod
    def _finished(self) -> Iterable[Item]:
        """Items that are done, since the last call. Does not block."""

    @abc.abstractmethod
    def _stop(self) -> None:
        """Finish or drop all items, and start no more. Idempotent."""

    def _refuse(self, job: OpenJob) -> int:
        job.error = f"{self.name} is away"
        self._end(job)
        return job.number

    def _begin(self, job: OpenJob, items: Sequence[Item]) -> None:
        job.expect(len(items))
        if items:
            self._start(items)
        else:
            self._end(job)

    def _settle(self, item: Item) -> None:
        job, kind, good = item.job, item.kind, not item.error
        if kind is _STORE:
            if not good:
                self._index.abort(item.slot)
            elif self._index.commit(item.slot, self._clock.wall_s()):
                self._let_go(item)
                self._stats.stored += 1
            else:
                # It was removed while it was written.
                self._start([Item(job, Kind.ERASE, 0, item.key, item.slot, item.generation)])
            if item.place is not None:
                self._settle_spill(item)
        else:
            self._let_go(item)
            if good:
                self._stats.loaded += kind is _LOAD
            elif item.harmless and self._index.generation_of(item.key) == item.generation:
                self._index.remove(item.key)
        if not good:
            self._fail(item)
        elif self._away_for_s:
            self._came_back()
        if not job.ended and kind is not _ERASE:
            job.good[item.position] = good
            job.error = job.error or item.detail
            job.remaining -= 1
            if job.remaining == 0:
                self._end(job)

    def _let_go(self, item: Item) -> None:
        """Release a slot; those of one job together, the first key last, in whatever order they were done."""
        if item.job.ended or item.kind is _ERASE:
            self._index.release(item.slot)
        else:
            item.job.held[item.position] = item.slot

    def _settle_spill(self, item: Item) -> None:
        if item.place is None or item.evicted is None:
            return
        if item.saved and not item.job.ended:
            item.job.spilled.append(Spilled(item.evicted.key, item.place))
        elif isinstance(item.job.job, StoreJob) and item.job.job.spill is not None:
            item.job.job.spill.give(item.place)

    def _end(self, job: OpenJob) -> None:
        self._jobs.end(job)
        for slot in reversed(job.held):
            if slot >= 0:
                self._index.release(slot)

    def _fail(self, item: Item) -> None:
        if item.error == "dropped":
            return
        if not item.job.ended:
            self._stats.failures[item.error] += 1
        if item.harmless:
            self._log.warning(item.error, "%s: %s; the block counts as missing", self.name, item.detail)
        else:
            self._go_away(item.error, item.detail)

    def _go_away(self, cause: str, detail: str) -> None:
        if self._backing_off:
            return
        self._away_for_s = min(2 * self._away_for_s, LONGEST_AWAY_S) if self._away_for_s else FIRST_AWAY_S
        self._away_until_s = self._retry_s = self._clock.monotonic_s() + self._away_for_s
        self._stats.away = cause
        self._log.warning(cause, "%s: %s; it is tried again, and its blocks count as missing", self.name, detail)

    def _came_back(self) -> None:
        if not self._backing_off:
            self._away_for_s = 0.0
            logger.info("%s works again", self.name)
