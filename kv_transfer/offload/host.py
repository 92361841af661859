"""The host tier as an engine sees it: a node's pool of memory, mapped, whose slots the keeper (`keeper`) gives out.

Lookups and loads read shared memory and ask nobody. One thread talks to the keeper, copies blocks in, and finds the
next keeper when this one is gone; until then the tier knows nothing. Another thread copies blocks out.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from ...core.clock import Clock
from ...core.log import RateLimited, logger
from .base import Change, JobResult, LoadJob, Lookup, Notify, Spilled, StoreJob, TierStats
from .forgetting import Forgetting, forgotten
from .jobs import Jobs, OpenJob
from .keeper_wire import (
    KNOWN,
    MAX_BYTES,
    MAX_KEYS,
    VERSION,
    Answer,
    Attach,
    Attached,
    Clear,
    Pin,
    Question,
    Remove,
    Reserve,
    Reserved,
    Settle,
    Touch,
    answers,
    encode,
)
from .keys import TierKey
from .pool import MappedPool, Places

_COPY_BLOCKS = 128
"""Copied while a job is locked. On a GPU each such part is a launch and a wait, some tenths of a millisecond between
copies of a few."""
_RETRY_S = 0.2
_WARN_PERIOD_S = 300.0


class HostTier:
    """See `Tier`.

    Args:
        path: of the keeper's socket; there need not be a keeper yet.
        block_bytes: of a block.
        clock: for deadlines.
        timeout_s: after which a job ends with what it has, and a keeper that does not answer counts as dead.
        notify: see `base`.
        pin: called with the slots' memory, [bytes] uint8, whenever it is mapped, to make it reachable for a device;
            returns what undoes it.
        name: in logs and metrics.
    """

    shared = True

    def __init__(
        self,
        path: Path,
        block_bytes: int,
        clock: Clock,
        timeout_s: float,
        notify: Notify,
        pin: Callable[[np.ndarray], Callable[[], None]] | None = None,
        name: str = "host",
    ) -> None:
        self.name = name
        self._path = path
        self._block_bytes = block_bytes
        self._clock = clock
        self._timeout_s = timeout_s
        self._notify = notify
        self._pin_memory = pin
        self._stats = TierStats()
        self._jobs = Jobs(name, clock, timeout_s, self._stats)
        self._forgettings: list[Forgetting] = []
        self._log = RateLimited(_WARN_PERIOD_S)
        self._closed = False
        # Of threads and owner: replaced, never changed.
        self._pool: MappedPool | None = None
        self._changes: deque[Change] | None = None
        self._done: queue.SimpleQueue[OpenJob | Forgetting] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[tuple[OpenJob, MappedPool, Places] | None] = queue.SimpleQueue()
        self._errands: queue.SimpleQueue[OpenJob | Forgetting | Touch | Pin | None] = queue.SimpleQueue()
        self._bell, self._bell_end = socket.socketpair()
        self._bell.setblocking(False)
        # Of the thread that talks.
        self._started_s = clock.monotonic_s()
        self._socket: socket.socket | None = None
        self._threads = [
            threading.Thread(target=self._talk, name=f"{name}-stores", daemon=True),
            threading.Thread(target=self._fetch, name=f"{name}-loads", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pool(self) -> MappedPool | None:
        """The keeper's memory; None: there is no keeper. Another object when there is another keeper."""
        return self._pool

    @property
    def num_forgetting(self) -> int:
        """Calls of `remove` and `clear` that the keeper has yet to hear of."""
        return len(self._forgettings)

    # ---- the owner's side -------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        """See `Tier`. A thousand keys take about a tenth of a millisecond."""
        pool = self._pool
        if pool is None or self._closed or not keys:
            return [Lookup.MISS] * len(keys)
        answers = pool.find(keys).lookups()
        for place in forgotten(self._forgettings, keys):
            answers[place] = Lookup.MISS
        return answers

    def submit_store(self, job: StoreJob) -> int:
        """See `Tier`."""
        open_job = self._jobs.open(job)
        if self._pool is None or self._closed or not job.keys:
            return self._refuse(open_job)
        self._send(open_job)
        return open_job.number

    def submit_load(self, job: LoadJob) -> int:
        """See `Tier`."""
        open_job = self._jobs.open(job)
        pool = self._pool
        if pool is None or self._closed or not job.keys:
            return self._refuse(open_job)
        places = pool.find(job.keys)
        for place in forgotten(self._forgettings, job.keys):
            places.states[place] = 0
        self._loads.put((open_job, pool, places))
        self.touch(job.keys)
        return open_job.number

    def poll(self) -> list[JobResult]:
        """See `Tier`."""
        while True:
            try:
                done = self._done.get_nowait()
            except queue.Empty:
                break
            if isinstance(done, Forgetting):
                self._forgettings.remove(done)
            elif not done.ended:
                self._end(done)
        for job in self._jobs.late():
            self._log.warning("slow", "%s: a job took longer than %g s", self.name, self._timeout_s)
            self._end(job)
        return self._jobs.take_ended()

    def touch(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        if self._pool is not None:
            for start in range((len(keys) - 1) // MAX_KEYS * MAX_KEYS, -1, -MAX_KEYS):
                self._send(Touch(list(keys[start : start + MAX_KEYS])))

    def pin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`. A new keeper knows nothing of pins."""
        for start in range(0, len(keys), MAX_KEYS):
            self._send(Pin(list(keys[start : start + MAX_KEYS]), True))

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for start in range(0, len(keys), MAX_KEYS):
            self._send(Pin(list(keys[start : start + MAX_KEYS]), False))

    def remove(self, keys: Sequence[TierKey]) -> None:
        """See `Tier`."""
        for start in range(0, len(keys), MAX_KEYS):
            self._forget(Forgetting(frozenset(keys[start : start + MAX_KEYS]), None))

    def clear(self, tenant: bytes | None = None) -> None:
        """See `Tier`. Of the whole node's engines."""
        self._forget(Forgetting(None, tenant))

    def watch(self) -> list[TierKey]:
        """See `Tier`."""
        self._changes = deque()
        pool = self._pool
        return [] if pool is None else pool.stored_keys()

    def changes(self) -> list[Change]:
        """See `Tier`."""
        changes: list[Change] = []
        while self._changes:
            changes.append(self._changes.popleft())
        return changes

    def stats(self) -> TierStats:
        """See `Tier`. Slots are the whole node's."""
        pool = self._pool
        self._stats.away = "" if pool is not None else "no keeper"
        self._stats.num_slots = 0 if pool is None else pool.num_slots
        self._stats.num_used, self._stats.oldest_at_s = (0, 0.0) if pool is None else pool.in_use()
        return self._stats

    def next_event_s(self) -> float | None:
        """See `Tier`."""
        return self._jobs.next_deadline_s()

    def close(self) -> None:
        """See `Tier`."""
        if self._closed:
            return
        self._closed = True
        self._loads.put(None)
        self._send(None)
        for thread in self._threads:
            thread.join(self._timeout_s + 1.0)
        self._bell.close()
        while not self._done.empty():
            done = self._done.get_nowait()
            if isinstance(done, OpenJob) and not done.ended:
                self._end(done)
        for job in self._jobs.left():
            self._end(job)
        self._pool = None

    def _refuse(self, job: OpenJob) -> int:
        job.error = f"{self.name} is away" if job.good else ""
        self._end(job)
        return job.number

    def _end(self, job: OpenJob) -> None:
        self._jobs.end(job)
        good = sum(job.good)
        if isinstance(job.job, LoadJob):
            self._stats.loaded += good
        elif not job.error:
            self._stats.refused += len(job.good) - good

    def _forget(self, forgetting: Forgetting) -> None:
        self._forgettings.append(forgetting)
        self._send(forgetting)

    def _send(self, errand: OpenJob | Forgetting | Touch | Pin | None) -> None:
        self._errands.put(errand)
        # A full bell rings already.
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    # ---- the thread that copies blocks out --------------------------------------------------------------------------

    def _fetch(self) -> None:
        while (work := self._loads.get()) is not None:
            job, pool, places = work
            del work
            if isinstance(job.job, LoadJob):
                try:
                    self._load(job, job.job, pool, places)
                except (OSError, RuntimeError) as error:  # a GPU refuses the copy: what came before is good
                    job.error = f"{self.name}: {error}"
                    self._log.warning("copy", "%s: blocks could not be loaded: %s", self.name, error)
            self._done.put(job)
            self._notify()
            del pool  # a mapping that is not needed any more goes at once, not with the next load
        while not self._loads.empty():
            self._loads.get()

    def _load(self, job: OpenJob, load: LoadJob, pool: MappedPool, places: Places) -> None:
        found = [place for place, state in enumerate(places.lookups()) if state is Lookup.HIT]
        for start in range(0, len(found), _COPY_BLOCKS):
            part = found[start : start + _COPY_BLOCKS]
            slots = places.slots[part]
            with job.lock:
                if job.ended or self._closed:
                    job.error = job.error or f"{self.name} is closed"
                    return
                if load.memory is not None:
                    load.memory.write([load.blocks[p] for p in part], pool.blocks(slots))
                # The lock's release and this read do not change places with the copy's reads.
                still = pool.still([load.keys[p] for p in part], slots, places.generations[part])
                for place, good in zip(part, still.tolist(), strict=True):
                    job.good[place] = good

    # ---- the thread that talks to the keeper ------------------------------------------------------------------------

    def _talk(self) -> None:
        while True:
            if self._socket is None and not self._closed:
                self._attach()
            self._listen()
            while True:
                try:
                    errand = self._errands.get_nowait()
                except queue.Empty:
                    break
                if errand is None:
                    self._detach("")
                    self._bell_end.close()
                    return
                self._run(errand)

    def _listen(self) -> None:
        """Wait for an errand, or for the keeper's end; or, without a keeper, until it is time to look again."""
        poller = select.poll()
        poller.register(self._bell_end, select.POLLIN)
        if self._socket is not None:
            poller.register(self._socket, select.POLLIN)
        ready = [number for number, _ in poller.poll(None if self._socket is not None else _RETRY_S * 1000)]
        if self._bell_end.fileno() in ready:
            self._bell_end.recv(4096)
        if self._socket is not None and self._socket.fileno() in ready:
            # Nobody asked anything: it can only be the end.
            self._detach("it is gone")

    def _run(self, errand: OpenJob | Forgetting | Touch | Pin) -> None:
        try:
            if isinstance(errand, OpenJob):
                if isinstance(errand.job, StoreJob):
                    self._store(errand, errand.job)
            elif isinstance(errand, Forgetting):
                if self._socket is not None:
                    self._note_forgotten(errand)
                    self._ask(Clear(errand.tenant) if errand.keys is None else Remove(list(errand.keys)))
            elif self._socket is not None:
                self._ask(errand)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._detach(str(error) or type(error).__name__)
            if isinstance(errand, OpenJob):
                errand.error = f"{self.name}: the keeper is gone"
        if isinstance(errand, OpenJob | Forgetting):
            self._done.put(errand)
            self._notify()

    def _ask(self, question: Question) -> Answer | None:
        if self._socket is None:
            raise ConnectionError("no keeper")
        self._socket.send(encode(question))
        if isinstance(question, Touch):
            return None
        packet = self._socket.recv(MAX_BYTES)
        if not packet:
            raise ConnectionError("the keeper closed the connection")
        answer: Answer = answers.decode(packet)
        return answer

    def _store(self, job: OpenJob, store: StoreJob) -> None:
        pool = self._pool
        if pool is None:
            job.error = f"{self.name} is away"
            return
        filled = []
        for start in range(0, len(store.keys), MAX_KEYS):
            if job.ended or self._closed:
                job.error = job.error or f"{self.name} is closed"
                break
            places = range(start, min(start + MAX_KEYS, len(store.keys)))
            reserved = self._ask(Reserve([store.keys[place] for place in places], store.priority))
            if not isinstance(reserved, Reserved) or len(reserved.slots) != len(places):
                raise ValueError(f"the keeper answers Reserve with {type(reserved).__name__}")
            filled.append(self._fill(job, store, pool, places, reserved))
        # The end of a prefix first: its beginning is what should go last.
        for stored, dropped in reversed(filled):
            self._ask(Settle([slot for _, slot in reversed(stored)], [slot for _, slot in dropped]))
            self._stats.stored += len(stored)
            for place, _ in stored:
                job.good[place] = True
                self._note(store.keys[place], found=True)

    def _fill(
        self, job: OpenJob, store: StoreJob, pool: MappedPool, places: Sequence[int], reserved: Reserved
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Copy blocks into slots; returns (place, slot) of those that are filled, and of those that are not."""
        mine = []
        for place, slot, evicted in zip(places, reserved.slots, reserved.evicted, strict=True):
            if slot >= 0:
                mine.append((place, slot))
                if evicted:
                    self._stats.evicted += 1
                    self._note(evicted, found=False)
                if evicted and store.spill is not None:
                    self._save(job, store, pool.block(slot), evicted)
            elif slot == KNOWN:
                job.good[place] = True
        for start in range(0, len(mine), _COPY_BLOCKS):
            part = mine[start : start + _COPY_BLOCKS]
            with job.lock:
                if job.ended:
                    return mine[:start], mine[start:]
                if store.memory is not None:
                    blocks = [store.blocks[place] for place, _ in part]
                    store.memory.read(blocks, pool.blocks(np.array([slot for _, slot in part])))
        return mine, []

    def _save(self, job: OpenJob, store: StoreJob, block: np.ndarray, key: TierKey) -> None:
        place = None if store.spill is None else store.spill.take()
        if store.spill is None or place is None:
            return
        if store.spill.memory is not None:
            store.spill.memory.write([place], [block])
        with job.lock:
            if job.ended:
                store.spill.give(place)
            else:
                job.spilled.append(Spilled(key, place))

    def _note(self, key: TierKey, *, found: bool) -> None:
        if self._changes is not None:
            self._changes.append(Change(key, found))

    def _note_forgotten(self, forget: Forgetting) -> None:
        if self._changes is None or self._pool is None:
            return
        for key in self._pool.stored_keys() if forget.keys is None else forget.keys:
            if forget.covers(key):
                self._note(key, found=False)

    def _attach(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(str(self._path))
            connection.send(encode(Attach(VERSION, self._block_bytes)))
            packet, descriptors, _, _ = socket.recv_fds(connection, MAX_BYTES, 2)
            answer = answers.decode(packet) if packet else None
            if not isinstance(answer, Attached) or answer.error or len(descriptors) != 2:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise ValueError(answer.error if isinstance(answer, Attached) else "the keeper does not attach us")
            pool = MappedPool(descriptors[0], descriptors[1], self._block_bytes, self._pin_memory)
        except (FileNotFoundError, ConnectionError, TimeoutError):
            connection.close()
            if self._clock.monotonic_s() > self._started_s + self._timeout_s:
                self._log.warning("no keeper", "%s: there is no keeper at %s; it is looked for", self.name, self._path)
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            connection.close()
            self._log.warning("attach", "%s: no memory from the keeper at %s: %s", self.name, self._path, error)
            time.sleep(_RETRY_S)
            return
        self._socket, self._pool = connection, pool
        self._started_s = math.inf
        if self._changes is not None:
            for key in pool.stored_keys():
                self._note(key, found=True)
        logger.info("%s: %d slots at %s", self.name, pool.num_slots, self._path)
        self._notify()

    def _detach(self, reason: str) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = self._pool = None
            self._note(b"", found=False)
            if reason and not self._closed:
                self._stats.failures["keeper"] += 1
                self._log.warning(
                    "keeper", "%s: the keeper at %s: %s; its blocks are lost", self.name, self._path, reason
                )
                self._notify()
