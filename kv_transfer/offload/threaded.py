"""A tier that does its I/O on a few threads, each with buffers of its own.

All bytes go through the buffers. So a caller's blocks are touched only while its job is open, under a lock, never by a
read or a write that hangs in the system: a job can end in time although its I/O does not.

A thread takes as many slots of a job at a time as its buffers have room for: Python's part is then of a batch, not of a
block.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ...core.clock import Clock
from .base import BlockMemory, JobResult, LoadJob, Notify, SomeRows, StoreJob
from .index import TierIndex
from .indexed import IndexedTier, Item, Kind
from .jobs import OpenJob
from .keys import TierKey

_STOP_S = 10.0
_BATCHED = (Kind.LOAD, Kind.STORE)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BadBlock(Exception):
    """What a slot holds is not what was stored. ``args``: a cause in a word, and a sentence."""


class Lost(OSError):
    """The place where the blocks were is gone, with all of them."""


class Frames:
    """A thread's memory for some blocks and what is written with them.

    Args:
        whole: [blocks, n] uint8.
        first: where in a row a block's payload begins.
        block_bytes: of a payload.
    """

    def __init__(self, whole: np.ndarray, first: int, block_bytes: int) -> None:
        self.whole = whole
        self._payloads = whole[:, first : first + block_bytes]
        self._rows = np.arange(len(whole))

    def __len__(self) -> int:
        return len(self.whole)

    def payloads(self, places: Sequence[int] | range) -> SomeRows:
        """Some blocks' payloads: [block_bytes] uint8 each, parts of ``whole``."""
        if isinstance(places, range):
            return SomeRows(self._payloads, self._rows[places.start : places.stop])
        return SomeRows(self._payloads, self._rows[places])


class Record(NamedTuple):
    """What a slot holds, or is to hold."""

    slot: int
    key: TierKey
    generation: int


Outcome = BadBlock | OSError | None
"""Why a block was not read or written; None: it was."""


def outcome_of(move: Callable[[Record, np.ndarray], None], record: Record, whole: np.ndarray) -> Outcome:
    """How it went to read or write one record, of what raises where it went wrong."""
    try:
        move(record, whole)
    except (BadBlock, OSError) as error:
        return error
    return None


