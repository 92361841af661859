"""Blocks in GPUs' memory: a batch of them is copied by one kernel, which reads and writes the host's memory itself, or,
where their parts are large, by the GPU's copy engines.

Every batch is one launch, or one call, on a stream of its direction, so that blocks go out while others come in. The
host's memory has to be registered with CUDA; what is not goes through a block of memory that is, one for each thread.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...kernels import cuda_memory, gather
from ..copy_queue import Copy, CopyPlans, CopyQueue
from ..layout import KVLayout, Runs
from .base import addresses_of

_LARGE_BYTES = 1 << 20
"""Ranges from this size on are left to the GPU's copy engines. Measured on an H200 with ranges of 2 MiB, in GB/s,
engines against the kernel: 53 and 50 to the GPU, 53 and 51 from it, 95 and 67 both ways at once."""
_WARPS = 16
"""The host's link is full with half of what a link between GPUs takes."""
_READ_BYTES = 32 << 10
"""Of a program that reads the host's memory. Twice as many programs with half the bytes each take as much of the GPU
and leave more of the link to what goes the other way. Measured on an H100 with ranges of 16 and 32 KiB, both ways at
once, in GB/s: 76.6 and 76.2, and 74.8 with programs like those that write."""


class Plans(NamedTuple):
    """How a GPU copies from the host's memory, and to it."""

    read: gather.Plan
    write: gather.Plan


def plans(programs: int) -> Plans:
    """Those that take so many of the GPU's processors in each direction."""
    return Plans(gather.Plan(2 * programs, _WARPS, _READ_BYTES), gather.Plan(programs, _WARPS))


class RankMemory(NamedTuple):
    """The blocks of one rank."""

    heads: range
    """Of the model's KV heads, those that it has."""
    address: int
    """Where the GPU that copies reads and writes them; a multiple of 16."""


