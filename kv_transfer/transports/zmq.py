"""Anywhere that TCP reaches: the peer packs ranges into frames of at most 2 MB and sends them over an encrypted socket.

The reader asks for one frame at a time, a few in flight, so that neither side ever queues more than `IN_FLIGHT_BYTES` a
peer. A range that fills a frame is sent from where it lies, without a copy: it may be read after the request was
answered, which the generation check, a later read, allows for.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

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
from ..layout import Runs
from .base import Notify, Read, Region, TransferResult, check_runs

FRAME_BYTES = 2 << 20
IN_FLIGHT_FRAMES = 8
IN_FLIGHT_BYTES = FRAME_BYTES * IN_FLIGHT_FRAMES
_MAX_RUNS = 1 << 16

_NOTHING = np.empty(0, np.uint8)
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


class _Frame:
    """A part of a read that travels as one frame."""

    def __init__(self, read_number: int, read: Read, runs: Runs) -> None:
        self.read_number = read_number
        self.source = read.source
        self.target = read.target
        self.runs = runs


class _Open:
    """A read that has frames outstanding."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.error = ""
        self.cancelled = False


class ZmqTransport:
    """See `Transport`.

    Args:
        notify: called when `poll` has news.
        context: makes the sockets.
        address: of this host, where peers reach it.
        on_bad_frame: called for each frame that is refused.
    """

    name = "zmq"

    def __init__(
        self, notify: Notify, context: SecureContext, address: str, on_bad_frame: Callable[[], None] | None = None
    ) -> None:
        self._notify = notify
        self._context = context
        self._on_bad_frame = on_bad_frame or (lambda: None)
        self._regions: dict[str, Region] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._reads: dict[int, _Open] = {}
        self._queued: dict[PeerId, deque[_Frame]] = {}
        self._endpoints: dict[PeerId, str] = {}
        self._done: list[TransferResult] = []
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
        self._wake(b"peers")

    def submit(self, read: Read) -> int:
        self._number += 1
        number = self._number
        with self._lock:
            target = self._regions.get(read.target)
            error = check_runs(read.runs, 1 << 62, len(target.buffer.array)) if target else f"no region {read.target}"
            if read.peer not in self._endpoints:
                error = f"{read.peer} is gone"
            frames = [] if error else [_Frame(number, read, runs) for runs in split_runs(read.runs)]
            if frames:
                self._reads[number] = _Open(len(frames))
                self._queued.setdefault(read.peer, deque()).extend(frames)
            else:
                self._done.append(TransferResult(number, error))
        if frames:
            self._wake(b"reads")
        else:
            self._notify()
        return number

    def poll(self) -> list[TransferResult]:
        with self._lock:
            done, self._done = self._done, []
        return done

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        wanted = set(numbers)
        draining = set()
        with self._lock:
            self._done = [result for result in self._done if result.number not in wanted]
            for peer, frames in self._queued.items():
                kept = deque(frame for frame in frames if frame.read_number not in wanted)
                for frame in frames:
                    if frame.read_number in wanted:
                        self._reads[frame.read_number].frames -= 1
                self._queued[peer] = kept
            for number in wanted:
                read = self._reads.get(number)
                if read is None:
                    continue
                if read.frames:
                    read.cancelled = True
                    draining.add(number)
                else:
                    del self._reads[number]
        return draining

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
        asked: dict[PeerId, dict[int, _Frame]] = {}
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
                    peer = next(p for p, dealer in dealers.items() if dealer is socket)
                    self._land(peer, socket, asked[peer])
            for peer, dealer in dealers.items():
                number = self._ask(peer, dealer, asked[peer], number)
        for monitor, peer in monitors.items():
            _close(dealers[peer], monitor)
        for socket in (self._server, self._wake_inner):
            socket.close()

    def _forget_asked(self, peer: PeerId, asked: dict[PeerId, dict[int, _Frame]]) -> None:
        """The connection broke: what was asked for over it is not answered any more."""
        frames, asked[peer] = asked[peer], {}
        for frame in frames.values():
            self._finish_frame(frame, f"the connection to {peer} broke")

    def _follow_peers(
        self,
        dealers: dict[PeerId, zmq.Socket[bytes]],
        monitors: dict[zmq.Socket[bytes], PeerId],
        asked: dict[PeerId, dict[int, _Frame]],
        poller: zmq.Poller,
    ) -> None:
        with self._lock:
            wanted = dict(self._endpoints)
            # A peer can be gone before we ever connected to it.
            gone = (dealers.keys() | self._queued.keys()) - wanted.keys()
            lost = {peer: list(self._queued.pop(peer, ())) for peer in gone}
        for peer, frames in lost.items():
            dealer = dealers.pop(peer, None)
            if dealer is not None:
                monitor = next(m for m, p in monitors.items() if p == peer)
                del monitors[monitor]
                poller.unregister(dealer)
                poller.unregister(monitor)
                _close(dealer, monitor)
                frames += asked.pop(peer).values()
            for frame in frames:
                self._finish_frame(frame, f"{peer} is gone")
        for peer, endpoint in wanted.items():
            if peer not in dealers:
                dealers[peer] = self._context.connect(self._identity, endpoint)
                monitor = dealers[peer].get_monitor_socket(zmq.EVENT_DISCONNECTED)
                monitors[monitor] = peer
                poller.register(dealers[peer], zmq.POLLIN)
                poller.register(monitor, zmq.POLLIN)
                asked[peer] = {}

    def _ask(self, peer: PeerId, dealer: zmq.Socket[bytes], asked: dict[int, _Frame], number: int) -> int:
        while len(asked) < IN_FLIGHT_FRAMES:
            with self._lock:
                queued = self._queued.get(peer)
                if not queued:
                    return number
                frame = queued.popleft()
            number += 1
            asked[number] = frame
            offsets, sizes = frame.runs.source_offsets, frame.runs.sizes
            dealer.send(msgspec.msgpack.encode(_Ask(number, frame.source, _pack(offsets), _pack(sizes))))
        return number

    def _serve(self) -> None:
        parts = self._server.recv_multipart()
        try:
            sender, body = parts
            ask = decode_with(_asks, body)
            offsets, sizes = _unpack(ask.offsets), _unpack(ask.sizes)
        except (ValueError, msgspec.DecodeError) as problem:
            self._on_bad_frame()
            _log.warning("kv-zmq", "refused a read request that is not one: %s", problem)
            return
        error, payload = self._pack_payload(ask.region, offsets, sizes)
        head = msgspec.msgpack.encode(_Answer(ask.number, error))
        # If the reader has gone, there is nobody to tell.
        with contextlib.suppress(zmq.ZMQError):
            self._server.send_multipart([sender, head, payload.data], copy=False, flags=zmq.DONTWAIT)

    def _pack_payload(self, name: str, offsets: np.ndarray, sizes: np.ndarray) -> tuple[str, np.ndarray]:
        region = self._regions.get(name)
        if region is None:
            return f"no region {name[:80]!r}", _NOTHING
        if len(offsets) != len(sizes) or not 0 < len(sizes) <= _MAX_RUNS or int(sizes.max(initial=0)) > FRAME_BYTES:
            return "malformed ranges", _NOTHING
        source = region.buffer.array
        target_offsets = np.cumsum(sizes) - sizes
        error = check_runs(Runs(offsets, target_offsets, sizes), len(source), FRAME_BYTES)
        if error:
            return error, _NOTHING
        if len(sizes) == 1:
            return "", source[offsets[0] : offsets[0] + sizes[0]]
        payload = np.empty(int(sizes.sum()), np.uint8)
        copy_runs.native(source, payload, offsets, target_offsets, sizes)
        return "", payload

    def _land(self, peer: PeerId, dealer: zmq.Socket[bytes], asked: dict[int, _Frame]) -> None:
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
            frame = asked.pop(answer.number, None)
            if frame is None:
                continue
            sizes = frame.runs.sizes
            received = np.frombuffer(payload.buffer, np.uint8)
            error_text = answer.error
            if not error_text and len(received) != int(sizes.sum()):
                error_text = f"{len(received)} bytes arrived, expected {int(sizes.sum())}"
            with self._lock:
                region = self._regions.get(frame.target)
            if not error_text and region is not None:
                target = region.buffer.array
                copy_runs.native(received, target, np.cumsum(sizes) - sizes, frame.runs.target_offsets, sizes)
            self._finish_frame(frame, error_text)

    def _finish_frame(self, frame: _Frame, error: str) -> None:
        with self._lock:
            read = self._reads.get(frame.read_number)
            if read is None:
                return
            read.frames -= 1
            read.error = read.error or error
            if read.frames:
                return
            del self._reads[frame.read_number]
            self._done.append(TransferResult(frame.read_number, "cancelled" if read.cancelled else read.error))
        self._notify()


def _close(dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    dealer.disable_monitor()
    monitor.close(linger=0)
    dealer.close()


def split_runs(runs: Runs, frame_bytes: int = FRAME_BYTES) -> Iterator[Runs]:
    """Cut runs into parts of at most ``frame_bytes`` each, in order. Pure."""
    source: list[int] = []
    target: list[int] = []
    sizes: list[int] = []
    room = frame_bytes
    for s, t, n in zip(runs.source_offsets.tolist(), runs.target_offsets.tolist(), runs.sizes.tolist(), strict=True):
        while n:
            if room == 0 or len(sizes) == _MAX_RUNS:
                yield _runs(source, target, sizes)
                source, target, sizes, room = [], [], [], frame_bytes
            part = min(n, room)
            source.append(s)
            target.append(t)
            sizes.append(part)
            s, t, n, room = s + part, t + part, n - part, room - part
    if sizes:
        yield _runs(source, target, sizes)


def _runs(source: list[int], target: list[int], sizes: list[int]) -> Runs:
    return Runs(np.array(source, np.int64), np.array(target, np.int64), np.array(sizes, np.int64))


def _pack(values: np.ndarray) -> bytes:
    return values.astype("<i8").tobytes()


def _unpack(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i8").astype(np.int64)
