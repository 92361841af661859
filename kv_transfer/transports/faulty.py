"""A transport some of whose reads go wrong, for rehearsals: `kv.inject_faults` wraps every transport in one.

Faults are drawn from a seed. A delayed read is submitted late and cannot be cancelled meanwhile: what a slow network
card does, which writes into memory long after everybody has lost interest.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Iterable

from ...core.config import FaultsConfig
from ...core.ids import PeerId
from .base import Notify, Read, Region, TransferResult, Transport, bytes_of

_CORRUPT_BYTE = 0xA5


class FaultyTransport:
    """See `Transport`.

    Args:
        inner: carries the reads out.
        faults: which share of them goes wrong, and how.
        notify: called when `poll` has news.
        checked: the region whose reads can be corrupted: one whose content the reader compares with what it expects.
    """

    def __init__(self, inner: Transport, faults: FaultsConfig, notify: Notify, checked: str) -> None:
        self.name = inner.name
        self.converts = inner.converts
        self.memory = inner.memory
        self._inner = inner
        self._faults = faults
        self._notify = notify
        self._checked = checked
        self._random = random.Random(faults.seed)
        self._regions: dict[str, Region] = {}
        self._number = 0
        self._numbers: dict[int, int] = {}
        """Ours, by the inner transport's."""
        self._late: dict[int, Read] = {}
        self._due: deque[int] = deque()
        self._corrupt: dict[int, Read] = {}
        self._failed: list[TransferResult] = []

    def register(self, region: Region) -> None:
        self._regions[region.name] = region
        self._inner.register(region)

    def descriptor(self) -> bytes:
        return self._inner.descriptor()

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        self._inner.add_peer(peer, descriptor)

    def remove_peer(self, peer: PeerId) -> None:
        self._inner.remove_peer(peer)
        self._due.extend(number for number, read in self._late.items() if read.peer == peer)
        self._notify()

    def submit(self, read: Read) -> int:
        self._number += 1
        number, kind = self._number, self._faults.kind
        hit = (kind != "corrupt" or read.source == self._checked) and self._random.random() < self._faults.share
        if hit and kind == "error":
            self._failed.append(TransferResult(number, "a fault of kv.inject_faults"))
            self._notify()
        elif hit and kind == "delay":
            self._late[number] = read
            timer = threading.Timer(self._faults.delay_s, self._ripen, [number])
            timer.daemon = True
            timer.start()
        else:
            if hit:
                self._corrupt[number] = read
            self._numbers[self._inner.submit(read)] = number
        return number

    def poll(self) -> list[TransferResult]:
        results, self._failed = self._failed, []
        while self._due:
            number = self._due.popleft()
            read = self._late.pop(number, None)
            if read is not None:
                self._numbers[self._inner.submit(read)] = number
        for inner in self._inner.poll():
            number = self._numbers.pop(inner.number)
            read = self._corrupt.pop(number, None)
            if read is not None and not inner.error:
                self._spoil(read)
            results.append(TransferResult(number, inner.error))
        return results

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        wanted = set(numbers)
        self._failed = [result for result in self._failed if result.number not in wanted]
        inner_numbers = {inner: number for inner, number in self._numbers.items() if number in wanted}
        draining = self._inner.cancel(inner_numbers)
        for inner in inner_numbers.keys() - draining:
            self._corrupt.pop(self._numbers.pop(inner), None)
        return {inner_numbers[inner] for inner in draining} | (wanted & self._late.keys())

    def close(self) -> None:
        self._late.clear()
        self._regions.clear()
        self._inner.close()

    def _ripen(self, number: int) -> None:
        self._due.append(number)
        self._notify()

    def _spoil(self, read: Read) -> None:
        target = bytes_of(self._regions, read.target)
        assert target is not None, "generations are on the host"
        for start, size in zip(read.runs.target_offsets, read.runs.sizes, strict=True):
            target[start : start + size] ^= _CORRUPT_BYTE
