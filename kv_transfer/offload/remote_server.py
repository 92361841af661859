"""The process that lets other nodes read a node's host tier. It tells them what is there, and how many may read at a
time: the node's own engines, which copy in the same memory, come first.

It reads the index and the slots in shared memory, like an engine, and writes neither. When the keeper dies it waits for
the next, whose memory is another pool for everybody.

Usage: python -m tandem.kv_transfer.offload.remote_server, with a `Task` as the first line of standard input. It prints
its endpoint, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections import deque
from pathlib import Path

import msgspec
import numpy as np
import zmq

from ...core.clock import Clock, SystemClock
from ...core.config import KVConfig
from ...core.errors import ConfigError
from ...core.log import RateLimited
from ...core.messages import decode_with
from ...core.wire import SecureContext
from ..memory import Buffer
from ..transports import Region, Transport
from ..transports.pieces import integers, octets
from .host import HostTier
from .network import open_transports
from .pool import MappedPool
from .remote_task import Task
from .remote_wire import (
    HOLD_S,
    MAX_CHANGES,
    SLOTS,
    Answer,
    Ask,
    Forget,
    Forgotten,
    Grant,
    News,
    Question,
    Release,
    Released,
    Request,
    encode,
    questions,
)
from .replica import Changes, IndexLog

MAX_READERS = 8
"""Requests that are granted at a time."""
_MAX_WAITING = 10_000
_MAX_MESSAGES_AT_ONCE = 256
_TICK_MS = 20
_IDLE_MS = 200
_NOTHING = Changes(0, np.zeros(0, np.int64), b"", np.zeros(0, np.uint64))

_log = RateLimited()


class HostServer:
    """See the module.

    Args:
        task: what to do; its keys are not looked at.
        context: makes the sockets.
        clock: for deadlines.

    Raises:
        ConfigError: the address is not this host's, or the port is taken.
    """

    def __init__(self, task: Task, context: SecureContext, clock: Clock) -> None:
        self._task = task
        self._context = context
        self._clock = clock
        self._kv = KVConfig.model_validate_json(task.kv)
        try:
            self._socket, self.endpoint = context.bind(task.address, task.port)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {task.address}:{task.port or '*'}: {error}") from None
        self._host = HostTier(Path(task.path), task.block_bytes, clock, task.timeout_s, lambda: None, name="server")
        self._pool: MappedPool | None = None
        self._log: IndexLog | None = None
        self._epoch = ""
        self._transports: dict[str, Transport] = {}
        self._descriptors: dict[str, bytes] = {}
        self._asks: dict[bytes, tuple[Ask, float]] = {}
        """With the time when it is answered in any case."""
        self._wanting: deque[tuple[bytes, Request]] = deque()
        self._granted: dict[tuple[bytes, int], float] = {}
        """With the time when it ends in any case."""
        self._forgetting: list[tuple[bytes, int]] = []

    def run(self, until: int) -> None:
        """Serve until a descriptor can be read, which is a pipe's end. Blocks."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(until, zmq.POLLIN)
        running = True
        while running:
            busy = self._asks or self._granted or self._forgetting
            for ready, _ in poller.poll(_TICK_MS if busy else _IDLE_MS):
                if ready is self._socket:
                    self._receive()
                else:
                    running = False
            self._follow_keeper()
            self._host.poll()
            if not self._host.num_forgetting:
                while self._forgetting:
                    sender, number = self._forgetting.pop()
                    self._send(sender, Forgotten(number))
            self._grant()
            self._tell()
        self._use(None)
        self._host.close()
        self._socket.close()

    def _receive(self) -> None:
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            try:
                sender, frame = self._socket.recv_multipart(flags=zmq.DONTWAIT)
                question = decode_with(questions, frame)
            except zmq.Again:
                return
            except (ValueError, msgspec.DecodeError) as error:
                _log.warning("frame", "refused a question about the host tier: %s", error)
                continue
            self._take(sender, question)

    def _take(self, sender: bytes, question: Question) -> None:
        match question:
            case Ask():
                self._asks[sender] = question, self._clock.monotonic_s() + HOLD_S
            case Request():
                if len(self._wanting) < _MAX_WAITING:
                    self._wanting.append((sender, question))
            case Release():
                self._granted.pop((sender, question.number), None)
                self._wanting = deque(
                    waiting for waiting in self._wanting if (waiting[0], waiting[1].number) != (sender, question.number)
                )
                self._send(sender, Released(question.number, self._records(question)))
            case Forget(number, keys, tenant):
                if keys is None:
                    self._host.clear(tenant)
                else:
                    self._host.remove(keys)
                self._forgetting.append((sender, number))

    def _records(self, question: Release) -> bytes:
        try:
            slots = integers(question.slots)
        except ValueError:
            return b""
        if self._pool is None or question.epoch != self._epoch or not len(slots):
            return b""
        if not 0 <= int(slots.min()) <= int(slots.max()) < self._pool.num_slots:
            return b""
        return self._pool.records(slots)

    def _follow_keeper(self) -> None:
        if self._host.pool is not self._pool:
            self._use(self._host.pool)

    def _use(self, pool: MappedPool | None) -> None:
        """Serve from this memory from now on. What is under way in another ends, at the readers with an error."""
        for transport in self._transports.values():
            transport.close()
        self._transports, self._descriptors = {}, {}
        self._pool = pool
        self._log, self._epoch = None, ""
        self._wanting.clear()
        self._granted.clear()
        if pool is not None:
            self._log, self._epoch = IndexLog(pool), secrets.token_hex(8)
            self._transports = open_transports(lambda: None, self._context, self._task.address, self._kv)
            for name, transport in self._transports.items():
                transport.register(Region(SLOTS, Buffer.over(pool.memory)))
                self._descriptors[name] = transport.descriptor()

    def _grant(self) -> None:
        now_s = self._clock.monotonic_s()
        self._granted = {reader: end_s for reader, end_s in self._granted.items() if end_s > now_s}
        while self._wanting and len(self._granted) < MAX_READERS:
            sender, request = self._wanting.popleft()
            if request.epoch == self._epoch:
                self._host.touch(request.keys)
                self._granted[sender, request.number] = now_s + self._task.timeout_s
                self._send(sender, Grant(request.number))

    def _tell(self) -> None:
        if not self._asks:
            return
        now_s = self._clock.monotonic_s()
        if self._log is not None:
            self._log.look()
        for sender, (ask, until_s) in list(self._asks.items()):
            known = ask.since if ask.epoch == self._epoch else 0
            new = ask.epoch != self._epoch or (self._log is not None and self._log.sequence > known)
            if new or until_s <= now_s:
                del self._asks[sender]
                self._send(sender, self._news(known))

    def _news(self, since: int) -> News:
        changes = _NOTHING if self._log is None else self._log.since(since, MAX_CHANGES)
        return News(
            self._epoch,
            self._task.block_bytes,
            0 if self._pool is None else self._pool.slot_bytes,
            0 if self._pool is None else self._pool.num_slots,
            {} if since else self._descriptors,
            since,
            changes.sequence,
            octets(changes.slots),
            changes.keys,
            octets(changes.generations),
        )

    def _send(self, reader: bytes, answer: Answer) -> None:
        # One that is gone, or takes nothing any more, asks again.
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([reader, encode(answer)], flags=zmq.DONTWAIT)


def main() -> None:
    """Serve until standard input ends."""
    # Nothing is buffered here: what follows the line is the pipe's end.
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            return
        line += byte
    task = msgspec.json.decode(line, type=Task)
    context = SecureContext(task.keys)
    server = HostServer(task, context, SystemClock())
    sys.stdout.write(server.endpoint + "\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sys.stdin.fileno())
    context.close()


if __name__ == "__main__":
    main()
