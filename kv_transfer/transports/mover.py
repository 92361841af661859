"""The end of a `MoverLink`: owns the transports of one process, and reads with them what another process orders."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ...core.errors import TandemError, TransferError
from ...core.frames import receive_frame, send_frame
from .base import Notify, Region, Transport
from .mover_messages import (
    MAX_FRAME_BYTES,
    MAX_TEXT,
    AddPeer,
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
    RemovePeer,
    Submit,
    decode_order,
    encode,
    read_of,
)

_CANCELLED = "cancelled"

Make = Callable[[Notify, Callable[[], None]], Mapping[str, Transport]]
"""Makes transports by name, given what to call when one has news, and for each frame that one refuses. Raises
TandemError when one that must be there cannot be."""


class Mover:
    """`run` is for a thread of its own, which also owns the transports.

    Args:
        connection: to a `MoverLink`.
        make: the transports that work here; called by the thread.
        regions: of this process's memory.
    """

    def __init__(self, connection: socket.socket, make: Make, regions: Sequence[Region]) -> None:
        self._connection = connection
        self._make = make
        self._regions = list(regions)
        self._wake_inner, self._wake_outer = socket.socketpair()
        self._wake_inner.setblocking(False)
        self._wake_outer.setblocking(False)
        self._bad_frames: deque[BadFrame] = deque()
        self._transports: dict[str, Transport] = {}
        # For each transport, its own numbers of reads and those of the orders.
        self._reads: dict[str, dict[int, int]] = {}
        self._held: list[Submit] = []
        self._copied: tuple[int, Callable[[], None]] = (0, lambda: None)
        self._settled = 0

    # ---- any thread -------------------------------------------------------------------------------------------------

    def copied(self, count: int, wait: Callable[[], None]) -> None:
        """Blocks of the cache have been copied, or the device has been told to.

        Args:
            count: how many so far.
            wait: blocks until the device has done it.
        """
        self._copied = (count, wait)
        self._wake()

    def _refused(self) -> None:
        self._bad_frames.append(BadFrame())
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is full of reasons to wake already, or the end has come
            self._wake_outer.send(b"\0")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Open the transports, obey until the other side is gone, and close them."""
        try:
            self._open()
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                selector.register(self._wake_inner, selectors.EVENT_READ)
                while True:
                    for key, _ in selector.select():
                        if key.fileobj is self._wake_inner:
                            self._wake_inner.recv(1 << 12)
                        else:
                            self._obey(self._receive())
                    self._start_held()
                    self._report()
        except EOFError:
            return
        finally:
            for transport in self._transports.values():
                transport.close()
            self._connection.close()
            self._wake_outer.close()
            self._wake_inner.close()

    def _open(self) -> None:
        try:
            self._transports.update(self._make(self._wake, self._refused))
            for transport in self._transports.values():
                for region in self._regions:
                    transport.register(region)
        except TandemError as problem:
            self._send(Offers([], str(problem)[:MAX_TEXT]))
            raise EOFError from None
        self._reads = {name: {} for name in self._transports}
        self._send(Offers([self._offer(transport) for transport in self._transports.values()]))

    def _offer(self, transport: Transport) -> Offer:
        return Offer(transport.name, transport.descriptor(), transport.converts, sorted(transport.memory))

    def _obey(self, order: Order) -> None:
        transport = self._transports.get(order.transport)
        if transport is None:
            return
        match order:
            case AddPeer():
                self._add_peer(transport, order)
            case RemovePeer():
                transport.remove_peer(order.peer)
            case Submit():
                self._held.append(order)
            case Cancel():
                self._cancel(transport, set(order.numbers))
            case Close():
                transport.close()
                del self._transports[order.transport]
                self._held = [held for held in self._held if held.transport != order.transport]
                self._send(Closed(order.transport))

    def _add_peer(self, transport: Transport, order: AddPeer) -> None:
        error = ""
        try:
            transport.add_peer(order.peer, order.descriptor)
        except TransferError as problem:
            error = problem.message
        except msgspec.DecodeError as problem:
            error = f"{transport.name}: {order.peer} sent a descriptor of something else: {problem}"
        self._send(PeerAdded(order.number, error[:MAX_TEXT]))

    def _start_held(self) -> None:
        """Start the reads that need not wait for a copy any more."""
        waiting = []
        for order in self._held:
            count, wait = self._copied
            if order.after > self._settled and order.after <= count:
                wait()
                self._settled = count
            if order.after > self._settled:
                waiting.append(order)
            else:
                number = self._transports[order.transport].submit(read_of(order))
                self._reads[order.transport][number] = order.number
        self._held = waiting

    def _cancel(self, transport: Transport, wanted: set[int]) -> None:
        reads = self._reads[transport.name]
        gone = [order.number for order in self._held if order.number in wanted]
        self._held = [order for order in self._held if order.number not in wanted]
        numbers = {own for own, theirs in reads.items() if theirs in wanted}
        for own in numbers - transport.cancel(numbers):
            gone.append(reads.pop(own))
        if gone:
            self._send(Ended(transport.name, [(number, _CANCELLED) for number in gone]))

    def _report(self) -> None:
        for name, transport in self._transports.items():
            reads = self._reads[name]
            results = [
                (reads.pop(result.number), result.error[:MAX_TEXT])
                for result in transport.poll()
                if result.number in reads
            ]
            if results:
                self._send(Ended(name, results))
        while self._bad_frames:
            self._send(self._bad_frames.popleft())

    def _send(self, news: News) -> None:
        try:
            send_frame(self._connection, encode(news))
        except OSError:
            raise EOFError from None

    def _receive(self) -> Order:
        try:
            return decode_order(receive_frame(self._connection, MAX_FRAME_BYTES))
        except OSError:
            raise EOFError from None
