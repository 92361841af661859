"""The jobs of a tier that have not ended: numbers, deadlines, and results that wait for `Tier.poll`."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ...core.clock import Clock
from .base import JobResult, LoadJob, Spilled, StoreJob, TierStats


class OpenJob:
    """A job whose result has not been told."""

    def __init__(self, number: int, job: StoreJob | LoadJob | None, num_keys: int, deadline_s: float) -> None:
        self.number = number
        self.job = job
        self.deadline_s = deadline_s
        self.good = [False] * num_keys
        self.remaining = 0
        self.error = ""
        self.spilled: list[Spilled] = []
        self.held = [-1] * num_keys
        """For each key the slot that is released with the job's end, its item being done; or −1."""
        self.lock = threading.Lock()
        """Held while a thread touches the caller's blocks, and while ``ended`` is set."""
        self.ended = False
        """Its caller has been told: nobody may touch the caller's blocks any more."""
        self._num_unfinished = num_keys

    def expect(self, num_items: int) -> None:
        """It is made of so many items."""
        self.remaining = self._num_unfinished = num_items

    def finish(self, num_items: int) -> bool:
        """Some items have been carried out; whether the last was among them. Thread-safe."""
        with self.lock:
            self._num_unfinished -= num_items
            return self._num_unfinished == 0


class Jobs:
    """See the module. Owned by the tier's thread; of an `OpenJob`, others use what says so.

    Args:
        name: the tier's, for what is told of a job that went wrong.
        clock: for deadlines.
        timeout_s: of a job.
        stats: the tier's; how long jobs are under way, and blocks that came too late, are counted here.
    """

    def __init__(self, name: str, clock: Clock, timeout_s: float, stats: TierStats) -> None:
        self._name = name
        self._clock = clock
        self._timeout_s = timeout_s
        self._stats = stats
        self._open: dict[int, OpenJob] = {}
        self._ended: list[JobResult] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, job: StoreJob | LoadJob) -> OpenJob:
        """A new job, with a number and a deadline."""
        self._number += 1
        now_s = self._clock.monotonic_s()
        open_job = self._open[self._number] = OpenJob(self._number, job, len(job.keys), now_s + self._timeout_s)
        self._stats.job_began(job, now_s)
        return open_job

    def end(self, job: OpenJob) -> None:
        """Nobody touches the caller's blocks any more, and the result is as the job says now. Waits for a copy."""
        with job.lock:
            job.ended = True
        del self._open[job.number]
        if job.job is not None:
            self._stats.job_ended(job.job, self._clock.monotonic_s())
        self._ended.append(JobResult(job.number, tuple(job.good), job.error, tuple(job.spilled)))

    def late(self) -> Sequence[OpenJob]:
        """Jobs whose time is over, and which say so now; to be ended."""
        now_s = self._clock.monotonic_s()
        # All have as long: the oldest is the first to be late.
        late = []
        for job in self._open.values():
            if job.deadline_s > now_s:
                break
            job.error = f"{self._name} took longer than {self._timeout_s:g} s"
            self._stats.failures["slow"] += len(job.good) - sum(job.good)
            late.append(job)
        return late

    def left(self) -> Sequence[OpenJob]:
        """All jobs of a tier that is closed, which say so now; to be ended."""
        for job in self._open.values():
            job.error = job.error or f"{self._name} is closed"
        return list(self._open.values())

    def next_deadline_s(self) -> float | None:
        """When `late` has something to tell, on the monotonic clock; None: there are no jobs."""
        return next((job.deadline_s for job in self._open.values()), None)

    def take_ended(self) -> list[JobResult]:
        """Results since the last call."""
        ended, self._ended = self._ended, []
        return ended
