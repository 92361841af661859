"""Between hosts over UCX, where it is faster than TCP through ZMQ: shared memory, RDMA, or UCX's own TCP.

The reader asks for one frame at a time, a few in flight, and the owner sends it as one tagged message. UCX has no
authentication of its own. So every request carries a code made with the cluster's key, for this owner alone and never
accepted twice; and a frame's tag is a random number that only the request told. What carries neither is dropped and
counted. The worker allows no access to its memory, and listens on the interface of this node's own address.

The bytes are not encrypted: where strangers read the network, take zmq.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import psutil
from msgspec import Meta

from ...core.bounds import Count, Name, Text
from ...core.errors import ConfigError
from ...core.ids import PeerId
from ...core.log import RateLimited
from ...core.messages import decode_with
from ...core.wire import SecureContext
from ...kernels import copy_runs
from ..rdma import rdma_devices
from .base import Notify, Read, Region, TransferResult, bytes_of
from .pieces import MAX_RUNS, Piece, Pieces, integers, octets, pack

FRAME_BYTES = 2 << 20
IN_FLIGHT_FRAMES = 8
_MAX_ANSWERS = 2 * IN_FLIGHT_FRAMES
_CANCEL_S = 0.1
"""How long UCX gets to cancel a dead connection's requests; with anything under way the thread wakes as often."""

_MAX_ARRIVING = 256
_CODE_BYTES = 32
_MAX_REQUEST_BYTES = 16 * MAX_RUNS + (64 << 10)
_REQUEST = 1
"""The tag of requests and refusals. Frames' tags are greater."""

_FIRST_FRAME_TAG = 1 << 62
_DRAIN_S = 2.0
"""How long frames that are on their way are awaited before a connection is closed under them."""

_log = RateLimited()
_dead: list[Any] = []
"""Endpoints that died, until the process ends."""

_Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Address = Annotated[bytes, Meta(min_length=1, max_length=16 << 10)]
_Tag = Annotated[int, Meta(ge=_FIRST_FRAME_TAG, le=2 * _FIRST_FRAME_TAG - 1)]
_Integers = Annotated[bytes, Meta(max_length=8 * MAX_RUNS)]


class _Descriptor(msgspec.Struct, frozen=True):
    ucx: _Token
    """Names this life of the transport."""
    address: _Address
    """Of its UCX worker."""


