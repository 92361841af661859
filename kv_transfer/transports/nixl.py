"""One-sided reads through NIXL: RDMA between hosts, and between the memories of GPUs, where the machines have it.

NIXL (https://github.com/ai-dynamo/nixl) reads registered memory of another process over UCX. A descriptor names the
agent, its metadata and the regions' addresses; it travels in the handshake alone, so that NIXL needs neither a listener
nor etcd. Agents have random names: a peer that was started again is another agent.

A read that NIXL has begun cannot be stopped: the memory that it lands in stays in use until NIXL says that it has
ended. That is at once when the peer's process dies, within the network's own timeouts when its host does. A peer that
is merely stopped holds its reads until it goes on or dies.

UCX reads between GPUs' memories over NVLink only on threads that have a CUDA context, and may end the process on those
that have none (https://github.com/ai-dynamo/nixl/issues/2102). NIXL's own progress thread has none: with a GPU's memory
there is no such thread, and that of the transport, which has one, answers peers in its place.
"""

from __future__ import annotations

import importlib
import logging
import secrets
import threading
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Meta

from ...core.bounds import Count, Name
from ...core.errors import ConfigError, TransferError
from ...core.ids import PeerId
from ...core.log import RateLimited
from ..layout import Runs
from .base import Notify, Read, Region, TransferResult, check_runs
from .pieces import Piece, Pieces

PIECE_BYTES = 32 << 20
"""Between processes of one host NIXL copies inside the call that starts a read: this much cannot be cancelled."""

IN_FLIGHT_PIECES = 4
"""Of one peer: the next is on its way while one lands."""

_FIRST_WAIT_S = 20e-6
_LONGEST_WAIT_S = 0.5e-3
_ANSWER_WAIT_S = 1e-3
"""Where there is no progress thread: how long a peer's connection may wait to be answered."""
_SEGMENTS = {"host": "DRAM", "cuda": "VRAM"}

_log = RateLimited()


class _Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a region lies in its owner's address space."""

    address: Annotated[int, Meta(ge=0, lt=1 << 62)]
    num_bytes: Count
    kind: Name
    device: Count


class _Descriptor(msgspec.Struct, array_like=True, frozen=True):
    nixl: Name
    """The agent's name."""
    metadata: bytes
    regions: dict[Name, _Place]


class _Peer(NamedTuple):
    agent: str
    regions: dict[str, _Place]


class _UnderWay(NamedTuple):
    piece: Piece
    agent: str
    handle: Any


