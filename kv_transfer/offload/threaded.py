"""A tier that does its I/O on a few threads, each with a buffer of its own.

All bytes go through the buffers. So a caller's blocks are touched only while its job is open, under a lock, never by a
read or a write that hangs in the system: a job can end in time although its I/O does not.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ...core.clock import Clock
from .base import JobResult, LoadJob, Notify, StoreJob
from .index import TierIndex
from .indexed import IndexedTier, Item, Kind, OpenJob
from .keys import TierKey

_STOP_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BadBlock(Exception):
    """What a slot holds is not what was stored. ``args``: a cause in a word, and a sentence."""


class Lost(OSError):
    """The place where the blocks were is gone, with all of them."""


class Frame(NamedTuple):
    """A thread's memory for one block and what is written with it."""

    whole: np.ndarray
    """[n] uint8."""
    payload: np.ndarray
    """[block_bytes] uint8, a part of ``whole``."""


class BlockIO(Protocol):
    """Reads and writes slots. Called by several threads at a time, never two for one slot."""

    def frame(self) -> Frame:
        """Memory for one thread, which gives it to `write` and `read`."""
        ...

    def write(self, slot: int, key: TierKey, generation: int, frame: Frame) -> None:
        """Write a block. Blocks.

        Raises:
            OSError: it could not.
        """
        ...

    def read(self, slot: int, key: TierKey, generation: int, frame: Frame) -> None:
        """Read a block, and check it. Blocks.

        Raises:
            BadBlock: it is not there any more, or not whole.
            OSError: it could not be read.
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
        # Loads first: somebody waits for them. For each item there is a turn, and as many as threads at the end.
        self._loads: deque[Item] = deque()
        self._others: deque[Item] = deque()
        self._turns: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False
        self._done: queue.SimpleQueue[Item | _Found] = queue.SimpleQueue()
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
        for item in items:
            (self._loads if item.kind is Kind.LOAD else self._others).append(item)
            self._turns.put(None)

    def _finished(self) -> Iterable[Item]:
        items: list[Item] = []
        while True:
            try:
                done = self._done.get_nowait()
            except queue.Empty:
                return items
            if isinstance(done, Item):
                items.append(done)
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
        frame = self._io.frame()
        while (item := self._next()) is not None:
            self._since_s[number] = self._clock.monotonic_s()
            if item.kind is Kind.RECOVER:
                self._since_s[number] = None
                self._done.put(self._find())
                self._notify()
            else:
                self._carry_out(item, frame)
                self._done.put(item)
                # The owner has nothing to tell before: one that is woken for every block does little else.
                if item.job.finish_one():
                    self._notify()
            self._since_s[number] = None

    def _find(self) -> _Found:
        try:
            return _Found(self._io.recover(), "")
        except OSError as error:
            return _Found([], str(error))

    def _next(self) -> Item | None:
        self._turns.get()
        while True:
            try:
                item = (self._loads or self._others).popleft()
            except IndexError:  # another thread took it, or it is the end
                if self._loads or self._others:
                    continue
                return None
            if not self._stopping:
                return item
            item.error = "dropped"
            if item.kind is not Kind.RECOVER:
                self._done.put(item)

    def _carry_out(self, item: Item, frame: Frame) -> None:
        try:
            if item.kind is Kind.ERASE:
                self._io.erase(item.slot, item.key)
            elif item.job.ended:
                item.error = "dropped"
            elif item.kind is Kind.LOAD:
                self._load(item, frame)
            else:
                self._store(item, frame)
        except BadBlock as bad:
            item.error, item.detail = bad.args
            item.harmless = True
        except Lost as lost:
            item.error, item.detail = "lost", str(lost)
        except OSError as error:
            item.error = "full" if error.errno in _FULL else "io"
            item.detail = str(error)

    def _load(self, item: Item, frame: Frame) -> None:
        job = item.job.job
        self._io.read(item.slot, item.key, item.generation, frame)
        with item.job.lock:
            if item.job.ended:
                item.error = "dropped"
            elif isinstance(job, LoadJob) and job.memory is not None:
                job.memory.write([job.blocks[item.position]], [frame.payload])

    def _store(self, item: Item, frame: Frame) -> None:
        job = item.job.job
        if not isinstance(job, StoreJob) or job.memory is None:
            return
        self._save(item, job, frame)
        with item.job.lock:
            if item.job.ended:
                item.error = "dropped"
                return
            job.memory.read([job.blocks[item.position]], [frame.payload])
        self._io.write(item.slot, item.key, item.generation, frame)

    def _save(self, item: Item, job: StoreJob, frame: Frame) -> None:
        """Bring what was evicted to its place in the spill; what cannot be read is lost, and nothing else."""
        if item.evicted is None or item.place is None or job.spill is None or job.spill.memory is None:
            return
        try:
            self._io.read(item.slot, item.evicted.key, item.evicted.generation, frame)
        except BadBlock:
            return
        job.spill.memory.write([item.place], [frame.payload])
        item.saved = True
