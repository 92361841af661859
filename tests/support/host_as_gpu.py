"""A stand-in for one GPU where there is none: `kernels.cuda_memory` over memory of the host that processes can map, and
copies by Triton's interpreter, each a while after it was started, in a thread, as a stream would.

It shows what the transport does with memory, copies and their ends. What CUDA does is for a machine with a GPU.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from tandem.core.errors import TransferError
from tandem.kernels import cuda_memory, gather
from tandem.kv_transfer import checksums, sum_queue
from tandem.kv_transfer.copy_queue import CopyPlans
from tandem.kv_transfer.layout import Runs
from tandem.kv_transfer.memory import Buffer, DeviceBuffer, SharedMemory, map_shared
from tandem.kv_transfer.offload import device
from tandem.kv_transfer.sum_queue import Part
from tandem.kv_transfer.transports import cuda_ipc, nixl

PLAN = gather.Plan(programs=1, warps=1, tile_bytes=256 << 10)
_interpreter = threading.Lock()
"""Triton's interpreter serves one thread at a time."""
mapped: dict[int, np.ndarray] = {}
"""What is open, by address."""


class Allocation:
    def __init__(self, num_bytes: int, device: int) -> None:
        self.take(Buffer(num_bytes))

    def take(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self.array = self._buffer.array
        self.address = self.array.ctypes.data
        assert self._buffer.shared is not None
        encoded = msgspec.msgpack.encode(msgspec.structs.astuple(self._buffer.shared))
        self.handle = encoded.ljust(cuda_memory.HANDLE_BYTES, b"\xc0")
        assert len(self.handle) == cuda_memory.HANDLE_BYTES


def adopt(buffer: Buffer) -> DeviceBuffer:
    """The host's memory, as if it were the GPU's."""
    allocation = Allocation.__new__(Allocation)
    allocation.take(buffer)
    adopted = DeviceBuffer.__new__(DeviceBuffer)
    adopted.num_bytes, adopted.device, adopted.memory = len(buffer.array), 0, allocation
    adopted.address, adopted.handle = allocation.address, allocation.handle
    return adopted


class Event:
    """Stands for `torch.cuda.Event`: fires a while after it was recorded."""

    delay_s = 0.002

    def __init__(self, blocking: bool = False) -> None:
        self._recorded_s = 0.0

    def record(self, stream: object = None) -> None:
        self._recorded_s = time.monotonic()

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._recorded_s + self.delay_s - time.monotonic()))


def open_handle(handle: bytes, device: int) -> int:
    try:
        shared = SharedMemory(*msgspec.msgpack.decode(handle.rstrip(b"\xc0")))
        array = map_shared(shared)
    except (TransferError, msgspec.DecodeError, TypeError) as error:
        raise OSError(f"cudaIpcOpenMemHandle: {error}") from None
    assert shared.pid != os.getpid(), "CUDA opens no handle in the process that made it"
    mapped[array.ctypes.data] = array
    return int(array.ctypes.data)


def close_handle(address: int, device: int) -> None:
    del mapped[address]


class Copy:
    def __init__(self) -> None:
        self._ended = threading.Event()

    def query(self) -> bool:
        return self._ended.is_set()

    def synchronize(self) -> None:
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()


class CopyQueue:
    """Stands for `kv_transfer.copy_queue.CopyQueue`."""

    delay_s = 0.0
    """How long each copy takes, at least."""

    def __init__(self, device: int, plans: CopyPlans) -> None:
        self.device = device
        self._work: queue.SimpleQueue[tuple[int, int, gather.Rows, Copy]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def mark(self) -> None:
        pass

    def start(self, source: int, target: int, rows: gather.Rows, after: None = None) -> Copy:
        copy = Copy()
        self._work.put((source, target, rows, copy))
        return copy

    def start_runs(self, source: int, target: int, runs: Runs, dtypes: tuple[str, str] = ("", "")) -> Copy:
        return self.start(source, target, gather.lay_out(*runs, *dtypes))

    def start_large(self, source: int, target: int, runs: Runs, after: None = None) -> Copy:
        return self.start(source, target, gather.lay_out(*runs), after)

    def warm_up(self) -> None:
        pass

    def adopt_thread(self) -> None:
        pass

    def synchronize(self) -> None:
        last = self.start(0, 0, gather.lay_out(*[np.empty(0, np.int64)] * 3))
        last.synchronize()

    def _run(self) -> None:
        while True:
            source, target, rows, copy = self._work.get()
            time.sleep(self.delay_s)
            with _interpreter:
                gather.fused(source, target, rows, torch.from_numpy(rows.lists), PLAN)
            copy.end()


class _Sums(Copy):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.sums = torch.zeros(*shape, dtype=torch.int64)

    def result(self) -> np.ndarray:
        self.synchronize()
        return self.sums.numpy().view(np.uint64)


class SumQueue:
    """Stands for `kv_transfer.sum_queue.SumQueue`."""

    def __init__(self, device: int, notify: Callable[[], None]) -> None:
        self._notify = notify

    def start(self, parts: Sequence[Part], num_ranks: int, num_units: int, *, behind_steps: bool) -> _Sums:
        sums = _Sums((num_ranks, num_units))
        if behind_steps:  # whoever computes here has done it
            self._run(parts, sums)
        else:
            threading.Thread(target=self._run, args=(parts, sums, self._notify), daemon=True).start()
        return sums

    def close(self) -> None:
        pass

    def _run(self, parts: Sequence[Part], sums: _Sums, notify: Callable[[], None] = lambda: None) -> None:
        for part in parts:
            with _interpreter:
                sum_queue.add(part, sums.sums[part.rank])
        sums.end()
        notify()


def install() -> list[Any]:
    """From now on the host is GPU 0. Returns what to `stop`."""
    patches = [
        mock.patch.object(cuda_memory, "open_handle", open_handle),
        mock.patch.object(cuda_memory, "close_handle", close_handle),
        mock.patch.object(cuda_memory, "uuid_of", return_value="the host"),
        mock.patch.object(cuda_memory, "device_of", lambda uuid: 0 if uuid == "the host" else None),
        mock.patch.object(cuda_memory, "can_read", return_value=True),
        mock.patch.object(cuda_memory, "read_from"),
        mock.patch("tandem.kv_transfer.memory.Allocation", Allocation),
        mock.patch.object(cuda_memory, "register_host"),
        mock.patch.object(cuda_memory, "unregister_host"),
        mock.patch.object(cuda_ipc, "CopyQueue", CopyQueue),
        mock.patch.object(device, "CopyQueue", CopyQueue),
        mock.patch.object(checksums, "SumQueue", SumQueue),
        mock.patch.object(nixl, "_adopt_thread"),
        mock.patch.dict(nixl._SEGMENTS, cuda="DRAM"),
    ]
    for patch in patches:
        patch.start()
    return patches
