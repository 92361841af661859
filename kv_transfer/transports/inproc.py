"""Between workers of one process: the colocated form, and the one that tests single-step.

A read is copied by `poll`, so that everything between submission and landing can be observed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable

import msgspec

from ...core.errors import TransferError
from ...core.ids import PeerId
from .base import Notify, Read, Region, TransferResult, bytes_of, copy_checked

_open: dict[str, InprocTransport] = {}


class _Descriptor(msgspec.Struct):
    pid: int
    token: str


class InprocTransport:
    """See `Transport`."""

    name = "inproc"
    converts = False
    memory = frozenset({"host"})

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._token = secrets.token_hex(12)
        self._regions: dict[str, Region] = {}
        self._peers: dict[PeerId, InprocTransport] = {}
        self._pending: dict[int, Read] = {}
        self._number = 0
        _open[self._token] = self

    def register(self, region: Region) -> None:
        self._regions[region.name] = region

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(_Descriptor(os.getpid(), self._token))

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        found = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        if found.pid != os.getpid() or found.token not in _open:
            raise TransferError(f"inproc: {peer} is in another process ({found.pid})")
        self._peers[peer] = _open[found.token]

    def remove_peer(self, peer: PeerId) -> None:
        self._peers.pop(peer, None)

    def submit(self, read: Read) -> int:
        self._number += 1
        self._pending[self._number] = read
        self._notify()
        return self._number

    def poll(self) -> list[TransferResult]:
        pending, self._pending = self._pending, {}
        return [TransferResult(number, self._copy(read)) for number, read in pending.items()]

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        for number in numbers:
            self._pending.pop(number, None)
        return set()

    def close(self) -> None:
        _open.pop(self._token, None)
        self._pending.clear()
        self._regions.clear()

    def _copy(self, read: Read) -> str:
        peer = self._peers.get(read.peer)
        if peer is None or peer._token not in _open:
            return f"{read.peer} is gone"
        return copy_checked(read, bytes_of(peer._regions, read.source), bytes_of(self._regions, read.target))
