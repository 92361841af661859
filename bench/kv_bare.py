"""What each transport is measured against: the same bytes by the same means, with nothing of Tandem's around them.

Each baseline has two halves. The owner's `serve` takes part in one pull, where the means is not one-sided; the reader's
`pull` returns when the bytes have arrived.
"""

from __future__ import annotations

import secrets
import select
from typing import Any, Protocol

import numpy as np
import zmq

from ..core.wire import SecureContext
from ..kernels import copy_runs
from ..kv_transfer.layout import Runs
from ..kv_transfer.memory import Buffer, map_shared
from ..kv_transfer.transports.nixl import load_nixl
from ..kv_transfer.transports.ucx import FRAME_BYTES, IN_FLIGHT_FRAMES, load_ucx, net_devices

ADDRESS = "127.0.0.1"


class Owner(Protocol):
    """The half that has the bytes."""

    def told(self) -> Any:
        """What the reader must know."""
        ...

    def serve(self, num_bytes: int) -> None:
        """Take part in one pull of so many bytes."""
        ...


class Reader(Protocol):
    """The half that wants them."""

    def pull(self, runs: Runs) -> None:
        """Blocks until the bytes have arrived."""
        ...


class MemcpyOwner:
    """shm: the peer's memory, mapped."""

    def __init__(self, source: Buffer) -> None:
        self._source = source

    def told(self) -> Any:
        return self._source.shared

    def serve(self, num_bytes: int) -> None:
        """The reader needs nobody."""


class MemcpyReader:
    """One memcpy a run, on the calling thread."""

    def __init__(self, told: Any, target: Buffer) -> None:
        self._source = map_shared(told)
        self._target = target.array

    def pull(self, runs: Runs) -> None:
        copy_runs.native(self._source, self._target, *runs)


class ZmqOwner:
    """zmq: a ROUTER that answers each request with a frame of contiguous memory, which is not copied."""

    def __init__(self, source: Buffer, context: SecureContext) -> None:
        self._source = source.array
        self._socket, self._endpoint = context.bind(ADDRESS)

    def told(self) -> Any:
        return self._endpoint

    def serve(self, num_bytes: int) -> None:
        for start in range(0, num_bytes, FRAME_BYTES):
            sender, _ = self._socket.recv_multipart()
            frame = self._source[start : min(start + FRAME_BYTES, num_bytes)]
            self._socket.send_multipart([sender, frame.data], copy=False)


class ZmqReader:
    """Asks for frames, as many at a time as the transport does, and drops them."""

    def __init__(self, told: Any, context: SecureContext) -> None:
        self._socket: zmq.Socket[bytes] = context.connect(secrets.token_hex(8), told)

    def pull(self, runs: Runs) -> None:
        frames = -(-runs.num_bytes // FRAME_BYTES)
        for number in range(frames + IN_FLIGHT_FRAMES):
            if number >= IN_FLIGHT_FRAMES:
                self._socket.recv(copy=False)
            if number < frames:
                self._socket.send(b"?")


class NixlOwner:
    """nixl: an agent with its memory registered."""

    def __init__(self, source: Buffer) -> None:
        api = load_nixl()
        self._agent = api.nixl_agent(secrets.token_hex(8), api.nixl_agent_config(backends=["UCX"]))
        self._address = source.array.ctypes.data
        self._agent.register_memory([(self._address, len(source.array), 0, "")], "DRAM")

    def told(self) -> Any:
        return self._agent.get_agent_metadata(), self._address

    def serve(self, num_bytes: int) -> None:
        """The reader needs nobody."""


class NixlReader:
    """One transfer of all runs; asks for its state until it is done."""

    def __init__(self, told: Any, target: Buffer) -> None:
        api = load_nixl()
        self._agent = api.nixl_agent(secrets.token_hex(8), api.nixl_agent_config(backends=["UCX"]))
        self._target = target.array.ctypes.data
        self._agent.register_memory([(self._target, len(target.array), 0, "")], "DRAM")
        metadata, self._source = told
        self._peer = self._agent.add_remote_agent(metadata)

    def pull(self, runs: Runs) -> None:
        sides = []
        for address, offsets in ((self._target, runs.target_offsets), (self._source, runs.source_offsets)):
            rows = np.zeros((len(offsets), 3), np.uint64)
            rows[:, 0], rows[:, 1] = offsets + address, runs.sizes
            sides.append(self._agent.get_xfer_descs(rows, "DRAM"))
        handle = self._agent.initialize_xfer("READ", *sides, self._peer)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"nixl: {state}")


