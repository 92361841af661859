"""Messages between processes: one thread, one listening socket, one connection to each peer that we speak to first.

A reply travels back on the connection that the request came by, so that only workers listen. A connection that
breaks, or stays silent for longer than the heartbeats allow, is reported as a lost peer, once, and forgotten.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..core.ids import PeerId
from ..core.log import RateLimited, logger
from ..core.messages import Message, decode, encode
from ..core.wire import SecureContext

_MAX_RECEIVED_AT_ONCE = 256
_log = RateLimited()

OnMessage = Callable[[PeerId, Message], None]
OnLost = Callable[[PeerId], None]


class Mesh:
    """A process's connections.

    Args:
        peer: who we are.
        context: makes the sockets.
        address: this host's address to listen on, or None for a process that only connects.
        on_message: called on the mesh's thread with every valid message; may block to slow the senders down.
        on_lost: called on the mesh's thread when a peer can no longer be reached.
        on_bad_frame: called for every frame that is refused.
    """

    def __init__(
        self,
        peer: PeerId,
        context: SecureContext,
        address: str | None,
        on_message: OnMessage,
        on_lost: OnLost,
        on_bad_frame: Callable[[], None],
    ) -> None:
        self.peer = peer
        self.endpoint = ""
        self._context = context
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_bad_frame = on_bad_frame
        self._outbox: deque[tuple[PeerId, Message | str | None]] = deque()
        self._lock = threading.Lock()
        self._woken = False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._router: zmq.Socket[bytes] | None = None
        if address is not None:
            self._router, self.endpoint = context.bind(address)
        # From here on only the thread touches these.
        self._dealers: dict[PeerId, zmq.Socket[bytes]] = {}
        self._monitors: dict[zmq.Socket[bytes], PeerId] = {}
        self._poller = zmq.Poller()
        self._thread: threading.Thread | None = threading.Thread(target=self._guarded, name="mesh", daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        assert self._thread is not None
        self._thread.start()

    # ---- any thread -------------------------------------------------------------------------------------------------

    def connect(self, peer: PeerId, endpoint: str) -> None:
        """Open a connection to a listening peer; what is sent before it stands is kept."""
        self._post(peer, endpoint)

    def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, without a report."""
        self._post(peer, None)

    def send(self, peer: PeerId, message: Message) -> None:
        """Send, soon. Never blocks; a peer that is not connected is reported as lost."""
        self._post(peer, message)

    def close(self) -> None:
        """Stop. What was posted before is still handed to the sockets. Idempotent."""
        if self._thread is not None and self._thread.is_alive():
            self._post("", None)
            self._thread.join()
        self._thread = None
        self._wake_in.close()
        self._wake_out.close()

    def _post(self, peer: PeerId, what: Message | str | None) -> None:
        self._outbox.append((peer, what))
        with self._lock:
            if self._woken:
                return
            self._woken = True
        with contextlib.suppress(OSError):
            self._wake_out.send(b"x")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException:  # noqa: BLE001 - whatever it was, it is told
            logger.exception("the message thread broke; the process ends")
            os._exit(70)

    def _run(self) -> None:
        self._poller.register(self._wake_in, zmq.POLLIN)
        if self._router is not None:
            self._poller.register(self._router, zmq.POLLIN)
        running = True
        while running:
            for ready, _ in self._poller.poll():
                if ready == self._wake_in.fileno():
                    running = self._drain_outbox()
                elif ready is self._router:
                    self._receive(self._router, None)
                elif ready in self._monitors:
                    self._watch(ready)
                elif ready in self._dealers.values():
                    sender = next(peer for peer, dealer in self._dealers.items() if dealer is ready)
                    self._receive(ready, sender)
        for peer in list(self._dealers):
            self._drop(peer)
        if self._router is not None:
            self._router.close(linger=200)

    def _drain_outbox(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)
        with self._lock:
            self._woken = False
        while self._outbox:
            peer, what = self._outbox.popleft()
            if not peer:
                return False
            if what is None:
                self._drop(peer)
            elif isinstance(what, str):
                self._dial(peer, what)
            else:
                self._deliver(peer, what)
        return True

    def _dial(self, peer: PeerId, endpoint: str) -> None:
        if peer in self._dealers:
            return
        dealer = self._context.connect(self.peer, endpoint)
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._dealers[peer] = dealer
        self._monitors[monitor] = peer
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def _drop(self, peer: PeerId) -> None:
        dealer = self._dealers.pop(peer, None)
        if dealer is None:
            return
        monitor = next(m for m, p in self._monitors.items() if p == peer)
        del self._monitors[monitor]
        self._poller.unregister(dealer)
        self._poller.unregister(monitor)
        dealer.disable_monitor()
        monitor.close(linger=0)
        dealer.close(linger=200)

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        peer = self._monitors[monitor]
        event = recv_monitor_message(monitor, flags=zmq.NOBLOCK)
        if event["event"] == zmq.EVENT_DISCONNECTED:
            self._lose(peer)

    def _lose(self, peer: PeerId) -> None:
        self._drop(peer)
        self._on_lost(peer)

    def _deliver(self, peer: PeerId, message: Message) -> None:
        frame = encode(message)
        dealer = self._dealers.get(peer)
        try:
            if dealer is not None:
                dealer.send(frame, flags=zmq.NOBLOCK)
            elif self._router is not None:
                self._router.send_multipart([peer.encode(), frame], flags=zmq.NOBLOCK)
            else:
                self._lose(peer)
        except zmq.ZMQError as error:
            # Gone (EHOSTUNREACH), or so slow that its queue is full (EAGAIN).
            _log.warning("mesh-send", "cannot send to %s: %s", peer, error)
            self._lose(peer)

    def _receive(self, ready: zmq.Socket[bytes], sender: PeerId | None) -> None:
        for _ in range(_MAX_RECEIVED_AT_ONCE):
            try:
                parts = ready.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                name = parts[0].decode("ascii") if sender is None else sender
                frame = parts[1 if sender is None else 0]
                if len(parts) != (2 if sender is None else 1):
                    raise ValueError(f"{len(parts)} parts")
                message = decode(frame)
            except (ValueError, IndexError, msgspec.DecodeError) as error:
                self._on_bad_frame()
                _log.warning("mesh-frame", "refused a frame: %s", error)
                continue
            self._on_message(name, message)
            if sender is not None and sender not in self._dealers:
                return
