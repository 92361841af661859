"""Sums of a cache's elements that a GPU computes beside its other work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..kernels import element_sums, gather
from ..kernels.on_gpu import num_processors
from .layout import DTYPE_BYTES, KVLayout

_SCRATCH_BYTES = 32 << 20


class Part(NamedTuple):
    """What is to be summed of the blocks of one rank and KV group; see `element_sums.reference`."""

    rank: int
    memory: np.ndarray | int
    """[bytes] uint8, or the address of a GPU's memory."""
    layout: KVLayout
    """Of the rank's blocks."""
    places: range
    layers: np.ndarray
    """[places] int64."""
    planes: np.ndarray
    """[planes of a place] int64."""
    all_planes: int
    blocks: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    """[blocks] int64, as positions of the sequence."""
    unit: int
    first_unit: int
    dtype: str
    """Elements are rounded to it first."""


class Pending(Protocol):
    """Sums that are being computed."""

    def query(self) -> bool:
        """Whether they are there. Raises RuntimeError when the device is lost."""
        ...

    def result(self) -> np.ndarray:
        """[ranks, units] uint64. Blocks until they are there. Any thread may call it."""
        ...


class SumQueue:
    """A stream of one GPU, owned by one thread.

    Args:
        device: the GPU's number in this process.
        notify: called, by a thread, when sums are there that `start` did not put behind steps.
    """

    def __init__(self, device: int, notify: Callable[[], None]) -> None:
        self._device = torch.device("cuda", device)
        self._notify = notify
        self._stream = torch.cuda.Stream(self._device)
        self._started: queue.SimpleQueue[torch.cuda.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="kv-sums", daemon=True)
        self._thread.start()

    def start(self, parts: Sequence[Part], num_ranks: int, num_units: int, *, behind_steps: bool) -> Pending:
        """Queue sums. Does not wait for them.

        Args:
            parts: of this GPU's memory, and of peers' that it reaches.
            num_ranks: rows of the result.
            num_units: columns.
            behind_steps: the calling thread's stream is about to compute what is summed.

        Raises:
            RuntimeError: they could not be queued.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream() if behind_steps else self._stream
            with torch.cuda.stream(stream):
                sums = torch.zeros(num_ranks, num_units, dtype=torch.int64, device=self._device)
                for part in parts:
                    add(part, sums[part.rank])
                found = torch.empty(sums.shape, dtype=torch.int64, pin_memory=True)
                found.copy_(sums, non_blocking=True)
                ended = torch.cuda.Event(blocking=True)
                ended.record()
        if not behind_steps:
            self._started.put(ended)
        return _Pending(ended, found)

    def close(self) -> None:
        """Wait for all sums, and end the thread. Idempotent."""
        self._started.put(None)
        self._thread.join()
        with suppress(RuntimeError):  # the device is lost
            self._stream.synchronize()

    def _wait(self) -> None:
        torch.cuda.set_device(self._device)
        while (ended := self._started.get()) is not None:
            with suppress(RuntimeError):  # `query` tells it
                ended.synchronize()
            self._notify()


class _Pending:
    def __init__(self, ended: torch.cuda.Event, found: Tensor) -> None:
        self._ended = ended
        self._found = found

    def query(self) -> bool:
        return bool(self._ended.query())

    def result(self) -> np.ndarray:
        self._ended.synchronize()
        return self._found.numpy().view(np.uint64)


def add(part: Part, sums: Tensor) -> None:
    """Add a part of a GPU's memory to its sums, on the current stream. Does not wait for it.

    Args:
        part: in a GPU's memory.
        sums: [units] int64, on the GPU.
    """
    assert isinstance(part.memory, int)
    if part.dtype == part.layout.dtype:
        _add(part, part.memory, sums)
        return
    # Rounded as the kernel rounds that copies KV to a reader, some blocks at a time.
    layout, device = part.layout, sums.device
    size = len(part.places) * layout.layer_bytes
    landed = size // DTYPE_BYTES[layout.dtype] * DTYPE_BYTES[part.dtype]
    at_once = min(max(_SCRATCH_BYTES // landed, 1), len(part.blocks))
    scratch = torch.empty(at_once * landed, dtype=torch.uint8, device=device)
    plan = gather.Plan(num_processors(device))
    for first in range(0, len(part.blocks), at_once):
        blocks = part.blocks[first : first + at_once]
        numbers = np.arange(len(blocks))
        starts = blocks * layout.block_bytes + part.places.start * layout.layer_bytes
        rows = gather.lay_out(starts, numbers * landed, np.full(len(blocks), size), layout.dtype, part.dtype)
        gather.fused(part.memory, scratch.data_ptr(), rows, _upload(rows.lists, device), plan)
        some = part._replace(
            layout=msgspec.structs.replace(layout, num_layers=len(part.places), dtype=part.dtype),
            places=range(len(part.places)),
            blocks=numbers,
            starts=part.starts[first : first + at_once],
            stops=part.stops[first : first + at_once],
        )
        _add(some, scratch.data_ptr(), sums)


def _add(part: Part, address: int, sums: Tensor) -> None:
    layout, device = part.layout, sums.device
    lists = element_sums.lay_out(part.blocks, part.starts, part.stops, layout.block_tokens, part.unit, part.first_unit)
    row_bytes = layout.head_dim * DTYPE_BYTES[layout.dtype]
    element_sums.fused(
        address, sums, _upload(lists, device), _upload(part.layers, device), part.places.start, layout.num_layers,
        _upload(part.planes, device), part.all_planes, layout.block_tokens, row_bytes, part.unit,
    )  # fmt: skip


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Numbers for a kernel, without a wait."""
    if device.type != "cuda":
        return torch.from_numpy(array)
    # Pinned memory goes back to torch's cache at once, and torch gives it out again after the copy.
    pinned = torch.empty(array.shape, dtype=torch.int64, pin_memory=True)
    pinned.numpy()[:] = array
    return pinned.to(device, non_blocking=True)
