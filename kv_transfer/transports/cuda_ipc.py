"""Between GPUs of one host, or on one: the peer's memory is mapped, and a kernel of ours copies out of it.

Memory is opened by its handle (cudaIpcMemHandle_t, CUDA C++ Programming Guide 3.2.9); of this very process, which may
not open its own, it is used where it is. What lies in the host's memory, as generations do, is mapped as by `shm`, and
copied on the spot: it is small.

The owner thread alone launches copies, and maps and unmaps memory. A second thread only sleeps until the event behind
each copy has fired, which CUDA allows any thread, and calls ``notify``; it starts nothing on the GPU, so that it
disturbs neither the order of work there nor the recording of a graph.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Iterable

import msgspec
import numpy as np

from ...core.errors import TransferError
from ...core.ids import PeerId
from ...core.log import logger
from ...kernels import cuda_memory, gather
from ..copy_queue import Copy, CopyPlans, CopyQueue
from ..memory import DeviceBuffer, SharedMemory, host_id, map_shared
from .base import Notify, Read, Region, TransferResult, bytes_of, check_runs, copy_checked, shared_of

_PROCESS = secrets.token_hex(12)
"""This process, unlike its number, is no other in any container."""
_here: weakref.WeakValueDictionary[int, cuda_memory.Allocation] = weakref.WeakValueDictionary()
"""Registered memory of this process, by address: a reader keeps it alive."""


class _Memory(msgspec.Struct, frozen=True):
    """A region of a GPU's memory."""

    uuid: str
    handle: bytes
    address: int
    """In its own process."""
    num_bytes: int


class _Descriptor(msgspec.Struct, frozen=True):
    process: str
    host: str
    device_regions: dict[str, _Memory]
    host_regions: dict[str, SharedMemory]


class _Peer:
    """A peer's memory as it is seen here."""

    def __init__(self) -> None:
        self.host_regions: dict[str, np.ndarray] = {}
        self.places: dict[str, tuple[int, int]] = {}
        """Address and bytes of each region."""
        self.opened: list[int] = []
        """Addresses that are to be closed."""
        self.kept: list[cuda_memory.Allocation] = []
        """Of this process."""
        self.num_reads = 0
        """In flight: until they end, the memory stays mapped."""
        self.gone = False


class _Flight:
    """A copy in flight."""

    def __init__(self, number: int, peer: PeerId, memory: _Peer, copy: Copy) -> None:
        self.number = number
        self.peer = peer
        self.memory = memory
        self.copy = copy
        self.cancelled = False


