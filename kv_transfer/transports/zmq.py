"""Anywhere that TCP reaches: the peer packs ranges into frames of at most 2 MB and sends them over an encrypted socket.

The reader asks for one frame at a time, a few in flight, so that neither side ever queues more than `IN_FLIGHT_BYTES` a
peer. A range that fills a frame is sent from where it lies, without a copy: it may be read after the request was
answered, which the generation check, a later read, allows for.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from ...core.errors import TransferError
from ...core.ids import PeerId
from ...core.log import RateLimited
from ...core.messages import decode_with
from ...core.wire import SecureContext
from ...kernels import copy_runs
from .base import Notify, Read, Region, TransferResult, bytes_of
from .pieces import Piece, Pieces, integers, octets, pack

FRAME_BYTES = 2 << 20
IN_FLIGHT_FRAMES = 8
IN_FLIGHT_BYTES = FRAME_BYTES * IN_FLIGHT_FRAMES

_log = RateLimited()


class _Ask(msgspec.Struct, array_like=True, frozen=True):
    """Reader → owner: send these ranges, joined."""

    number: int
    region: str
    offsets: bytes
    """int64, little-endian."""
    sizes: bytes


class _Answer(msgspec.Struct, array_like=True, frozen=True):
    """Owner → reader, before the payload."""

    number: int
    error: str = ""


_asks = msgspec.msgpack.Decoder(_Ask)
_answers = msgspec.msgpack.Decoder(_Answer)


class ZmqTransport:
    """See `Transport`.

    Args:
        notify: called when `poll` has news.
        context: makes the sockets.
        address: of this host, where peers reach it.
        on_bad_frame: called for each frame that is refused.
    """

    name = "zmq"
    converts = False
    memory = frozenset({"host"})

    def __init__(
        self, notify: Notify, context: SecureContext, address: str, on_bad_frame: Callable[[], None] | None = None
    ) -> None:
        self._context = context
        self._on_bad_frame = on_bad_frame or (lambda: None)
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()
        self._pieces = Pieces(notify, FRAME_BYTES)
        self._endpoints: dict[PeerId, str] = {}
        # From here on only the thread touches the sockets.
        self._server, self.endpoint = context.bind(address)
        wake = f"kv-zmq-{secrets.token_hex(8)}"
        self._wake_inner = context.pair(wake, bind=True)
        self._wake_outer = context.pair(wake, bind=False)
        self._identity = f"kv-{secrets.token_hex(8)}"
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="kv-zmq", daemon=True)
        self._thread.start()

    def register(self, region: Region) -> None:
        self._regions[region.name] = region

    def descriptor(self) -> bytes:
        return self.endpoint.encode()

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        endpoint = descriptor.decode(errors="replace")
        if not endpoint.startswith("tcp://"):
            raise TransferError(f"zmq: {peer} gave no TCP endpoint: {endpoint[:80]!r}")
        with self._lock:
            self._endpoints[peer] = endpoint
        self._wake(b"peers")

    def remove_peer(self, peer: PeerId) -> None:
        with self._lock:
            self._endpoints.pop(peer, None)
        self._pieces.drop(peer, f"{peer} is gone")
        self._wake(b"peers")

    def submit(self, read: Read) -> int:
        with self._lock:
            reachable = read.peer in self._endpoints
        number = self._pieces.submit(read, self._regions, reachable=reachable)
        self._wake(b"reads")
        return number

    def poll(self) -> list[TransferResult]:
        return self._pieces.poll()

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        return self._pieces.cancel(numbers)

    def close(self) -> None:
        if self._thread is not None:
            self._wake(b"stop")
            self._thread.join()
            self._thread = None
            self._wake_outer.close()
        self._regions.clear()

    def _wake(self, what: bytes) -> None:
        self._wake_outer.send(what)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        dealers: dict[PeerId, zmq.Socket[bytes]] = {}
        monitors: dict[zmq.Socket[bytes], PeerId] = {}
        asked: dict[PeerId, dict[int, Piece]] = {}
        poller = zmq.Poller()
        poller.register(self._server, zmq.POLLIN)
        poller.register(self._wake_inner, zmq.POLLIN)
        number = 0
        running = True
        while running:
            for socket, _ in poller.poll():
                if socket is self._wake_inner:
                    what = self._wake_inner.recv()
                    if what == b"stop":
                        running = False
                    elif what == b"peers":
                        self._follow_peers(dealers, monitors, asked, poller)
                elif socket is self._server:
                    self._serve()
                elif socket in monitors:
                    recv_monitor_message(socket)
                    self._forget_asked(monitors[socket], asked)
                else:
                    # A socket may have been closed on account of the same poll.
                    peer = next((p for p, dealer in dealers.items() if dealer is socket), None)
                    if peer is not None:
                        self._land(peer, socket, asked[peer])
            for peer, dealer in dealers.items():
                number = self._ask(peer, dealer, asked[peer], number)
        for monitor, peer in monitors.items():
            _close(dealers[peer], monitor)
        for socket in (self._server, self._wake_inner):
            socket.close()

    def _forget_asked(self, peer: PeerId, asked: dict[PeerId, dict[int, Piece]]) -> None:
        """The connection broke: what was asked for over it is not answered any more."""
        pieces, asked[peer] = asked[peer], {}
        for piece in pieces.values():
            self._pieces.finish(piece, f"the connection to {peer} broke")

    def _follow_peers(
        self,
        dealers: dict[PeerId, zmq.Socket[bytes]],
        monitors: dict[zmq.Socket[bytes], PeerId],
        asked: dict[PeerId, dict[int, Piece]],
        poller: zmq.Poller,
    ) -> None:
        with self._lock:
            wanted = dict(self._endpoints)
        for peer, dealer in list(dealers.items()):
            # A peer can have gone and come back, elsewhere, before we looked.
            if dealer.getsockopt_string(zmq.LAST_ENDPOINT) == wanted.get(peer):
                continue
            monitor = next(m for m, p in monitors.items() if p == peer)
            del dealers[peer], monitors[monitor]
            poller.unregister(dealer)
            poller.unregister(monitor)
            _close(dealer, monitor)
            for piece in asked.pop(peer).values():
                self._pieces.finish(piece, f"{peer} is gone")
        for peer, endpoint in wanted.items():
            if peer not in dealers:
                dealers[peer] = self._context.connect(self._identity, endpoint)
                monitor = dealers[peer].get_monitor_socket(zmq.EVENT_DISCONNECTED)
                monitors[monitor] = peer
                poller.register(dealers[peer], zmq.POLLIN)
                poller.register(monitor, zmq.POLLIN)
                asked[peer] = {}

    def _ask(self, peer: PeerId, dealer: zmq.Socket[bytes], asked: dict[int, Piece], number: int) -> int:
        endpoint = dealer.getsockopt_string(zmq.LAST_ENDPOINT)
        while len(asked) < IN_FLIGHT_FRAMES:
            with self._lock:  # what is meant for a peer that came back elsewhere waits for its own socket
                piece = self._pieces.take(peer) if self._endpoints.get(peer) == endpoint else None
            if piece is None:
                break
            number += 1
            asked[number] = piece
            offsets, sizes = piece.runs.source_offsets, piece.runs.sizes
            dealer.send(msgspec.msgpack.encode(_Ask(number, piece.read.source, octets(offsets), octets(sizes))))
        return number

    def _serve(self) -> None:
        parts = self._server.recv_multipart()
        try:
            sender, body = parts
            ask = decode_with(_asks, body)
            offsets, sizes = integers(ask.offsets), integers(ask.sizes)
        except (ValueError, msgspec.DecodeError) as problem:
            self._on_bad_frame()
            _log.warning("kv-zmq", "refused a read request that is not one: %s", problem)
            return
        error, payload = pack(self._regions, ask.region, offsets, sizes, FRAME_BYTES)
        head = msgspec.msgpack.encode(_Answer(ask.number, error))
        # If the reader has gone, there is nobody to tell.
        with contextlib.suppress(zmq.ZMQError):
            self._server.send_multipart([sender, head, payload.data], copy=False, flags=zmq.DONTWAIT)

    def _land(self, peer: PeerId, dealer: zmq.Socket[bytes], asked: dict[int, Piece]) -> None:
        while True:
            try:
                head, payload = dealer.recv_multipart(flags=zmq.DONTWAIT, copy=False)
                answer = decode_with(_answers, head.buffer)
            except zmq.Again:
                return
            except (ValueError, msgspec.DecodeError) as problem:
                self._on_bad_frame()
                _log.warning("kv-zmq", "refused an answer of %s: %s", peer, problem)
                continue
            piece = asked.pop(answer.number, None)
            if piece is None:
                continue
            sizes = piece.runs.sizes
            received = np.frombuffer(payload.buffer, np.uint8)
            error = answer.error
            if not error and len(received) != int(sizes.sum()):
                error = f"{len(received)} bytes arrived, expected {int(sizes.sum())}"
            target = bytes_of(self._regions, piece.read.target)
            if not error and target is not None:
                copy_runs.native(received, target, np.cumsum(sizes) - sizes, piece.runs.target_offsets, sizes)
            self._pieces.finish(piece, error)


def _close(dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    dealer.disable_monitor()
    monitor.close(linger=0)
    dealer.close()
