"""The process that owns a node's host tier: its memory, its index and its policy. It never touches a block's bytes.

Engines map the memory, copy for themselves, and ask over a Unix socket for slots. What an engine had reserved or pinned
is free again when its socket ends, and that the kernel closes when the last of its threads is gone. When the keeper
itself dies, its memory lives until the engines have let go of it; the next keeper starts empty.

Usage: python -m tandem.kv_transfer.offload.keeper SOCKET CAPACITY_BYTES BLOCK_BYTES POLICY, with a pipe as standard
input: it ends with it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec

from ...core.errors import ConfigError
from ...core.log import RateLimited
from ...core.units import format_bytes
from .base import Lookup
from .index import TierIndex
from .keeper_wire import (
    KNOWN,
    MAX_BYTES,
    NO_ROOM,
    PENDING,
    VERSION,
    Answer,
    Attach,
    Attached,
    Clear,
    Done,
    Pin,
    Question,
    Remove,
    Reserve,
    Reserved,
    Settle,
    Touch,
    encode,
    questions,
)
from .keys import TierKey
from .policies import make_policy
from .pool import OwnedPool, slots_within

_log = RateLimited()


def start_keeper(path: Path, capacity_bytes: int, block_bytes: int, policy: str) -> subprocess.Popen[bytes]:
    """Start a keeper; it ends when the returned process's standard input is closed, by us or by our death.

    Args:
        path: of its socket, in a folder that this user alone can enter.
        capacity_bytes: of the memory that engines map, never exceeded.
        block_bytes: of a block.
        policy: one of `policies.POLICIES`.
    """
    arguments = [str(path), str(capacity_bytes), str(block_bytes), policy]
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, *arguments], stdin=subprocess.PIPE, start_new_session=True
    )


class _Engine:
    """One connection, and what must be undone when it ends."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.attached = False
        self.reserved: set[int] = set()
        # With the generation: a key that was removed and stored again is not pinned any more.
        self.pinned: Counter[tuple[TierKey, int | None]] = Counter()


class Keeper:
    """See the module.

    Args:
        path: of the socket; what is there is replaced.
        num_slots: ≥ 1.
        block_bytes: of a block.
        policy: one of `policies.POLICIES`.

    Raises:
        ConfigError: there is no such policy.
    """

    def __init__(self, path: Path, num_slots: int, block_bytes: int, policy: str) -> None:
        self._index = TierIndex(num_slots, make_policy(policy, num_slots))
        self._pool = OwnedPool(num_slots, block_bytes)
        self._block_bytes = block_bytes
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(128)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def run(self, until: int) -> None:
        """Serve until a descriptor can be read, which is a pipe's end. Blocks."""
        self._selector.register(until, selectors.EVENT_READ)
        while True:
            for ready, _ in self._selector.select():
                if ready.fileobj == until:
                    return
                if ready.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(ready.data)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Engine(connection))

    def _serve(self, engine: _Engine) -> None:
        try:
            packet = engine.connection.recv(MAX_BYTES)
            if not packet:
                self._forget(engine)
                return
            question = questions.decode(packet)
            if isinstance(question, Attach):
                self._attach(engine, question)
                return
            if not engine.attached:
                raise ValueError("a question before Attach")
            answer = self._answer(engine, question)
            self._pool.count(self._index.num_used, self._index.oldest_at_s())
            if answer is not None:
                engine.connection.send(encode(answer))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            # Also when its buffer is full: an engine that does not read its answers is not alive.
            _log.warning("engine", "an engine is dropped from the host tier: %s", error)
            self._forget(engine)

    def _attach(self, engine: _Engine, question: Attach) -> None:
        error = ""
        if question.version != VERSION:
            error = f"the keeper speaks version {VERSION}, the engine {question.version}"
        elif question.block_bytes != self._block_bytes:
            error = f"the keeper has blocks of {self._block_bytes} bytes, the engine of {question.block_bytes}"
        engine.attached = not error
        descriptors = [] if error else self._pool.descriptors()
        socket.send_fds(engine.connection, [encode(Attached(error))], descriptors)

    def _answer(self, engine: _Engine, question: Question) -> Answer | None:
        match question:
            case Reserve():
                return self._reserve(engine, question)
            case Settle():
                self._settle(engine, question)
            case Touch():
                self._index.touch(question.keys)
                return None
            case Pin(keys=keys, on=True):
                engine.pinned.update((key, self._index.generation_of(key)) for key in self._index.pin(keys))
            case Pin(keys=keys):
                for key in keys:
                    pinned = (key, self._index.generation_of(key))
                    if engine.pinned[pinned] > 0:
                        engine.pinned[pinned] -= 1
                        self._index.unpin([key])
            case Remove():
                self._remove(question.keys)
            case Clear():
                self._remove(self._index.keys_of(question.tenant))
        return Done()

    def _reserve(self, engine: _Engine, question: Reserve) -> Reserved:
        slots, evicted = [], []
        states = self._index.lookup(question.keys)
        self._index.touch(question.keys)
        # What is there of a prefix must not go for what continues it.
        known = [held[0] for key in question.keys if (held := self._index.hold(key)) is not None]
        for key, state in zip(question.keys, states, strict=True):
            before = b""
            if state is not Lookup.MISS:
                slots.append(KNOWN if state is Lookup.HIT else PENDING)
            elif (reservation := self._index.reserve(key, question.priority)) is None:
                slots.append(NO_ROOM)
            else:
                if reservation.evicted is not None:
                    before = reservation.evicted.key
                    self._pool.remove(reservation.slot, reservation.generation)
                self._pool.reserve(reservation.slot, key, reservation.generation)
                engine.reserved.add(reservation.slot)
                slots.append(reservation.slot)
            evicted.append(before)
        for slot in reversed(known):
            self._index.release(slot)
        return Reserved(slots, evicted)

    def _settle(self, engine: _Engine, question: Settle) -> None:
        for slot in (*question.stored, *question.dropped):
            if slot not in engine.reserved:
                raise ValueError(f"slot {slot} is not the engine's")
            engine.reserved.discard(slot)
        for slot in question.stored:
            if self._index.commit(slot, time.time()):
                self._pool.store(slot)
            self._index.release(slot)
        for slot in question.dropped:
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        if not self._index.is_leaving(slot):
            self._pool.remove(slot, 0)
        self._index.abort(slot)

    def _remove(self, keys: list[TierKey]) -> None:
        for key in keys:
            slot = self._index.remove(key)
            if slot is not None:
                self._pool.remove(slot, 0)

    def _forget(self, engine: _Engine) -> None:
        self._selector.unregister(engine.connection)
        engine.connection.close()
        for slot in engine.reserved:
            self._drop(slot)
        for key, generation in engine.pinned.elements():
            if self._index.generation_of(key) == generation:
                self._index.unpin([key])
        self._pool.count(self._index.num_used, self._index.oldest_at_s())


def main() -> None:
    """Serve until standard input ends."""
    path, capacity, block_bytes, policy = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    num_slots = slots_within(capacity, block_bytes)
    if num_slots < 1:
        raise ConfigError(f"capacity: {format_bytes(capacity)} holds no block of {format_bytes(block_bytes)}")
    keeper = Keeper(path, num_slots, block_bytes, policy)
    with contextlib.suppress(KeyboardInterrupt):
        keeper.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
