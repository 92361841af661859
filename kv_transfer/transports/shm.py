"""Between processes of one host: the peer's memory is mapped, and read like our own, by a thread without the GIL."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

import msgspec
import numpy as np

from ...core.errors import TransferError
from ...core.ids import PeerId
from ..memory import SharedMemory, map_shared
from .base import Notify, Read, Region, TransferResult, bytes_of, copy_checked, shared_of

# Made once: when several threads make the first of a type, msgspec crashes.
_descriptors = msgspec.msgpack.Decoder(dict[str, SharedMemory])


class ShmTransport:
    """See `Transport`."""

    name = "shm"
    converts = False
    memory = frozenset({"host"})

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._regions: dict[str, Region] = {}
        self._peers: dict[PeerId, dict[str, np.ndarray]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._waiting: dict[int, Read] = {}
        self._active = 0
        self._done: list[TransferResult] = []
        self._work: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="kv-shm", daemon=True)
        self._thread.start()

    def register(self, region: Region) -> None:
        self._regions[region.name] = region

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(shared_of(self._regions))

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        found = _descriptors.decode(descriptor)
        if not found:
            raise TransferError(f"shm: {peer} has no memory that can be shared (that needs Linux)")
        mapped = {name: map_shared(shared) for name, shared in found.items()}
        with self._lock:
            self._peers[peer] = mapped

    def remove_peer(self, peer: PeerId) -> None:
        with self._lock:
            self._peers.pop(peer, None)

    def submit(self, read: Read) -> int:
        self._number += 1
        with self._lock:
            self._waiting[self._number] = read
        self._work.put(self._number)
        return self._number

    def poll(self) -> list[TransferResult]:
        with self._lock:
            done, self._done = self._done, []
        return done

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        wanted = set(numbers)
        with self._lock:
            for number in wanted:
                self._waiting.pop(number, None)
            self._done = [result for result in self._done if result.number not in wanted]
            return wanted & {self._active}

    def close(self) -> None:
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None
        self._peers.clear()
        self._regions.clear()

    def _run(self) -> None:
        while (number := self._work.get()) is not None:
            with self._lock:
                read = self._waiting.pop(number, None)
                if read is None:  # cancelled
                    continue
                self._active = number
                sources = self._peers.get(read.peer)
            if sources is None:
                error = f"{read.peer} is gone"
            else:
                error = copy_checked(read, sources.get(read.source), bytes_of(self._regions, read.target))
            with self._lock:
                self._active = 0
                self._done.append(TransferResult(number, error))
            # Memory of a peer that goes is not to stay mapped until the next read.
            del read, sources
            self._notify()