class DeviceBlocks:
    """See `BlockMemory`. With several ranks, what is read looks as if one had all heads, as with `SplitBlocks`.

    Blocks that are read were computed by steps that have ended; of blocks that are written, see `ordered`.

    Args:
        layout: of whole blocks.
        ranks: all of a worker's.
        device: the GPU that copies, its number in this process.
        programs: of a copy at a time: processors of the GPU that it may take from others.
    """

    def __init__(self, layout: KVLayout, ranks: Sequence[RankMemory], device: int, programs: int) -> None:
        self.block_bytes = layout.block_bytes
        self._device = device
        self._ranks = list(ranks)
        self._sources = list({rank.heads.start: rank for rank in ranks}.values())
        self._head_bytes = layout.plane_bytes // layout.num_kv_heads
        self._num_heads = layout.num_kv_heads
        self._planes = np.arange(layout.num_planes)  # of a block: keys and values of each layer
        self._base = ranks[0].address
        read, write = plans(programs)
        self._out = CopyQueue(device, CopyPlans.always(write))
        self._in = CopyQueue(device, CopyPlans.always(read))
        self._out.warm_up()
        self._in.warm_up()
        self._out_lock, self._in_lock = threading.Lock(), threading.Lock()
        # Registered memory, by address; replaced, never changed.
        self._pinned: list[tuple[int, int]] = []
        self._pin_lock = threading.Lock()
        self._own = threading.local()

    def pin(self, array: np.ndarray) -> Callable[[], None]:
        """Let the GPU reach host memory, [bytes] uint8. Blocks while its pages are made. Returns what undoes it.

        Raises:
            OSError: CUDA refuses.
        """
        place = array.ctypes.data, array.ctypes.data + array.nbytes
        cuda_memory.register_host(place[0], array.nbytes, self._device)
        with self._pin_lock:
            self._pinned = [*self._pinned, place]

        def unpin() -> None:
            with self._pin_lock:
                self._pinned = [other for other in self._pinned if other != place]
            cuda_memory.unregister_host(place[0], self._device)

        return unpin

    def ordered(self) -> OrderedBlocks:
        """These blocks, to be written when the GPU has done all that the calling thread has given it so far: it may
        still copy what a block held, or clear it."""
        return OrderedBlocks(self, self._in.mark())

    def read(self, blocks: Sequence[int], targets: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        places = addresses_of(targets)
        if self._are_pinned(places):
            self._read(blocks, places)
            return
        own = self._own_block()
        for block, target in zip(blocks, targets, strict=True):
            self._read([block], addresses_of([own]))
            target[:] = own

    def write(self, blocks: Sequence[int], sources: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        self.write_after(None, blocks, sources)

    def write_after(self, mark: Any, blocks: Sequence[int], sources: Sequence[np.ndarray]) -> None:
        """`write`, after what a `CopyQueue.mark` stands for."""
        places = addresses_of(sources)
        if self._are_pinned(places):
            self._write(mark, blocks, places)
            return
        own = self._own_block()
        for block, source in zip(blocks, sources, strict=True):
            own[:] = source
            self._write(mark, [block], addresses_of([own]))

    def _read(self, blocks: Sequence[int], places: np.ndarray) -> None:
        runs, base = self._runs(self._sources, blocks, places)
        with self._out_lock:
            copy = _start(self._out, self._base, base, runs)
        copy.synchronize()

    def _write(self, mark: Any, blocks: Sequence[int], places: np.ndarray) -> None:
        runs, base = self._runs(self._ranks, blocks, places)
        with self._in_lock:
            copy = _start(self._in, base, self._base, Runs(runs.target_offsets, runs.source_offsets, runs.sizes), mark)
        copy.synchronize()

    def _runs(self, ranks: Sequence[RankMemory], blocks: Sequence[int], addresses: np.ndarray) -> tuple[Runs, int]:
        """What is read from the GPU, and the host's address that offsets there count from."""
        numbers = np.asarray(blocks, np.int64)
        base = int(addresses.min()) & ~0xF
        here, there, sizes = [], [], []
        for rank in ranks:
            num_heads = len(rank.heads)
            size = num_heads * self._head_bytes
            starts = rank.address - self._base + numbers * (len(self._planes) * size)
            if num_heads == self._num_heads:  # the whole block is one run
                here.append(starts)
                there.append(addresses - base)
                sizes.append(np.full(len(starts), self.block_bytes, np.int64))
                continue
            places = self._planes * (self._num_heads * self._head_bytes) + rank.heads.start * self._head_bytes
            here.append((starts[:, None] + self._planes * size).reshape(-1))
            there.append(((addresses - base)[:, None] + places).reshape(-1))
            sizes.append(np.full(len(here[-1]), size, np.int64))
        return Runs(np.concatenate(here), np.concatenate(there), np.concatenate(sizes)), base

    def _are_pinned(self, addresses: np.ndarray) -> bool:
        covered = np.zeros(len(addresses), np.bool_)
        for start, stop in self._pinned:
            covered |= (addresses >= start) & (addresses <= stop - self.block_bytes)
        return bool(covered.all())

    def _own_block(self) -> np.ndarray:
        """Registered memory for one block, of the calling thread."""
        if not hasattr(self._own, "block"):
            self._own.block = np.frombuffer(mmap.mmap(-1, self.block_bytes), np.uint8)
            weakref.finalize(self._own.block, self.pin(self._own.block)).atexit = False
        block: np.ndarray = self._own.block
        return block


def _start(queue: CopyQueue, source: int, target: int, runs: Runs, after: Any = None) -> Copy:
    if runs.sizes.min(initial=_LARGE_BYTES) >= _LARGE_BYTES:
        return queue.start_large(source, target, runs, after)
    return queue.start(source, target, gather.lay_out(*runs), after)


class OrderedBlocks:
    """See `DeviceBlocks.ordered`; a `BlockMemory`."""

    def __init__(self, memory: DeviceBlocks, mark: Any) -> None:
        self.block_bytes = memory.block_bytes
        self._memory = memory
        self._mark = mark

    def read(self, blocks: Sequence[int], targets: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        self._memory.read(blocks, targets)

    def write(self, blocks: Sequence[int], sources: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        self._memory.write_after(self._mark, blocks, sources)
