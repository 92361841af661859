"""A tier whose jobs take simulated time: the same index, policies and job rules as those of real tiers.

For comparing configurations on a recorded load, nothing is copied (``memory`` of a job is None). With memory it keeps
the blocks, so that tests can check what comes back.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...core.clock import Clock
from .base import LoadJob, StoreJob
from .index import TierIndex
from .indexed import IndexedTier, Item, Kind
from .policies import make_policy

_LANES = (Kind.LOAD, Kind.STORE, Kind.ERASE)


class Cost(NamedTuple):
    """How long a tier takes for a block: it waits for those before it, is moved, and arrives after the latency."""

    latency_s: float
    load_bytes_per_s: float
    store_bytes_per_s: float

    def seconds(self, kind: Kind, block_bytes: int) -> float:
        """For which the tier is busy with one block."""
        if kind is Kind.ERASE:
            return 0.0
        return block_bytes / (self.load_bytes_per_s if kind is Kind.LOAD else self.store_bytes_per_s)


class SimulatedTier(IndexedTier):
    """See `Tier`. Jobs end when the clock has reached their time and `poll` is called; `next_event_s` tells when.

    Args:
        name: of the tier.
        num_slots: blocks that it has room for.
        block_bytes: of each.
        policy: one of `policies.POLICIES`.
        cost: what a block costs.
        clock: simulated, as a rule a `ManualClock`.
        timeout_s: as of a real tier.
    """

    def __init__(
        self,
        name: str,
        num_slots: int,
        block_bytes: int,
        policy: str,
        cost: Cost,
        clock: Clock,
        timeout_s: float = math.inf,
    ) -> None:
        super().__init__(name, TierIndex(num_slots, make_policy(policy, num_slots)), clock, timeout_s)
        self._block_bytes = block_bytes
        self._cost = cost
        # Loads and stores have a lane each: real tiers serve loads first.
        self._lanes: dict[Kind, deque[tuple[float, Item]]] = {kind: deque() for kind in _LANES}
        self._busy_until_s = dict.fromkeys(_LANES, 0.0)
        self._under_way: list[tuple[float, int, Item]] = []
        self._started = 0
        self._content: dict[int, np.ndarray] = {}

    def next_event_s(self) -> float | None:
        """See `Tier`."""
        # What waits for a lane arrives after what is in it, and `_go_on` starts it as of when the lane was free.
        times = [self._under_way[0][0]] if self._under_way else []
        deadline_s = self._jobs.next_deadline_s()
        if deadline_s is not None and deadline_s != math.inf:
            times.append(deadline_s)
        if self._retry_s is not None:
            times.append(self._retry_s)
        return min(times, default=None)

    def _start(self, items: Sequence[Item]) -> None:
        now_s = self._clock.monotonic_s()
        for item in items:
            self._lanes[item.kind].append((now_s, item))
        self._go_on()

    def _go_on(self) -> None:
        """Start what has its turn. Of a job that has ended meanwhile, nothing is moved any more."""
        now_s = self._clock.monotonic_s()
        for kind, lane in self._lanes.items():
            while lane and self._busy_until_s[kind] <= now_s:
                submitted_s, item = lane.popleft()
                end_s = max(submitted_s, self._busy_until_s[kind])
                latency_s = 0.0
                if not item.job.ended:
                    end_s += self._cost.seconds(kind, self._block_bytes)
                    latency_s = self._cost.latency_s
                self._busy_until_s[kind] = end_s
                self._started += 1
                heapq.heappush(self._under_way, (end_s + latency_s, self._started, item))

    def _finished(self) -> Iterable[Item]:
        self._go_on()
        now_s = self._clock.monotonic_s()
        items = []
        while self._under_way and self._under_way[0][0] <= now_s:
            item = heapq.heappop(self._under_way)[2]
            self._carry_out(item)
            items.append(item)
        return items

    def _stop(self) -> None:
        items = [item for _, _, item in self._under_way]
        for lane in self._lanes.values():
            items += [item for _, item in lane]
            lane.clear()
        for item in items:
            item.error = "dropped"
        self._under_way = [(-math.inf, number, item) for number, item in enumerate(items)]

    def _carry_out(self, item: Item) -> None:
        job = item.job.job
        if item.kind is Kind.ERASE:
            self._content.pop(item.slot, None)
        elif item.job.ended or item.error:
            item.error = "dropped"
        elif isinstance(job, LoadJob) and job.memory is not None:
            job.memory.write([job.blocks[item.position]], [self._content[item.slot]])
        elif isinstance(job, StoreJob):
            self._store(item, job)

    def _store(self, item: Item, job: StoreJob) -> None:
        if item.place is not None and job.spill is not None:
            if job.spill.memory is not None:
                job.spill.memory.write([item.place], [self._content[item.slot]])
            item.saved = True
        if job.memory is not None:
            content = np.empty(self._block_bytes, np.uint8)
            job.memory.read([job.blocks[item.position]], [content])
            self._content[item.slot] = content
