"""Tiers in order, nearest first: what is stored where, what moves down when it must make room, and where a block comes
from.

A block moves up when it is used: it was loaded, and whoever loaded it stores it again, like one that was computed. It
moves down when the tier above gives it up and the tier below is of the kind that takes such blocks. On the way it lies
in a `Spill`; when that is full, what is given up is lost, and nobody waits. Each block of a load comes from one tier;
if that fails, from the next that has it. Sans-IO; owned by one thread, nothing blocks but `OffloadStack.close`.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...core.kv_messages import KVReport
from ...core.metrics import WorkerMetrics
from .base import BlockMemory, Change, JobResult, LoadJob, Lookup, Spill, Spilled, StoreJob, Tier
from .keys import TierKey, tenant_of
from .published import Published

_REMEMBERED_PER_SLOT = 4
_FEWEST_REMEMBERED = 1024


class Write(enum.Enum):
    """Which blocks a tier takes."""

    THROUGH = "write_through"
    """All that are stored."""
    BACK = "write_back"
    """What the tier above gives up; for the first tier, what the engine's own cache does."""
    SECOND_USE = "second_use"
    """What is stored, or given up by the tier above, for the second time."""


class Level(NamedTuple):
    """A tier and which blocks it takes."""

    tier: Tier
    write: Write | None
    """None: nothing is stored in it, others fill it."""


class Found(NamedTuple):
    """What the stack knows of a key."""

    state: Lookup
    level: int
    """The nearest tier that has it; −1 unless it is a hit."""


_NOWHERE = Found(Lookup.MISS, -1)
_COMING = Found(Lookup.PENDING, -1)


class StackResult(NamedTuple):
    """How a load or a store ended."""

    number: int
    good: tuple[bool, ...]
    """For each key: loaded and checked, or kept by some tier."""
    levels: tuple[int, ...]
    """Of a load: the tier that each block came from, or −1. Empty for a store."""
    error: str = ""


class _Open:
    def __init__(
        self, number: int, keys: Sequence[TierKey], memory: BlockMemory | None, blocks: Sequence[int], load: bool
    ) -> None:
        self.number = number
        self.keys = keys
        self.memory = memory
        self.blocks = blocks
        self.load = load
        self.good = [False] * len(keys)
        self.levels = [-1] * len(keys)
        self.remaining = 0
        self.error = ""


class _Part(NamedTuple):
    """A job of one tier: for a load or store of the stack, or for blocks on their way down."""

    order: int
    job: _Open | None
    places: Sequence[int]
    moving: Sequence[Spilled]


class _Forgotten(NamedTuple):
    """Keys that were removed while parts with an order up to this one were under way."""

    order: int
    keys: frozenset[TierKey] | None
    tenant: bytes | None

    def covers(self, key: TierKey) -> bool:
        if self.keys is not None:
            return key in self.keys
        return self.tenant is None or tenant_of(key) == self.tenant


