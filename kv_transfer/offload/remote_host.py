"""Another node's host tier, as a reader's thread knows it: its connection, the copy of its index, what is under way."""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np
import zmq

from ...core.clock import Clock
from ...core.errors import TransferError
from ...core.wire import SecureContext
from ..transports import PREFERENCE, Transport
from ..transports.pieces import integers
from .jobs import OpenJob
from .keys import TierKey
from .remote_wire import Answer, Ask, News, Question, answers, encode
from .replica import Changes, IndexReplica

FIRST_AWAY_S = 0.5
LONGEST_AWAY_S = 5.0


class Batch:
    """Blocks of one job that are read at once."""

    def __init__(
        self, job: OpenJob, places: Sequence[int], keys: Sequence[TierKey], slots: np.ndarray, generations: np.ndarray
    ) -> None:
        self.job = job
        self.places = places
        """Among the job's keys."""
        self.keys = keys
        self.slots = slots
        self.generations = generations
        self.number = 0
        self.lane = -1
        """Of the memory where it lands; −1: it has none."""
        self.reading = False
        """A transport may still write into its lane."""
        self.over = False
        """Its job has been told."""


class RemoteHost:
    """See the module. Owned by one thread.

    Args:
        name: of the server.
        endpoint: where it listens.
        context: makes the socket.
        clock: for pauses.
        block_bytes: as ours are.
    """

    def __init__(self, name: str, endpoint: str, context: SecureContext, clock: Clock, block_bytes: int) -> None:
        self.name = name
        self.endpoint = endpoint
        self.replica: IndexReplica | None = None
        """None: it has no keeper at present, or cannot be read from."""
        self.epoch = ""
        self.slot_bytes = 0
        self.transport: Transport | None = None
        self.waiting: deque[Batch] = deque()
        self.under_way: dict[int, Batch] = {}
        """Asked for or granted, by number."""
        self.forgetting: set[int] = set()
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self.heard_s = 0.0
        self.retry_s = 0.0
        """When to connect again, without a socket."""
        self._context = context
        self._clock = clock
        self._block_bytes = block_bytes
        self._since = 0
        self._away_for_s = 0.0

    @property
    def peer(self) -> str:
        """What transports call it. Another keeper's memory is another peer."""
        return f"{self.name}/{self.epoch}"

    @property
    def usable(self) -> bool:
        """Whether it is asked for blocks."""
        return self.socket is not None and self.replica is not None

    def connect(self) -> None:
        """Open a connection, and ask what is new."""
        self.socket = self._context.connect(f"tier-{secrets.token_hex(8)}", self.endpoint)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.heard_s = self._clock.monotonic_s()
        self.ask()

    def disconnect(self) -> None:
        """Close the connection, for a while that is longer each time in a row."""
        if self.socket is None or self.monitor is None:
            return
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close()
        self.socket = self.monitor = None
        self._away_for_s = min(2 * self._away_for_s, LONGEST_AWAY_S) if self._away_for_s else FIRST_AWAY_S
        self.retry_s = self._clock.monotonic_s() + self._away_for_s

    def forget_pool(self) -> None:
        """What was known of its memory is of no use any more."""
        if self.transport is not None:
            self.transport.remove_peer(self.peer)
        self.transport = self.replica = None
        self.epoch, self._since = "", 0

    def came_back(self) -> bool:
        """A load has ended well: says whether that is news, and starts with short pauses again."""
        was_away, self._away_for_s = bool(self._away_for_s), 0.0
        return was_away

    def ask(self) -> None:
        """Ask what is new."""
        self.send(Ask(self.epoch, self._since))

    def send(self, question: Question) -> None:
        """Send, if there is a connection; a silent one is noticed by time."""
        if self.socket is not None:
            with contextlib.suppress(zmq.Again):
                self.socket.send(encode(question), flags=zmq.DONTWAIT)

    def receive(self) -> Answer | None:
        """The next message, or None: there is none now.

        Raises:
            msgspec.DecodeError: it is not one of ours.
        """
        if self.socket is None:
            return None
        try:
            frame = self.socket.recv(flags=zmq.DONTWAIT)
        except zmq.Again:
            return None
        self.heard_s = self._clock.monotonic_s()
        return answers.decode(frame)

    def follow(self, news: News, transports: dict[str, Transport]) -> None:
        """Bring the copy of the index up to date, and ask again.

        Args:
            news: what came.
            transports: ours.

        Raises:
            TransferError: nothing of ours reads from there, or its blocks are of another size.
            ValueError: the news make no sense.
        """
        try:
            if news.epoch != self.epoch:
                self.forget_pool()
                self.epoch = news.epoch
                if news.epoch:
                    self._open(news, transports)
            if self.replica is not None and news.since == self._since:
                generations = integers(news.generations).astype(np.uint64)
                self.replica.apply(Changes(news.sequence, integers(news.slots), news.keys, generations))
                self._since = news.sequence
        finally:
            self.ask()

    def _open(self, news: News, transports: dict[str, Transport]) -> None:
        if news.block_bytes != self._block_bytes:
            raise TransferError(f"{self.name} has blocks of {news.block_bytes} bytes, ours have {self._block_bytes}")
        tried = []
        for name in PREFERENCE:
            transport, descriptor = transports.get(name), news.transports.get(name)
            if transport is None or descriptor is None:
                continue
            try:
                transport.add_peer(self.peer, descriptor)
            except (TransferError, msgspec.MsgspecError) as error:
                tried.append(f"{name}: {error}")
                continue
            self.transport, self.slot_bytes = transport, news.slot_bytes
            self.replica = IndexReplica(news.num_slots)
            return
        raise TransferError(f"nothing reads from {self.name}: {'; '.join(tried) or 'no transport in common'}")
