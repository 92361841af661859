"""Which prompts a prefill step works on: by priority, of one priority first come, first served; in chunks."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator

from ..core.clock import Clock
from ..core.ids import TransferId
from ..core.urgency import before_levels
from ..engine.batch import Work
from ..engine.engine import Engine
from .job import Job, JobState


class PrefillScheduler:
    """The jobs of a worker. Owned by the engine thread; nothing blocks.

    A job takes all the blocks that it will need when it starts, so that a started prompt never waits for another. Of
    KV groups with a window it takes the blocks that its reader will be told of, and those of a window and a chunk,
    which move along with it. Where one of these is not free again, as another job has found it in the prefix cache, the
    job may pause: nothing new starts before it can go on, and the job that started last never pauses.

    Args:
        engine: whose blocks are given out.
        max_batched_tokens: tokens of one step.
        max_running: jobs that have blocks at a time.
        clock: for the jobs' histories.
        fetch: asked before a job starts, matched against the prefix cache: whether tiers have begun to load what it
            lacks. If so it gives its blocks up until `fetched`.
    """

    def __init__(
        self,
        engine: Engine,
        max_batched_tokens: int,
        max_running: int,
        clock: Clock,
        fetch: Callable[[Job], bool] = lambda job: False,
    ) -> None:
        self._engine = engine
        self._max_batched_tokens = max_batched_tokens
        self._max_running = max_running
        self._clock = clock
        self._fetch = fetch
        self._fetching: OrderedDict[TransferId, Job] = OrderedDict()
        self._queued: list[Job] = []
        """By priority."""
        self._running: OrderedDict[TransferId, Job] = OrderedDict()
        self._held: dict[TransferId, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        yield from self._queued
        for jobs in (self._fetching, self._running, self._held):
            yield from jobs.values()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def before_levels(self) -> list[tuple[int, int]]:
        """Jobs that are not computed, and their tokens to compute, before a request of each level of `core.urgency`;
        all of them before the last."""
        return before_levels(
            (job.priority, job.sequence.num_tokens - job.sequence.num_computed)
            for jobs in (self._queued, self._fetching.values(), self._running.values())
            for job in jobs
        )

    def get(self, transfer: TransferId) -> Job | None:
        """The job of a transfer, wherever it stands."""
        for jobs in (self._fetching, self._running, self._held):
            if transfer in jobs:
                return jobs[transfer]
        return next((job for job in self._queued if job.transfer == transfer), None)

    def add(self, job: Job) -> None:
        """Queue a job; before all others of its priority, if it is for an output that has begun: its client waits in
        the middle."""
        begun = job.sequence.num_tokens > job.sequence.num_prompt_tokens
        insort = bisect.insort_left if begun else bisect.insort_right
        insort(self._queued, job, key=_priority)

    def fetched(self, job: Job) -> None:
        """Tiers have given what they had to the prefix cache, or took too long: a job is the first of its priority in
        the queue again."""
        del self._fetching[job.transfer]
        job.move(JobState.QUEUED, self._clock.monotonic_s())
        bisect.insort_left(self._queued, job, key=_priority)

    def admit(self) -> list[Job]:
        """Start queued jobs while there are blocks for them, and they would take part in the next step.

        Not sooner: what a step computes, later jobs with the same prefix find in the cache. They do not wait for less
        urgent ones that have started.

        Returns:
            the jobs started, matched against the prefix cache.
        """
        started: list[Job] = []
        if not all(self._engine.room(job.sequence, 1) for job in self._running.values()):
            return started
        while self._queued and len(self._fetching) + len(self._running) + len(self._held) < self._max_running:
            job = self._queued[0]
            if self._num_tokens_before(job) >= self._max_batched_tokens:
                break
            self._engine.match_prefix(job.sequence)
            if self._fetch(job):
                self._engine.free(job.sequence)
                del self._queued[0]
                job.move(JobState.FETCHING, self._clock.monotonic_s())
                self._fetching[job.transfer] = job
                continue
            if not self._engine.reserve_prompt(job.sequence, announced=True):
                self._engine.free(job.sequence)
                break
            del self._queued[0]
            job.started_s = self._clock.monotonic_s()
            job.move(JobState.RUNNING, job.started_s)
            self._running[job.transfer] = job
            started.append(job)
        return started

    def plan(self) -> list[Work]:
        """The next step: the running jobs' next tokens, by priority, of one priority oldest first, up to the limit."""
        works = []
        room = self._max_batched_tokens
        for job in sorted(self._running.values(), key=_priority):
            if room == 0:
                break
            num_new = min(room, job.sequence.num_tokens - job.sequence.num_computed)
            num_new = self._engine.room(job.sequence, num_new)
            if num_new:
                works.append(Work(job.sequence, num_new))
                room -= num_new
        return works

    def hold(self, job: Job) -> None:
        """A job is computed."""
        del self._running[job.transfer]
        job.move(JobState.HELD, self._clock.monotonic_s())
        self._held[job.transfer] = job
        self._engine.trim(job.sequence)

    def remove(self, job: Job) -> None:
        """A job is over, in whatever state; its blocks are free."""
        if job.state is JobState.QUEUED:
            self._queued.remove(job)
        for jobs in (self._fetching, self._running, self._held):
            jobs.pop(job.transfer, None)
        job.move(JobState.GONE, self._clock.monotonic_s())
        if job.recording is not None:
            job.recording.close()
        self._engine.free(job.sequence)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _num_tokens_before(self, job: Job) -> int:
        """Tokens still to be computed of running jobs that are as urgent as a queued one."""
        before = [other.sequence for other in self._running.values() if other.priority <= job.priority]
        return sum(sequence.num_tokens - sequence.num_computed for sequence in before)


def _priority(job: Job) -> int:
    return job.priority