class CudaIpcTransport:
    """See `Transport`.

    Args:
        notify: called when `poll` has news.
        device: the GPU's number in this process.
        programs: of a copy at a time: processors of the GPU that it may take from others.
    """

    name = "cuda_ipc"
    converts = True
    memory = frozenset({"cuda"})

    def __init__(self, notify: Notify, device: int, programs: int) -> None:
        self._notify = notify
        self._device = device
        self._copies = CopyQueue(device, CopyPlans.of(programs))
        self._copies.warm_up()
        self._regions: dict[str, Region] = {}
        self._peers: dict[PeerId, _Peer] = {}
        self._number = 0
        self._flights: deque[_Flight] = deque()
        self._done: list[TransferResult] = []
        self._started: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._wait, name="kv-cuda-ipc", daemon=True)
        self._thread.start()

    def register(self, region: Region) -> None:
        self._regions[region.name] = region
        if isinstance(region.buffer, DeviceBuffer) and region.buffer.memory is not None:
            _here[region.buffer.address] = region.buffer.memory

    def descriptor(self) -> bytes:
        buffers = {name: region.buffer for name, region in self._regions.items()}
        memories = {
            name: _Memory(cuda_memory.uuid_of(buffer.device), buffer.handle, buffer.address, buffer.num_bytes)
            for name, buffer in buffers.items()
            if isinstance(buffer, DeviceBuffer)
        }
        return msgspec.msgpack.encode(_Descriptor(_PROCESS, host_id(), memories, shared_of(self._regions)))

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        try:
            found = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.DecodeError as error:
            raise TransferError(f"{peer} describes no GPU memory: {error}") from None
        if found.host != host_id():
            raise TransferError(f"{peer} is on another host")
        memory = _Peer()
        try:
            memory.host_regions = {name: map_shared(shared) for name, shared in found.host_regions.items()}
            for name, region in found.device_regions.items():
                address = self._reach(peer, memory, region, found.process == _PROCESS)
                memory.places[name] = address, region.num_bytes
        except TransferError:
            self._let_go(memory)
            raise
        self.remove_peer(peer)
        self._peers[peer] = memory

    def remove_peer(self, peer: PeerId) -> None:
        memory = self._peers.pop(peer, None)
        if memory is not None:
            memory.gone = True
            if not memory.num_reads:
                self._let_go(memory)

    def submit(self, read: Read) -> int:
        self._number += 1
        try:
            error = self._start(self._number, read)
        except (OSError, RuntimeError) as problem:
            error = f"the copy could not be started: {problem}"
        if error is not None:
            self._done.append(TransferResult(self._number, error))
            self._notify()
        return self._number

    def poll(self) -> list[TransferResult]:
        self._land()
        done, self._done = self._done, []
        return done

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        wanted = set(numbers)
        self._land()
        self._done = [result for result in self._done if result.number not in wanted]
        # A kernel that was launched cannot be called back.
        draining = {flight.number for flight in self._flights if flight.number in wanted}
        for flight in self._flights:
            flight.cancelled |= flight.number in draining
        return draining

    def close(self) -> None:
        if self._thread is None:
            return
        self._started.put(None)
        self._thread.join()
        self._thread = None
        try:
            self._copies.synchronize()
        except RuntimeError as error:
            logger.error("KV copies did not end: %s", error)
        self._land()
        for peer in list(self._peers):
            self.remove_peer(peer)
        self._regions.clear()

    # ---- the owner thread -------------------------------------------------------------------------------------------

    def _reach(self, peer: PeerId, memory: _Peer, region: _Memory, of_this_process: bool) -> int:
        """Where a peer's region is seen from here; notes in ``memory`` what keeps it there."""
        device = cuda_memory.device_of(region.uuid)
        try:
            if device is not None and not cuda_memory.can_read(self._device, device):
                raise TransferError(
                    f"GPU {cuda_memory.uuid_of(self._device)} cannot read the memory of GPU {region.uuid} of {peer}"
                )
            if not of_this_process:
                address = cuda_memory.open_handle(region.handle, self._device)
                memory.opened.append(address)
                return address
            allocation = _here.get(region.address)
            if device is None or allocation is None:
                raise TransferError(f"{peer}'s memory is gone")
            cuda_memory.read_from(self._device, device)
            memory.kept.append(allocation)
            return region.address
        except (OSError, TypeError, ValueError) as error:
            hint = "" if device is not None else ", which this process does not see,"
            raise TransferError(f"{peer}'s memory on GPU {region.uuid}{hint} cannot be opened: {error}") from None

    def _start(self, number: int, read: Read) -> str | None:
        """Start a read. Returns None when it is in flight, else how it ended: "", or why not."""
        peer, region = self._peers.get(read.peer), self._regions.get(read.target)
        if peer is None:
            return f"{read.peer} is gone"
        converts = read.source_dtype != read.target_dtype
        if read.source in peer.host_regions and not converts:
            return copy_checked(read, peer.host_regions[read.source], bytes_of(self._regions, read.target))
        if read.source not in peer.places:
            return f"{read.peer} has no region {read.source}{' on a GPU' if converts else ''}"
        if region is None or not isinstance(region.buffer, DeviceBuffer):
            return f"there is no local region {read.target} on a GPU"
        dtypes = (read.source_dtype, read.target_dtype) if converts else ("", "")
        if converts and not gather.DTYPES.keys() >= set(dtypes):
            return f"{dtypes[0]} cannot become {dtypes[1]}"
        elements = (gather.DTYPES[dtype].itemsize if dtype else 1 for dtype in dtypes)
        address, num_bytes = peer.places[read.source]
        error = check_runs(read.runs, num_bytes, region.buffer.num_bytes, *elements)
        if error or not len(read.runs.sizes):
            return error
        copy = self._copies.start_runs(address, region.buffer.address, read.runs, dtypes)
        peer.num_reads += 1
        self._flights.append(_Flight(number, read.peer, peer, copy))
        self._started.put(copy)
        return None

    def _land(self) -> None:
        """Note the copies that have ended. They end in the order in which they were started."""
        while self._flights:
            flight, error = self._flights[0], ""
            try:
                if not flight.copy.query():
                    return
            except RuntimeError as problem:  # the device is lost, as the next step will tell, too
                error = f"the copy failed: {problem}"
            self._flights.popleft()
            if flight.memory.gone:
                error = error or f"{flight.peer} is gone"
            if flight.cancelled:
                error = "cancelled"
            self._done.append(TransferResult(flight.number, error))
            flight.memory.num_reads -= 1
            if flight.memory.gone and not flight.memory.num_reads:
                self._let_go(flight.memory)

    def _let_go(self, memory: _Peer) -> None:
        """Unmap a peer's memory, which no copy reads any more."""
        for address in memory.opened:
            try:
                cuda_memory.close_handle(address, self._device)
            except (OSError, RuntimeError) as error:
                logger.warning("a peer's GPU memory could not be unmapped: %s", error)
        memory.opened.clear()
        memory.kept.clear()

    # ---- the other thread -------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        self._copies.adopt_thread()
        while (copy := self._started.get()) is not None:
            with contextlib.suppress(RuntimeError):  # `poll` finds it, too
                copy.synchronize()
            self._notify()
