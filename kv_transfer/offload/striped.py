"""Several tiers as one: each key has one that it belongs to, chosen by its hash, and each does without the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .base import Change, JobResult, LoadJob, Lookup, Spilled, StoreJob, Tier, TierStats
from .keys import TierKey

_STATES = ("num_slots", "num_used", "stored", "loaded", "evicted", "refused")


class _Open:
    def __init__(self, num_keys: int) -> None:
        self.good = [False] * num_keys
        self.remaining = 0
        self.error = ""
        self.spilled: list[Spilled] = []


class StripedTier:
    """See `Tier`.

    Args:
        name: in logs and metrics.
        tiers: of equal size, always in this order.
    """

    shared = False

    def __init__(self, name: str, tiers: Sequence[Tier]) -> None:
        self.name = name
        self._tiers = list(tiers)
        self._jobs: dict[int, _Open] = {}
        self._parts: dict[tuple[int, int], tuple[int, list[int]]] = {}
        self._empty: list[JobResult] = []
        self._number = 0

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        """See `Tier`."""
        answers = [Lookup.MISS] * len(keys)
        for stripe, places in self._split(keys):
            part = self._tiers[stripe].lookup([keys[place] for place in places])
            for place, answer in zip(places, part, strict=True):
                answers[place] = answer
        return answers

    def submit_store(self, job: StoreJob) -> int:
        """See `Tier`."""
        return self._submit(
            job.keys,
            lambda tier, places: tier.submit_store(
                job._replace(keys=[job.keys[p] for p in places], blocks=[job.blocks[p] for p in places])
            ),
        )

    def submit_load(self, job: LoadJob) -> int:
        """See `Tier`."""
        return self._submit(
            job.keys,
            lambda tier, places: tier.submit_load(
                job._replace(keys=[job.keys[p] for p in places], blocks=[job.blocks[p] for p in places])
            ),
        )

    def poll(self) -> list[JobResult]:
        """See `Tier`."""
        results, self._empty = self._empty, []
        for stripe, tier in enumerate(self._tiers):
            for part in tier.poll():
                number, places = self._parts.pop((stripe, part.number))
                job = self._jobs[number]
                for place, good in zip(places, part.good, strict=True):
                    job.good[place] = good
                job.error = job.error or part.error
                job.spilled.extend(part.spilled)
                job.remaining -= 1
                if job.remaining == 0:
                    del self._jobs[number]
                    results.append(JobResult(number, tuple(job.good), job.error, tuple(job.spilled)))
        return results

    def touch(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for stripe, places in self._split(keys):
            self._tiers[stripe].touch([keys[place] for place in places])

    def pin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for stripe, places in self._split(keys):
            self._tiers[stripe].pin([keys[place] for place in places])

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for stripe, places in self._split(keys):
            self._tiers[stripe].unpin([keys[place] for place in places])

    def remove(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for stripe, places in self._split(keys):
            self._tiers[stripe].remove([keys[place] for place in places])

    def clear(self, tenant: bytes | None = None) -> None:
        """See `Tier`."""
        for tier in self._tiers:
            tier.clear(tenant)

    def watch(self) -> list[TierKey]:
        """See `Tier`."""
        return [key for tier in self._tiers for key in tier.watch()]

    def changes(self) -> list[Change]:
        """See `Tier`."""
        return [change for tier in self._tiers for change in tier.changes()]

    def stats(self) -> TierStats:
        """See `Tier`; a new object each time."""
        total = TierStats()
        for tier in self._tiers:
            part = tier.stats()
            for name in _STATES:
                setattr(total, name, getattr(total, name) + getattr(part, name))
            # Stripes work side by side.
            total.load_s, total.store_s = max(total.load_s, part.load_s), max(total.store_s, part.store_s)
            total.oldest_at_s = min(total.oldest_at_s or math.inf, part.oldest_at_s or math.inf)
            total.failures += part.failures
            total.away = total.away or part.away
        total.oldest_at_s = total.oldest_at_s if math.isfinite(total.oldest_at_s) else 0.0
        return total

    def next_event_s(self) -> float | None:
        """See `Tier`."""
        return min((at_s for tier in self._tiers if (at_s := tier.next_event_s()) is not None), default=None)

    def close(self) -> None:
        """See `Tier`."""
        for tier in self._tiers:
            tier.close()

    def _split(self, keys: Sequence[TierKey]) -> Iterable[tuple[int, list[int]]]:
        places: dict[int, list[int]] = {}
        for place, key in enumerate(keys):
            # Not the bytes that the sketch of a policy hashes by.
            places.setdefault(int.from_bytes(key[14:16], "little") % len(self._tiers), []).append(place)
        return places.items()

    def _submit(self, keys: Sequence[TierKey], submit: Callable[[Tier, list[int]], int]) -> int:
        self._number += 1
        job = _Open(len(keys))
        for stripe, places in self._split(keys):
            job.remaining += 1
            self._parts[stripe, submit(self._tiers[stripe], places)] = self._number, places
        if job.remaining:
            self._jobs[self._number] = job
        else:
            self._empty.append(JobResult(self._number, ()))
        return self._number