class _Ucx:
    def __init__(self) -> None:
        self._ucx, self._array = load_ucx()
        settings = {"NET_DEVICES": net_devices(ADDRESS), "TLS": "^cuda"}
        context = self._ucx.UCXContext(settings, (self._ucx.Feature.TAG, self._ucx.Feature.WAKEUP))
        self._worker = self._ucx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self._poller = select.poll()
        self._poller.register(self._worker.epoll_file_descriptor, select.POLLIN)
        self._mask = self._ucx.UCXXTagMaskFull

    def _address(self) -> bytes:
        return bytes(self._ucx.UCXAddress.create_from_worker(self._worker))

    def _connect(self, address: bytes) -> Any:
        found = self._ucx.UCXAddress.create_from_buffer(bytearray(address))
        return self._ucx.UCXEndpoint.create_from_worker_address(self._worker, found, True)

    def _wait(self, request: Any) -> None:
        while not request.completed:
            self._worker.progress()
            if not request.completed and self._worker.arm():
                self._poller.poll()
        request.check_error()


class UcxOwner(_Ucx):
    """ucx: sends frames of contiguous memory, as many at a time as the transport does."""

    def __init__(self, source: Buffer) -> None:
        super().__init__()
        self._source = source.array
        self._endpoint: Any = None

    def told(self) -> Any:
        return self._address()

    def serve(self, num_bytes: int) -> None:
        if self._endpoint is None:
            address = bytearray(4096)
            self._wait(self._worker.tag_recv(self._array(address), self._ucx.UCXXTag(1)))
            self._endpoint = self._connect(bytes(address[2 : 2 + int.from_bytes(address[:2], "little")]))
        asked = bytearray(1)
        requests = []
        for start in range(0, num_bytes, FRAME_BYTES):
            self._wait(self._worker.tag_recv(self._array(asked), self._ucx.UCXXTag(2)))
            frame = self._source[start : min(start + FRAME_BYTES, num_bytes)]
            requests.append(self._endpoint.tag_send(self._array(frame), self._ucx.UCXXTag(3)))
        for request in requests:
            self._wait(request)


class UcxReader(_Ucx):
    """Receives frames where they stay, one after the other; sleeps when nothing moves."""

    def __init__(self, told: Any, target: Buffer) -> None:
        super().__init__()
        self._target = target.array
        self._endpoint = self._connect(told)
        address = self._address()
        self._hello = bytearray(len(address).to_bytes(2, "little") + address)
        self._request = self._endpoint.tag_send(self._array(self._hello), self._ucx.UCXXTag(1))

    def pull(self, runs: Runs) -> None:
        left = runs.num_bytes
        sent: list[Any] = []
        landing: list[Any] = []
        question = bytearray(1)
        start = 0
        while left > 0 or landing:
            while left > 0 and len(landing) < IN_FLIGHT_FRAMES:
                frame = self._target[start : start + min(left, FRAME_BYTES)]
                start, left = start + len(frame), left - len(frame)
                landing.append(self._worker.tag_recv(self._array(frame), self._ucx.UCXXTag(3)))
                sent.append(self._endpoint.tag_send(self._array(question), self._ucx.UCXXTag(2)))
            self._wait(landing.pop(0))
        for request in sent:
            self._wait(request)