class _Ask(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Reader → owner: send these ranges, joined, as one message with this tag."""

    sender: _Token
    address: _Address
    number: Count
    frame: _Tag
    region: Name
    offsets: _Integers
    sizes: _Integers


class _Refusal(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Owner → reader: the frame will not come."""

    frame: _Tag
    error: Text


_descriptors = msgspec.msgpack.Decoder(_Descriptor)
_requests = msgspec.msgpack.Decoder(_Ask | _Refusal)


class _Owner:
    """A peer that we read from."""

    def __init__(self, endpoint: Any, descriptor: _Descriptor) -> None:
        self.endpoint = endpoint
        self.descriptor = descriptor
        self.asked: dict[int, Piece] = {}
        """By tag; what has not begun to arrive."""
        self.abandoned: set[int] = set()
        """Tags of frames that nobody waits for any more and that may still come."""
        self.leaves_by_s = 0.0


class _Reader:
    """A peer that reads from us."""

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.answers = 0
        self._newest = 0
        self._seen = 0

    def accepts(self, number: int) -> bool:
        """Whether a request of this number is new (the window of RFC 4303, appendix A2)."""
        ahead = number - self._newest
        if ahead > 0:
            self._seen = ((self._seen << min(ahead, 64)) | 1) & ((1 << 64) - 1)
            self._newest = number
            return True
        if ahead <= -64 or self._seen >> -ahead & 1:
            return False
        self._seen |= 1 << -ahead
        return True


class _Landing(NamedTuple):
    request: Any
    owner: _Owner
    piece: Piece
    staged: np.ndarray | None
    """Where the frame lands; None: where it belongs."""


class UcxTransport:
    """See `Transport`.

    Args:
        notify: called when `poll` has news.
        context: knows the cluster's key.
        address: of this node, where peers reach it: TCP is used on its interface alone.
        on_bad_frame: called for each message that is refused.

    Raises:
        ConfigError: ucxx is not installed, or does not work here.
    """

    name = "ucx"
    converts = False
    memory = frozenset({"host"})

    def __init__(
        self, notify: Notify, context: SecureContext, address: str, on_bad_frame: Callable[[], None] | None = None
    ) -> None:
        self._closed = True
        self._ucx, self._array = load_ucx()
        self._key = context.derive_key("tandem-kv-ucx")
        self._token = secrets.token_bytes(16)
        self._on_bad_frame = on_bad_frame or (lambda: None)
        self._pieces = Pieces(notify, FRAME_BYTES)
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()
        self._descriptors: dict[PeerId, _Descriptor] = {}
        ucx = self._ucx
        try:
            settings = {"NET_DEVICES": net_devices(address), "TLS": "^cuda"}
            self._worker: Any = ucx.UCXWorker(ucx.UCXContext(settings, (ucx.Feature.TAG, ucx.Feature.WAKEUP)))
            self._worker.init_blocking_progress_mode()
            self._address = bytes(ucx.UCXAddress.create_from_worker(self._worker))
        except ucx.UCXError as error:
            raise ConfigError(f"ucx: no worker could be started: {error}", fix="`ucx_info -d` lists devices") from error
        # From here on only the thread touches UCX.
        self._number = 0
        self._owners: dict[PeerId, _Owner] = {}
        self._readers: dict[bytes, _Reader] = {}
        self._arriving: list[tuple[Any, bytearray]] = []
        self._landing: list[_Landing] = []
        self._leaving: list[tuple[Any, Any, _Reader | None]] = []
        """Requests of messages on their way out, or away, and what they must not outlive."""
        self._parting: list[_Owner] = []
        """Owners that are no peers any more, whose last frames are awaited."""
        self._abandoned: set[int] = set()
        """Tags of those frames."""
        self._any_tag, self._any_mask = ucx.UCXXTag(0), ucx.UCXXTagMask(0)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-ucx", daemon=True)
        self._thread.start()

    def register(self, region: Region) -> None:
        self._regions[region.name] = region

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(_Descriptor(self._token, self._address))

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        found = decode_with(_descriptors, descriptor)
        with self._lock:
            self._descriptors[peer] = found
        self._wake()

    def remove_peer(self, peer: PeerId) -> None:
        with self._lock:
            self._descriptors.pop(peer, None)
        self._pieces.drop(peer, f"{peer} is gone")
        self._wake()

    def submit(self, read: Read) -> int:
        with self._lock:
            reachable = read.peer in self._descriptors
        number = self._pieces.submit(read, self._regions, reachable=reachable)
        self._wake()
        return number

    def poll(self) -> list[TransferResult]:
        return self._pieces.poll()

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        return self._pieces.cancel(numbers)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stopping = True
        self._wake()
        self._thread.join()
        os.close(self._wake_fd)
        self._regions.clear()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._worker.epoll_file_descriptor, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        stop_by_s = float("inf")
        while True:
            self._worker.progress()
            moved = self._take_messages()
            moved |= self._look_after_requests()
            self._follow_peers()
            waiting = bool(self._landing or self._leaving or self._abandoned or self._parting)
            if self._stopping:
                stop_by_s = min(stop_by_s, time.monotonic() + _DRAIN_S)
                if not waiting or time.monotonic() > stop_by_s:
                    break
            else:
                moved |= self._ask()
            if moved or not self._worker.arm():
                continue
            waiting |= any(owner.asked for owner in self._owners.values())
            if (self._wake_fd, select.POLLIN) in poller.poll(1e3 * _CANCEL_S if waiting else None):
                os.eventfd_read(self._wake_fd)
        ends: list[_Owner | _Reader] = [*self._owners.values(), *self._parting, *self._readers.values()]
        for end in ends:
            self._let_go(end.endpoint)
        self._parting.clear()
        # The worker's end is the end of every request: nothing is written after it.
        self._worker.cancel_inflight_requests()
        self._owners.clear()
        self._readers.clear()
        self._landing.clear()
        self._leaving.clear()
        self._arriving.clear()
        del self._worker

    def _take_messages(self) -> bool:
        """Receive whatever has come. A message that nobody asked for is dropped."""
        moved = False
        while (probe := self._worker.tag_probe(self._any_tag, self._any_mask, remove=True)).matched:
            moved = True
            acceptable = probe.length <= _MAX_REQUEST_BYTES and len(self._arriving) < _MAX_ARRIVING
            if probe.sender_tag == _REQUEST and acceptable:
                body = bytearray(max(1, probe.length))
                self._arriving.append((self._worker.tag_recv_with_handle(self._array(body), probe), body))
                continue
            owner = next((owner for owner in self._owners.values() if probe.sender_tag in owner.asked), None)
            if owner is not None:
                self._land(owner, owner.asked.pop(probe.sender_tag), probe)
                continue
            self._discard(probe)
            if probe.sender_tag in self._abandoned:
                self._abandoned.discard(probe.sender_tag)
            else:
                self._refuse("a message with a tag that nobody gave")
        return moved

    def _land(self, owner: _Owner, piece: Piece, probe: Any) -> None:
        sizes, targets = piece.runs.sizes, piece.runs.target_offsets
        target = bytes_of(self._regions, piece.read.target)
        error = ""
        if probe.length != int(sizes.sum()):
            error = f"{probe.length} bytes arrived, expected {int(sizes.sum())}"
        if error or target is None or self._pieces.cancelled(piece):
            self._discard(probe)
            self._pieces.finish(piece, error)
            return
        staged = None
        if len(sizes) == 1:
            landing = target[targets[0] : targets[0] + sizes[0]]
        else:
            landing = staged = np.empty(probe.length, np.uint8)
        request = self._worker.tag_recv_with_handle(self._array(landing), probe)
        self._landing.append(_Landing(request, owner, piece, staged))

    def _discard(self, probe: Any) -> None:
        """Have UCX forget a message: it is received into a byte, where it does not fit."""
        byte = bytearray(1)
        self._leaving.append((self._worker.tag_recv_with_handle(self._array(byte), probe), byte, None))

    def _refuse(self, why: str) -> None:
        self._on_bad_frame()
        _log.warning("kv-ucx", "refused %s", why)

    def _look_after_requests(self) -> bool:
        moved = False
        for landing in [landing for landing in self._landing if landing.request.completed]:
            moved = True
            self._landing.remove(landing)
            error = self._error(landing.request)
            target = bytes_of(self._regions, landing.piece.read.target)
            if not error and landing.staged is not None and target is not None:
                _, targets, sizes = landing.piece.runs
                copy_runs.native(landing.staged, target, np.cumsum(sizes) - sizes, targets, sizes)
            self._pieces.finish(landing.piece, error)
        for sent in [sent for sent in self._leaving if sent[0].completed]:
            moved = True
            self._leaving.remove(sent)
            if sent[2] is not None:
                sent[2].answers -= 1
        for arrived in [arrived for arrived in self._arriving if arrived[0].completed]:
            moved = True
            self._arriving.remove(arrived)
            if not self._error(arrived[0]):
                self._handle(bytes(arrived[1]))
        return moved

    def _error(self, request: Any) -> str:
        try:
            request.check_error()
        except self._ucx.UCXError as problem:
            return f"ucx: {problem}"
        return ""

    def _handle(self, message: bytes) -> None:
        code, body = message[:_CODE_BYTES], message[_CODE_BYTES:]
        if not hmac.compare_digest(code, self._code(self._token, body)):
            self._refuse("a request without the cluster's key")
            return
        try:
            request = decode_with(_requests, body)
            if isinstance(request, _Ask):
                self._answer(request)
            else:
                self._refused(request)
        except (ValueError, msgspec.DecodeError, self._ucx.UCXError) as problem:
            self._refuse(f"a request that is not one: {problem}")

    def _answer(self, ask: _Ask) -> None:
        reader = self._readers.get(ask.sender)
        if reader is None:
            reader = self._readers[ask.sender] = _Reader(self._connect(ask.address))
        if not reader.accepts(ask.number) or reader.answers >= _MAX_ANSWERS:
            self._refuse("a request that came before, or one too many")
            return
        if not reader.endpoint.alive:  # the link was cut, and the reader is back
            self._let_go(reader.endpoint)
            reader.endpoint = self._connect(ask.address)
        error, payload = pack(self._regions, ask.region, integers(ask.offsets), integers(ask.sizes), FRAME_BYTES)
        reader.answers += 1
        if error:
            self._send(reader.endpoint, ask.sender, _Refusal(ask.frame, error), reader)
        else:
            request = reader.endpoint.tag_send(self._array(payload), self._ucx.UCXXTag(ask.frame))
            self._leaving.append((request, payload, reader))

    def _refused(self, refusal: _Refusal) -> None:
        self._abandoned.discard(refusal.frame)
        for owner in self._owners.values():
            piece = owner.asked.pop(refusal.frame, None)
            if piece is not None:
                self._pieces.finish(piece, refusal.error)

    def _follow_peers(self) -> None:
        """Let go of owners that were removed or came back, and of both sides that died."""
        with self._lock:
            wanted = {} if self._stopping else dict(self._descriptors)
        for peer, owner in list(self._owners.items()):
            left = wanted.get(peer) != owner.descriptor
            if left or not owner.endpoint.alive:
                del self._owners[peer]
                asked, owner.asked = owner.asked, {}
                self._parting.append(owner)
                owner.leaves_by_s = time.monotonic() + _DRAIN_S
                owner.abandoned = set(asked)
                self._abandoned |= owner.abandoned
                for piece in asked.values():
                    self._pieces.finish(piece, f"{peer} is gone" if left else f"ucx: the connection to {peer} was lost")
        for owner in list(self._parting):
            # An endpoint that is closed while messages are on their way over it can take the peer's UCX down.
            owner.abandoned &= self._abandoned
            busy = owner.abandoned or any(landing.owner is owner for landing in self._landing)
            if not owner.endpoint.alive:
                # UCX cancels its requests first, in its own time.
                owner.leaves_by_s = min(owner.leaves_by_s, time.monotonic() + _CANCEL_S)
                busy = True
            if not busy or time.monotonic() > owner.leaves_by_s:
                self._parting.remove(owner)
                self._abandoned -= owner.abandoned
                self._let_go(owner.endpoint)
        for token, reader in list(self._readers.items()):
            if not reader.endpoint.alive and not reader.answers:
                del self._readers[token]
                self._let_go(reader.endpoint)

    def _ask(self) -> bool:
        """Ask for what waits, and fits."""
        moved = False
        for peer in self._pieces.waiting():
            with self._lock:
                descriptor = self._descriptors.get(peer)
            if descriptor is None:
                self._pieces.drop(peer, f"{peer} is gone")
                continue
            owner = self._owners.get(peer)
            if owner is None:
                try:
                    owner = self._owners[peer] = _Owner(self._connect(descriptor.address), descriptor)
                except self._ucx.UCXError as problem:
                    self._pieces.drop(peer, f"ucx: {peer} cannot be reached: {problem}")
                    continue
            while len(owner.asked) < IN_FLIGHT_FRAMES:
                with self._lock:  # what is meant for a peer that came back waits for its own connection
                    current = self._descriptors.get(peer) == owner.descriptor
                    piece = self._pieces.take(peer) if current else None
                if piece is None:
                    break
                moved = True
                self._number += 1
                frame = _FIRST_FRAME_TAG + secrets.randbelow(_FIRST_FRAME_TAG)
                owner.asked[frame] = piece
                offsets, sizes = octets(piece.runs.source_offsets), octets(piece.runs.sizes)
                ask = _Ask(self._token, self._address, self._number, frame, piece.read.source, offsets, sizes)
                try:
                    self._send(owner.endpoint, owner.descriptor.ucx, ask, None)
                except self._ucx.UCXError as problem:
                    del owner.asked[frame]
                    self._pieces.finish(piece, f"ucx: {peer} cannot be asked: {problem}")
        return moved

    def _let_go(self, endpoint: Any) -> None:
        """Close a connection that works. One that died is kept as it is: UCX 1.21 crashes when it is closed."""
        if endpoint.alive:
            endpoint.close_blocking()
        else:
            _dead.append(endpoint)

    def _connect(self, address: bytes) -> Any:
        found = self._ucx.UCXAddress.create_from_buffer(bytearray(address))
        return self._ucx.UCXEndpoint.create_from_worker_address(self._worker, found, True)

    def _send(self, endpoint: Any, to: bytes, message: _Ask | _Refusal, reader: _Reader | None) -> None:
        body = msgspec.msgpack.encode(message)
        data = bytearray(self._code(to, body) + body)
        self._leaving.append((endpoint.tag_send(self._array(data), self._ucx.UCXXTag(_REQUEST)), data, reader))

    def _code(self, to: bytes, body: bytes) -> bytes:
        """What only the cluster's processes can compute, for one receiver."""
        return hashlib.blake2b(to + body, digest_size=_CODE_BYTES, key=self._key).digest()


def load_ucx() -> tuple[Any, Any]:
    """ucxx's classes, and its wrapper of buffers.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    try:
        import ucxx._lib.libucxx as ucx
        from ucxx._lib.arr import Array
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"ucxx is not installed ({error})", fix="pip install 'tandem[ucx]', on Linux") from None
    return ucx, Array


def net_devices(address: str) -> str:
    """What UCX calls the interface that has this address, and every RDMA port that is up: only they may be used.

    Raises:
        ConfigError: no interface of this host has the address.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            up = [f"{port.device}:{port.port}" for port in rdma_devices() if port.active]
            return ",".join([name, *up])
    raise ConfigError(f"ucx: no interface of this host has the address {address}")
