"""Which prompts a prefill step works on: first come, first served, in chunks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from ..core.clock import Clock
from ..core.ids import TransferId
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
        self._queued: OrderedDict[TransferId, Job] = OrderedDict()
        self._running: OrderedDict[TransferId, Job] = OrderedDict()
        self._held: dict[TransferId, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        for jobs in (self._fetching, self._queued, self._running, self._held):
            yield from jobs.values()

    @property
    def num_queued(self) -> int:
        return len(self._queued) + len(self._fetching)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait to be computed, those of running jobs included."""
        return sum(
            job.sequence.num_tokens - job.sequence.num_computed
            for jobs in (self._queued, self._fetching, self._running)
            for job in jobs.values()
        )

    def get(self, transfer: TransferId) -> Job | None:
        """The job of a transfer, wherever it stands."""
        places = (self._queued, self._fetching, self._running, self._held)
        return next((jobs[transfer] for jobs in places if transfer in jobs), None)

    def add(self, job: Job) -> None:
        """Queue a job; before all others, if it is for an output that has begun: its client waits in the middle."""
        self._queued[job.transfer] = job
        if job.sequence.num_tokens > job.sequence.num_prompt_tokens:
            self._queued.move_to_end(job.transfer, last=False)

    def fetched(self, job: Job) -> None:
        """Tiers have given what they had to the prefix cache, or took too long: a job is the first in the queue
        again."""
        del self._fetching[job.transfer]
        job.move(JobState.QUEUED, self._clock.monotonic_s())
        self._queued[job.transfer] = job
        self._queued.move_to_end(job.transfer, last=False)

    def admit(self) -> list[Job]:
        """Start queued jobs while there are blocks for them, and they would take part in the next step.

        Not sooner: what a step computes, later jobs with the same prefix find in the cache.

        Returns:
            the jobs started, matched against the prefix cache.
        """
        started: list[Job] = []
        if not all(self._engine.room(job.sequence, 1) for job in self._running.values()):
            return started
        tokens = sum(job.sequence.num_tokens - job.sequence.num_computed for job in self._running.values())
        while (
            self._queued
            and tokens < self._max_batched_tokens
            and len(self._fetching) + len(self._running) + len(self._held) < self._max_running
        ):
            transfer, job = next(iter(self._queued.items()))
            self._engine.match_prefix(job.sequence)
            if self._fetch(job):
                self._engine.free(job.sequence)
                del self._queued[transfer]
                job.move(JobState.FETCHING, self._clock.monotonic_s())
                self._fetching[transfer] = job
                continue
            if not self._engine.reserve_prompt(job.sequence, announced=True):
                self._engine.free(job.sequence)
                break
            del self._queued[transfer]
            job.started_s = self._clock.monotonic_s()
            job.move(JobState.RUNNING, job.started_s)
            self._running[transfer] = job
            tokens += job.sequence.num_tokens - job.sequence.num_computed
            started.append(job)
        return started

    def plan(self) -> list[Work]:
        """The next step: the running jobs' next tokens, oldest first, up to the limit."""
        works = []
        room = self._max_batched_tokens
        for job in self._running.values():
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
        for jobs in (self._queued, self._fetching, self._running, self._held):
            jobs.pop(job.transfer, None)
        job.move(JobState.GONE, self._clock.monotonic_s())
        if job.recording is not None:
            job.recording.close()
        self._engine.free(job.sequence)