class BlockIO(Protocol):
    """Reads and writes slots. Called by several threads at a time, never two for one slot."""

    def frames(self) -> Frames:
        """Memory for one thread, which gives it to `write` and `read`: for as many blocks as it takes at a time."""
        ...

    def write(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """Write blocks, the first from the first frame, and so on. Blocks.

        Returns:
            how it went with the first, and with as many more of them as were tried.
        """
        ...

    def read(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """Read blocks, each into a frame, and check them. Blocks.

        Returns:
            as of `write`; a `BadBlock` where it is not there any more, or not whole.
        """
        ...

    def erase(self, slot: int, key: TierKey) -> None:
        """Make sure that a block is never found again. Blocks.

        Raises:
            OSError: it could not.
        """
        ...

    def recover(self) -> Sequence[tuple[int, TierKey, int]]:
        """Get ready, and tell what is there already: slot, key and generation. Blocks. Called first, and again after
        `Lost` or an error.

        Raises:
            OSError: the tier cannot be used at present.
        """
        ...

    def close(self) -> None:
        """Let go of it; nobody reads or writes any more."""
        ...


class _Found(NamedTuple):
    entries: Sequence[tuple[int, TierKey, int]]
    error: str


class ThreadedTier(IndexedTier):
    """See `Tier`. Until what is there from before has been looked through, nothing is found and nothing stored.

    Args:
        name: in logs and metrics.
        index: empty; filled with what ``io`` recovers.
        io: where the bytes are.
        num_threads: reads and writes at a time.
        clock: for deadlines.
        timeout_s: of a job.
        notify: see `base`.
    """

    def __init__(
        self,
        name: str,
        index: TierIndex,
        io: BlockIO,
        num_threads: int,
        clock: Clock,
        timeout_s: float,
        notify: Notify,
    ) -> None:
        super().__init__(name, index, clock, timeout_s)
        self._io = io
        self._notify = notify
        self._ready = False
        self._stats.away = "starting"
        self._recovering = False
        # Loads first: somebody waits for them. Each entry has items of one kind and job, the first at its end.
        self._loads: deque[list[Item]] = deque()
        self._others: deque[list[Item]] = deque()
        self._taking = threading.Lock()
        # Threads that are idle wait for turns. One says that it is before it looks for items, and is told after there
        # are some: so none is missed, and a turn too many makes one look in vain.
        self._idle = [False] * num_threads
        self._turns: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._most = 1
        """Items that a thread takes at a time."""
        self._stopping = False
        self._done: queue.SimpleQueue[Sequence[Item] | _Found] = queue.SimpleQueue()
        self._since_s: list[float | None] = [None] * num_threads
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._recover()

    @property
    def away(self) -> bool:
        """See `IndexedTier`."""
        return not self._ready or self._backing_off

    def poll(self) -> list[JobResult]:
        """See `Tier`."""
        results = super().poll()
        late_s = self._clock.monotonic_s() - self._timeout_s
        if any(since_s is not None and since_s < late_s for since_s in self._since_s):
            self._go_away("slow", f"a read or a write takes longer than {self._timeout_s:g} s")
        if not self._ready and not self._backing_off:
            self._recover()
        return results

    def _recover(self) -> None:
        if not self._recovering and not self._stopping:
            self._recovering = True
            self._start([Item(OpenJob(0, None, 0, 0.0), Kind.RECOVER, 0, b"", 0, 0)])

    def _start(self, items: Sequence[Item]) -> None:
        if not items:
            return
        kind = items[0].kind
        (self._loads if kind is Kind.LOAD else self._others).append(list(reversed(items)))
        # No more of them than have something to do: each that looks in vain takes the GIL from the others.
        batches = -(-len(items) // self._most) if kind in _BATCHED else len(items)
        for _ in range(min(sum(self._idle), batches)):
            self._turns.put(None)

    def _finished(self) -> Iterable[Item]:
        items: list[Item] = []
        while True:
            try:
                done = self._done.get_nowait()
            except queue.Empty:
                return items
            if not isinstance(done, _Found):
                items.extend(done)
                continue
            self._recovering = False
            if done.error:
                self._go_away("unusable", done.error)
            else:
                self._index.restore(done.entries, self._clock.wall_s())
                self._ready = True

    def _fail(self, item: Item) -> None:
        super()._fail(item)
        if item.error == "lost" and self._ready:
            for key in self._index.keys_of():
                self._index.remove(key)
            self._ready = False

    def _stop(self) -> None:
        self._stopping = True
        for _ in self._threads:
            self._turns.put(None)
        stop_by_s = time.monotonic() + _STOP_S
        for thread in self._threads:
            thread.join(max(stop_by_s - time.monotonic(), 0.0))
        if self._threads and not any(thread.is_alive() for thread in self._threads):
            self._io.close()
        self._threads = []

    # ---- on the threads ---------------------------------------------------------------------------------------------

    def _run(self, number: int) -> None:
        frames = self._io.frames()
        self._most = len(frames)
        while items := self._next(number, len(frames)):
            if items[0].kind is Kind.RECOVER:
                self._done.put(self._find())
                self._notify()
                continue
            self._since_s[number] = self._clock.monotonic_s()
            done = self._carry_out(items, frames)
            if len(done) < len(items):
                # Before the others of the job. This thread looks again itself.
                with self._taking:
                    queue_ = self._loads if items[0].kind is Kind.LOAD else self._others
                    queue_.appendleft(list(reversed(items[len(done) :])))
            self._done.put(done)
            # The owner has nothing to tell before: one that is woken for every block does little else.
            if items[0].job.finish(len(done)):
                self._notify()
            self._since_s[number] = None

    def _find(self) -> _Found:
        try:
            return _Found(self._io.recover(), "")
        except OSError as error:
            return _Found([], str(error))

    def _next(self, number: int, most: int) -> Sequence[Item]:
        """Items of one kind and job, or, when the tier stops, none. Waits."""
        while True:
            self._idle[number] = True
            items = self._take(most)
            if items and not self._stopping:
                self._idle[number] = False
                return items
            if items and items[0].kind is not Kind.RECOVER:
                _drop(items)
                self._done.put(items)
            elif self._stopping and not items:
                return ()
            elif not items:
                self._turns.get()

    def _take(self, most: int) -> list[Item]:
        """What is next: of one kind and job, if it can be done together; in the order of slots."""
        with self._taking:
            queue_ = self._loads or self._others
            if not queue_:
                return []
            waiting = queue_[0]
            first = max(len(waiting) - most, 0) if waiting[-1].kind in _BATCHED else -1
            items = waiting[first:]
            del waiting[first:]
            if not waiting:
                queue_.popleft()
        items.sort(key=_slot)
        return items

    def _carry_out(self, items: Sequence[Item], frames: Frames) -> Sequence[Item]:
        """Do as many of them as there is time for, and tell in each how it went; returns those."""
        kind, job = items[0].kind, items[0].job
        if kind is Kind.ERASE:
            [item] = items
            try:
                self._io.erase(item.slot, item.key)
            except OSError as error:
                _note(item, error)
            return items
        if job.ended:
            _drop(items)
            return items
        try:
            if isinstance(job.job, LoadJob):
                return self._load(items, job.job, frames)
            if isinstance(job.job, StoreJob) and job.job.memory is not None:
                return self._store(items, job.job, job.job.memory, frames)
        except OSError as error:
            for item in items:
                _note(item, error)
        return items

    def _load(self, items: Sequence[Item], load: LoadJob, frames: Frames) -> Sequence[Item]:
        items = self._transfer(self._io.read, items, frames)
        good = [place for place, item in enumerate(items) if not item.error]
        job = items[0].job
        with job.lock:
            if job.ended:
                _drop(items)
            elif good and load.memory is not None:
                load.memory.write([load.blocks[items[place].position] for place in good], frames.payloads(good))
        return items

    def _store(self, items: Sequence[Item], store: StoreJob, memory: BlockMemory, frames: Frames) -> Sequence[Item]:
        self._save([item for item in items if item.place is not None and not item.saved], store, frames)
        job = items[0].job
        with job.lock:
            if job.ended:
                _drop(items)
                return items
            memory.read([store.blocks[item.position] for item in items], frames.payloads(range(len(items))))
        return self._transfer(self._io.write, items, frames)

    def _save(self, items: Sequence[Item], store: StoreJob, frames: Frames) -> None:
        """Bring what was evicted to its place in the spill; what cannot be read is lost, and nothing else."""
        if store.spill is None or store.spill.memory is None:
            return
        while items:
            records = [Record(item.slot, *item.evicted) for item in items if item.evicted is not None]
            outcomes = self._io.read(records, frames)
            for outcome in outcomes:
                if isinstance(outcome, OSError):
                    raise outcome
            good = [place for place, outcome in enumerate(outcomes) if outcome is None]
            if good:
                places = [place for n in good if (place := items[n].place) is not None]
                store.spill.memory.write(places, frames.payloads(good))
            for n in good:
                items[n].saved = True
            items = items[len(outcomes) :]

    def _transfer(
        self, move: Callable[[Sequence[Record], Frames], Sequence[Outcome]], items: Sequence[Item], frames: Frames
    ) -> Sequence[Item]:
        outcomes = move([Record(item.slot, item.key, item.generation) for item in items], frames)
        for item, outcome in zip(items, outcomes, strict=False):
            if outcome is not None:
                _note(item, outcome)
        return items[: len(outcomes)]


def _slot(item: Item) -> int:
    return item.slot


def _drop(items: Sequence[Item]) -> None:
    """Nobody wants these any more."""
    for item in items:
        item.error = "dropped"


def _note(item: Item, outcome: BadBlock | OSError) -> None:
    """What went wrong with an item."""
    if isinstance(outcome, BadBlock):
        item.error, item.detail = outcome.args
        item.harmless = True
    elif isinstance(outcome, Lost):
        item.error, item.detail = "lost", str(outcome)
    else:
        item.error = "full" if outcome.errno in _FULL else "io"
        item.detail = str(outcome)