class NixlTransport:
    """See `Transport`.

    Args:
        notify: called when `poll` has news.
        device: number of the GPU in whose memory regions may be; None: none is.

    Raises:
        ConfigError: NIXL is not installed, or does not work here.
    """

    name = "nixl"
    converts = False
    memory = frozenset({"host", "cuda"})

    def __init__(self, notify: Notify, device: int | None = None) -> None:
        self._closed = True
        self._device = device
        api = load_nixl()
        self._name = f"tandem-{secrets.token_hex(12)}"
        if device is not None:
            _adopt_thread(device)
        try:
            # The progress thread answers peers while this process computes; every call below may come from any thread.
            config = api.nixl_agent_config(
                enable_prog_thread=device is None,
                backends=["UCX"],
                sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            )
            self._agent: Any = api.nixl_agent(self._name, config)
        except Exception as error:
            raise ConfigError(
                f"nixl: no agent could be started: {error}", fix="see the log above; UCX's ucx_info -d lists devices"
            ) from error
        self._closed = False
        self._pieces = Pieces(notify, PIECE_BYTES)
        self._regions: dict[str, Region] = {}
        self._places: dict[str, _Place] = {}
        self._registered: list[Any] = []
        self._lock = threading.Lock()
        self._peers: dict[PeerId, _Peer] = {}
        self._known: set[str] = set()
        """Agents whose metadata NIXL has. One that no peer is any more is forgotten when its reads have ended."""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._thread.start()

    def register(self, region: Region) -> None:
        """See `Transport`.

        Raises:
            ConfigError: UCX cannot read this memory.
        """
        place = _place_of(region)
        try:
            registered = self._agent.register_memory(
                [(place.address, place.num_bytes, place.device, "")], _SEGMENTS[place.kind]
            )
        except Exception as error:
            raise ConfigError(
                f"nixl: {place.num_bytes} bytes of {place.kind} memory could not be registered: {error}",
                fix="see the log above, and cuda_copy and cuda_ipc in ucx_info -d; kv.transport: cuda_ipc needs no UCX",
            ) from error
        self._registered.append(registered)
        self._regions[region.name] = region
        self._places[region.name] = place

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(_Descriptor(self._name, self._agent.get_agent_metadata(), self._places))

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        found = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        for name, place in found.regions.items():
            if place.kind not in _SEGMENTS:
                raise TransferError(
                    f"nixl: {peer} has its {name[:80]} in memory of an unknown kind: {place.kind[:80]!r}"
                )
        with self._lock:
            if found.nixl not in self._known:
                try:
                    loaded = self._agent.add_remote_agent(found.metadata)
                except Exception as error:
                    raise TransferError(f"nixl: {peer}'s metadata was refused: {error}") from error
                loaded = loaded.decode(errors="replace") if isinstance(loaded, bytes) else loaded
                if loaded != found.nixl:
                    self._agent.remove_remote_agent(loaded)
                    raise TransferError(f"nixl: {peer}'s metadata is of {loaded[:80]!r}, expected {found.nixl!r}")
                self._known.add(found.nixl)
            self._peers[peer] = _Peer(found.nixl, found.regions)
        self._wake.set()

    def remove_peer(self, peer: PeerId) -> None:
        with self._lock:
            self._peers.pop(peer, None)
        self._pieces.drop(peer, f"{peer} is gone")
        self._wake.set()

    def submit(self, read: Read) -> int:
        with self._lock:
            found = self._peers.get(read.peer)
        source = found.regions.get(read.source) if found else None
        target = self._places.get(read.target)
        if found is None:
            error = f"{read.peer} is gone"
        elif source is None:
            error = f"{read.peer} has no region {read.source}"
        elif target is None:
            error = f"there is no local region {read.target}"
        else:
            error = check_runs(read.runs, source.num_bytes, target.num_bytes)
        number = self._pieces.open(read, error)
        self._wake.set()
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
        self._wake.set()
        self._thread.join()
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()
        # The agent's destructor ends its connections, and with them every read that is still under way.
        del self._agent
        self._regions.clear()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        under_way: list[_UnderWay] = []
        idle_s = wait_s = None if self._device is None else _ANSWER_WAIT_S
        if self._device is not None:
            _adopt_thread(self._device)
        while True:
            self._wake.wait(wait_s)
            self._wake.clear()
            if self._stopping:
                break
            if self._device is not None:
                self._agent.get_new_notifs()  # there are none; it makes progress
            started = self._start(under_way)
            ended = [read for read in under_way if self._ended(read)]
            under_way = [read for read in under_way if read not in ended]
            self._forget(under_way)
            if started or ended:
                wait_s = _FIRST_WAIT_S
            elif under_way:
                wait_s = min(2 * (wait_s or _FIRST_WAIT_S), _LONGEST_WAIT_S)
            if not under_way:
                wait_s = 0.0 if self._pieces.waiting() else idle_s
        for read in under_way:
            self._release(read.handle)

    def _start(self, under_way: list[_UnderWay]) -> bool:
        """Start what waits and fits; says whether anything was."""
        started = False
        for peer in self._pieces.waiting():
            with self._lock:
                found = self._peers.get(peer)
            if found is None:
                self._pieces.drop(peer, f"{peer} is gone")
                continue
            room = IN_FLIGHT_PIECES - sum(read.piece.read.peer == peer for read in under_way)
            while room > 0:
                with self._lock:  # what is meant for a peer that came back is not read from its former life
                    piece = self._pieces.take(peer) if self._peers.get(peer) is found else None
                if piece is None:
                    break
                room -= 1
                started = True
                try:
                    handle = self._initialize(piece, found)
                except Exception as error:  # noqa: BLE001 - NIXL's errors have no common base
                    self._pieces.finish(piece, f"nixl: {error}")
                    continue
                read = _UnderWay(piece, found.agent, handle)
                if not self._ended(read, start=True):
                    under_way.append(read)
        return started

    def _initialize(self, piece: Piece, found: _Peer) -> Any:
        source, target, runs = found.regions[piece.read.source], self._places[piece.read.target], piece.runs
        # The peer may have come back, with less memory, since the read was submitted.
        if error := check_runs(runs, source.num_bytes, target.num_bytes):
            raise TransferError(error)
        return self._agent.initialize_xfer(
            "READ",
            self._agent.get_xfer_descs(_ranges(target, runs.target_offsets, runs), _SEGMENTS[target.kind]),
            self._agent.get_xfer_descs(_ranges(source, runs.source_offsets, runs), _SEGMENTS[source.kind]),
            found.agent,
        )

    def _ended(self, read: _UnderWay, *, start: bool = False) -> bool:
        """Start a read, or look after it; when it has ended, say so to its owner."""
        error = ""
        try:
            state = self._agent.transfer(read.handle) if start else self._agent.check_xfer_state(read.handle)
        except Exception as problem:  # noqa: BLE001 - NIXL's errors have no common base
            state, error = "ERR", f"nixl: {problem}"
        if state == "PROC":
            return False
        self._release(read.handle)
        self._pieces.finish(read.piece, "" if state == "DONE" else error or "nixl: the read failed")
        return True

    def _release(self, handle: Any) -> None:
        try:
            self._agent.release_xfer_handle(handle)
        except Exception as problem:  # noqa: BLE001 - NIXL's errors have no common base
            _log.warning("kv-nixl", "a transfer could not be released: %s", problem)

    def _forget(self, under_way: list[_UnderWay]) -> None:
        """Let NIXL forget agents that no peer is any more. Under a read it may not: the read would land unseen."""
        busy = {read.agent for read in under_way}
        with self._lock:
            for agent in self._known - {peer.agent for peer in self._peers.values()} - busy:
                self._known.discard(agent)
                try:
                    self._agent.remove_remote_agent(agent)
                except Exception as problem:  # noqa: BLE001 - NIXL's errors have no common base
                    _log.warning("kv-nixl", "an agent could not be forgotten: %s", problem)