class OffloadStack:
    """See the module.

    Args:
        levels: nearest first, at least one.
        spill: for blocks that move down, from the engine's cache too; with memory if the tiers have any.
    """

    def __init__(self, levels: Sequence[Level], spill: Spill) -> None:
        self.levels = list(levels)
        self._found = [Found(Lookup.HIT, number) for number in range(len(levels))]
        self.moved_down = 0
        """Blocks that were given to the tier below."""
        self.spill = spill
        self._number = 0
        self._order = 0
        self._parts: list[dict[int, _Part]] = [{} for _ in levels]
        self._ended: list[StackResult] = []
        self._moving: Counter[TierKey] = Counter()
        self._forgotten: list[_Forgotten] = []
        self._seen: list[OrderedDict[TierKey, None]] = [OrderedDict() for _ in levels]
        self._closed = False
        self._lookups = [0] * len(self.levels)
        self._hits = [0] * len(self.levels)
        self._published: list[Published] = []

    def lookup(self, keys: Sequence[TierKey]) -> list[Found]:
        """Where some keys are. Does no I/O; counts as no use."""
        hit, pending = Lookup.HIT, Lookup.PENDING
        found = [_NOWHERE] * len(keys)
        open_: Sequence[int] = range(len(keys))
        asked = keys
        for number, level in enumerate(self.levels):
            rest, here = [], self._found[number]
            for place, state in zip(open_, level.tier.lookup(asked), strict=True):
                if state is hit:
                    found[place] = here
                else:
                    rest.append(place)
                    if state is pending:
                        found[place] = _COMING
            self._lookups[number] += len(asked)
            self._hits[number] += len(asked) - len(rest)
            if not rest:
                return found
            open_, asked = rest, [keys[place] for place in rest]
        if self._moving:
            for place in open_:
                if keys[place] in self._moving:
                    found[place] = _COMING
        return found

    def store(
        self,
        keys: Sequence[TierKey],
        memory: BlockMemory | None,
        blocks: Sequence[int],
        *,
        evicted: bool = False,
        priority: int = 0,
    ) -> int:
        """Keep blocks wherever the tiers take them.

        Args:
            keys: all different, in the order of their prefix.
            memory: where the blocks are.
            blocks: one a key; left as they are until the result is there.
            evicted: the engine gives these up, after having offered them before; else they are new, or were loaded.
            priority: of these blocks, see `policies.Priorities`.

        Returns:
            the number of the result.
        """
        job = self._open(keys, memory, blocks, load=False)
        for number, level in enumerate(self.levels):
            wanted = self._wanted(number, level.write, keys, evicted)
            if not wanted:
                continue
            states = level.tier.lookup([keys[place] for place in wanted])
            if Lookup.MISS in states:
                self._submit_store(number, job, wanted, priority)
                continue
            level.tier.touch([keys[place] for place in wanted])
            for place, state in zip(wanted, states, strict=True):
                job.good[place] |= state is Lookup.HIT
        if not job.remaining:
            self._end(job)
        return job.number

    def load(self, keys: Sequence[TierKey], memory: BlockMemory | None, blocks: Sequence[int]) -> int:
        """Copy blocks from wherever they are nearest. What came from below should then be stored, to move up.

        Args:
            keys: all different, in the order of their prefix.
            memory: where they go.
            blocks: one a key; nobody else touches them until the result is there.

        Returns:
            the number of the result.
        """
        job = self._open(keys, memory, blocks, load=True)
        self._fetch(job, range(len(keys)), 0)
        if not job.remaining:
            self._end(job)
        return job.number

    def poll(self) -> list[StackResult]:
        """Drive all tiers, and return what ended since the last call. Does not block."""
        # All first: what comes down finds the room that the tier below has just got.
        polled = [level.tier.poll() for level in self.levels]
        for number, results in enumerate(polled):
            for result in results:
                self._settle(number, self._parts[number].pop(result.number), result)
        if self._forgotten:
            oldest = min((part.order for parts in self._parts for part in parts.values()), default=self._order + 1)
            self._forgotten = [forgotten for forgotten in self._forgotten if forgotten.order >= oldest]
        ended, self._ended = self._ended, []
        return ended

    def touch(self, keys: Sequence[TierKey]) -> None:
        """Keys were used in the engine's own cache: no tier should forget them first."""
        for level in self.levels:
            level.tier.touch(keys)

    def pin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`; in each tier that has them."""
        for level in self.levels:
            level.tier.pin(keys)

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for level in self.levels:
            level.tier.unpin(keys)

    def remove(self, keys: Sequence[TierKey]) -> None:
        """Forget keys everywhere, also those on their way down."""
        self._forgotten.append(_Forgotten(self._order, frozenset(keys), None))
        for level in self.levels:
            level.tier.remove(keys)

    def clear(self, tenant: bytes | None = None) -> None:
        """Forget everything, or one tenant's keys (`keys.tenant_tag`), everywhere."""
        self._forgotten.append(_Forgotten(self._order, None, tenant))
        for level in self.levels:
            level.tier.clear(tenant)

    def watch(self) -> list[tuple[Tier, list[TierKey]]]:
        """Each tier and the keys that can be found in it now; from now on `changes` are kept."""
        return [(level.tier, level.tier.watch()) for level in self.levels]

    def changes(self) -> list[tuple[Tier, list[Change]]]:
        """Each tier and what has changed in it since the last call."""
        return [(level.tier, level.tier.changes()) for level in self.levels]

    def next_event_s(self) -> float | None:
        """When `poll` has something to do although nobody was notified, on the clock's monotonic scale."""
        times = [at_s for level in self.levels if (at_s := level.tier.next_event_s()) is not None]
        return min(times, default=None)

    def reports(self) -> list[KVReport]:
        """Each tier's figures."""
        block_bytes = self.spill.memory.block_bytes if self.spill.memory is not None else 0
        reports = []
        for number, level in enumerate(self.levels):
            stats = level.tier.stats()
            reports.append(
                KVReport(
                    medium=level.tier.name,
                    num_blocks=stats.num_slots,
                    num_used=stats.num_used,
                    lookups=self._lookups[number],
                    hits=self._hits[number],
                    loaded_bytes=stats.loaded * block_bytes,
                    stored_bytes=stats.stored * block_bytes,
                    load_s=stats.load_s,
                    store_s=stats.store_s,
                    evicted=stats.evicted,
                    oldest_at_s=stats.oldest_at_s,
                    failures=sum(stats.failures.values()),
                    away=stats.away,
                )
            )
        return reports

    def publish(self, metrics: WorkerMetrics) -> None:
        """Bring the tiers' numbers up to date in a worker's metrics, always the same."""
        if not self._published:
            self._published = [Published(level.tier.name, metrics) for level in self.levels]
        for level, published, report in zip(self.levels, self._published, self.reports(), strict=True):
            published.publish(level.tier.stats(), report)

    def close(self) -> None:
        """Close all tiers; a last `poll` tells how jobs in flight ended. Blocks. Idempotent."""
        self._closed = True
        for level in self.levels:
            level.tier.close()

    # ---- stores -----------------------------------------------------------------------------------------------------

    def _wanted(self, number: int, write: Write | None, keys: Sequence[TierKey], evicted: bool) -> list[int]:
        if write is None:
            return []
        if write is Write.BACK:
            return list(range(len(keys))) if evicted and number == 0 else []
        if write is Write.SECOND_USE:
            # What the engine gives up it has offered before: that is no second use.
            return [] if evicted else [place for place, key in enumerate(keys) if self._seen_before(number, key)]
        return list(range(len(keys)))

    def _seen_before(self, number: int, key: TierKey) -> bool:
        seen = self._seen[number]
        if key in seen:
            seen.move_to_end(key)
            return True
        seen[key] = None
        if len(seen) > max(_FEWEST_REMEMBERED, _REMEMBERED_PER_SLOT * self.levels[number].tier.stats().num_slots):
            seen.popitem(last=False)
        return False

    def _submit_store(self, number: int, job: _Open, places: Sequence[int], priority: int) -> None:
        keys, blocks = [job.keys[place] for place in places], [job.blocks[place] for place in places]
        part = self.levels[number].tier.submit_store(
            StoreJob(keys, job.memory, blocks, priority, self._spill_below(number))
        )
        self._add(number, part, job, places, ())

    def _below(self, number: int) -> int | None:
        """The next tier that anything is stored in."""
        below = range(number + 1, len(self.levels))
        return next((level for level in below if self.levels[level].write is not None), None)

    def _spill_below(self, number: int) -> Spill | None:
        below = self._below(number)
        return None if below is None or self.levels[below].write is Write.THROUGH else self.spill

    def _move_down(self, number: int, order: int, spilled: Iterable[Spilled]) -> None:
        """Give what a tier pushed out to this one."""
        level = self.levels[number]
        moving = []
        for block in spilled:
            unwanted = (
                self._closed
                or any(order <= forgotten.order and forgotten.covers(block.key) for forgotten in self._forgotten)
                or level.tier.lookup([block.key])[0] is not Lookup.MISS
                or (level.write is Write.SECOND_USE and not self._seen_before(number, block.key))
            )
            if unwanted:
                self.spill.give(block.place)
            else:
                moving.append(block)
        if moving:
            keys, places = [block.key for block in moving], [block.place for block in moving]
            self._moving.update(keys)
            job = StoreJob(keys, self.spill.memory, places, 0, self._spill_below(number))
            self._add(number, level.tier.submit_store(job), None, (), moving)
            self.moved_down += len(moving)

    # ---- loads ------------------------------------------------------------------------------------------------------

    def _fetch(self, job: _Open, places: Iterable[int], first: int) -> None:
        """Ask, for each of these blocks, the nearest tier from ``first`` on that has it."""
        open_ = list(places)
        for number in range(first, len(self.levels)):
            tier = self.levels[number].tier
            states = tier.lookup([job.keys[place] for place in open_])
            hits = [place for place, state in zip(open_, states, strict=True) if state is Lookup.HIT]
            open_ = [place for place, state in zip(open_, states, strict=True) if state is not Lookup.HIT]
            if hits:
                keys, blocks = [job.keys[place] for place in hits], [job.blocks[place] for place in hits]
                self._add(number, tier.submit_load(LoadJob(keys, job.memory, blocks)), job, hits, ())
                for below in self.levels[number + 1 :]:
                    below.tier.touch(keys)
            if not open_:
                break

    # ---- both -------------------------------------------------------------------------------------------------------

    def _open(self, keys: Sequence[TierKey], memory: BlockMemory | None, blocks: Sequence[int], *, load: bool) -> _Open:
        self._number += 1
        return _Open(self._number, keys, memory, blocks, load)

    def _add(self, number: int, part: int, job: _Open | None, places: Sequence[int], moving: Sequence[Spilled]) -> None:
        self._order += 1
        self._parts[number][part] = _Part(self._order, job, places, moving)
        if job is not None:
            job.remaining += 1

    def _settle(self, number: int, part: _Part, result: JobResult) -> None:
        for block in part.moving:
            self.spill.give(block.place)
            self._moving[block.key] -= 1
            if not self._moving[block.key]:
                del self._moving[block.key]
        below = self._below(number)
        if result.spilled and below is not None:
            self._move_down(below, part.order, result.spilled)
        job = part.job
        if job is None:
            return
        job.remaining -= 1
        job.error = job.error or result.error
        failed = []
        for place, good in zip(part.places, result.good, strict=True):
            job.good[place] |= good
            if good:
                job.levels[place] = number
            else:
                failed.append(place)
        if job.load and failed and not self._closed:
            self._fetch(job, failed, number + 1)
        if not job.remaining:
            self._end(job)

    def _end(self, job: _Open) -> None:
        levels = tuple(job.levels) if job.load else ()
        error = "" if all(job.good) else job.error
        self._ended.append(StackResult(job.number, tuple(job.good), levels, error))
