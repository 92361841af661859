"""To a process that moves KV for this one: orders go out, news come in.

Two threads do it: one writes, so that an order never waits for a process that is busy, the other reads.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

import msgspec

from ...core.errors import WorkerError
from ...core.frames import receive_frame, send_frame
from ...core.log import logger
from .base import Notify, Read, TransferResult
from .mover_messages import (
    MAX_FRAME_BYTES,
    BadFrame,
    Cancel,
    Close,
    Closed,
    Ended,
    News,
    Offer,
    Offers,
    Order,
    PeerAdded,
    decode_news,
    encode,
    submit_of,
)

_ANSWER_TIMEOUT_S = 10.0
_OFFER_TIMEOUT_S = 120.0


class MoverLink:
    """One thread, the owner, calls every method. When the other process has ended, so has every read.

    Args:
        connection: to a `Mover`, which nobody else uses.
        whose: the other process, for people: "rank 1".
        notify: called when `take_results` has something new.
        num_copies: how many blocks the other process has been told to copy: no read overtakes those.
        on_bad_frame: called for each frame from the network that the other process refused.
    """

    def __init__(
        self,
        connection: socket.socket,
        whose: str,
        notify: Notify,
        num_copies: Callable[[], int] = lambda: 0,
        on_bad_frame: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._whose = whose
        self._notify = notify
        self._num_copies = num_copies
        self._on_bad_frame = on_bad_frame
        self._number = 0
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # What both the owner and the reading thread touch.
        self._changed = threading.Condition()
        self._lost = False
        self._offers: Offers | None = None
        self._running: dict[int, str] = {}
        self._done: list[tuple[str, TransferResult]] = []
        self._asked: set[int] = set()
        self._answers: dict[int, str] = {}
        self._open: set[str] = set()
        self._threads = [
            threading.Thread(target=target, name=f"kv-{name}-{whose}", daemon=True)
            for name, target in (("orders", self._write), ("news", self._read))
        ]
        for thread in self._threads:
            thread.start()

    def offers(self) -> list[Offer]:
        """The other process's transports. Blocks until it has told.

        Raises:
            WorkerError: it cannot, ended, or told nothing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._offers is not None, _OFFER_TIMEOUT_S)
            if self._offers is None or self._offers.error:
                why = f": {self._offers.error}" if self._offers else ""
                raise WorkerError(f"{self._whose} offers no transports{why}", fix="see its log")
            return self._offers.transports

    def next_number(self) -> int:
        """A number that no order has had."""
        self._number += 1
        return self._number

    def send(self, order: Order) -> None:
        """Give an order that nobody answers. Does not block."""
        self._outbox.put(encode(order))

    def ask(self, number: int, order: Order) -> str:
        """Give an order, and return the answer to it: why it failed, or "". Blocks for some seconds at most.

        Args:
            number: the order's.
            order: what is answered.

        Raises:
            TimeoutError: there was no answer.
        """
        with self._changed:
            self._asked.add(number)
            self.send(order)
            self._changed.wait_for(lambda: self._lost or number in self._answers, _ANSWER_TIMEOUT_S)
            self._asked.discard(number)
            if number in self._answers:
                return self._answers.pop(number)
            if self._lost:
                return f"{self._whose} has ended"
        raise TimeoutError(f"{self._whose} did not answer within {_ANSWER_TIMEOUT_S:g} s")

    def submit(self, transport: str, read: Read) -> int:
        """Start a read, and return its number. Does not block."""
        number = self.next_number()
        frame = encode(submit_of(transport, number, read, self._num_copies()))
        error = ""
        if len(frame) > MAX_FRAME_BYTES:
            error = f"a read of {len(read.runs.sizes)} ranges is too long to be told to {self._whose}"
        with self._changed:
            if self._lost or transport not in self._open:
                error = f"{self._whose} has ended"
            if error:
                self._done.append((transport, TransferResult(number, error)))
            else:
                self._running[number] = transport
        if error:
            self._notify()
        else:
            self._outbox.put(frame)
        return number

    def take_results(self, transport: str) -> list[TransferResult]:
        """The reads of a transport that ended since the last call."""
        with self._changed:
            taken = [result for name, result in self._done if name == transport]
            self._done = [(name, result) for name, result in self._done if name != transport]
        return taken

    def cancel(self, transport: str, numbers: set[int]) -> set[int]:
        """Give reads up. Returns those that `take_results` will still report."""
        with self._changed:
            self._done = [(name, result) for name, result in self._done if result.number not in numbers]
            draining = numbers & self._running.keys()
        if draining:
            self.send(Cancel(transport, sorted(draining)))
        return draining

    def close_transport(self, transport: str) -> None:
        """Let the other process close a transport. Blocks until it has, for some seconds at most. Idempotent."""
        with self._changed:
            if transport not in self._open or self._lost:
                return
            self.send(Close(transport))
            if not self._changed.wait_for(lambda: self._lost or transport not in self._open, _ANSWER_TIMEOUT_S):
                logger.warning("%s has not closed its transport %s in time", self._whose, transport)
            self._open.discard(transport)
            self._running = {number: name for number, name in self._running.items() if name != transport}

    def close(self) -> None:
        """End both threads, and the connection. Idempotent."""
        self._outbox.put(None)
        with contextlib.suppress(OSError):  # closed already, by either side
            self._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._connection.close()

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                send_frame(self._connection, frame)
            except OSError:  # the reading thread sees it, too
                return

    def _read(self) -> None:
        try:
            while True:
                self._hear(decode_news(receive_frame(self._connection, MAX_FRAME_BYTES)))
        except (EOFError, OSError):
            pass
        except (ValueError, msgspec.DecodeError) as error:
            logger.error("%s sent what is no message: %s", self._whose, error)
        finally:
            with self._changed:
                self._lost = True
                why = f"{self._whose} has ended"
                self._done += [(name, TransferResult(number, why)) for number, name in self._running.items()]
                self._running.clear()
                self._changed.notify_all()
            self._notify()

    def _hear(self, news: News) -> None:
        if isinstance(news, BadFrame):
            self._on_bad_frame()
            return
        with self._changed:
            match news:
                case Offers():
                    self._offers = news
                    self._open = {offer.name for offer in news.transports}
                case PeerAdded():
                    if news.number in self._asked:
                        self._answers[news.number] = news.error
                case Closed():
                    self._open.discard(news.transport)
                case Ended():
                    for number, error in news.results:
                        if self._running.pop(number, None) is not None:
                            self._done.append((news.transport, TransferResult(number, error)))
            self._changed.notify_all()
        if isinstance(news, Ended):
            self._notify()