def load_nixl() -> Any:
    """NIXL's Python interface, of the wheel for this torch's CUDA where both are there.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    wheels = ["nixl_cu13", "nixl_cu12"]
    if (torch.version.cuda or "13").startswith("12"):
        wheels.reverse()
    problems = []
    for wheel in wheels:
        try:
            api = importlib.import_module(f"{wheel}._api")
        except ImportError as error:
            problems.append(str(error))
            continue
        # It announces every agent on standard output, which is the command's own.
        logging.getLogger("nixl").setLevel(logging.WARNING)
        return api
    raise ConfigError(
        f"nixl is not installed ({'; '.join(problems)})", fix="pip install 'tandem[nixl]', on Linux"
    ) from None


def _adopt_thread(device: int) -> None:
    """Give the calling thread a GPU's CUDA context."""
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)  # a context that nothing was asked of need not be there


def _place_of(region: Region) -> _Place:
    buffer: Any = region.buffer
    if buffer.kind == "host":
        return _Place(buffer.array.ctypes.data, len(buffer.array), "host", 0)
    return _Place(buffer.address, buffer.num_bytes, "cuda", buffer.device)


def _ranges(place: _Place, offsets: np.ndarray, runs: Runs) -> np.ndarray:
    """Rows of address, bytes and device, as NIXL takes them."""
    rows = np.empty((len(offsets), 3), np.uint64)
    rows[:, 0] = offsets + place.address
    rows[:, 1] = runs.sizes
    rows[:, 2] = place.device
    return rows
