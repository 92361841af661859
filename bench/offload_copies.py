"""How fast scattered blocks go from a GPU to the host's registered memory, and back, and both at once.

In turns, of the same ranges: one kernel, as tiers have it (`DeviceBlocks`); copy engines by one call, as tiers have it
for large ranges; one memcpy for each range; and, for what the link gives, one memcpy of as many bytes at once.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels import cuda_memory, gather, on_gpu
from ..kv_transfer.copy_queue import CopyPlans, CopyQueue
from ..kv_transfer.layout import Runs
from ..kv_transfer.memory import DeviceBuffer
from ..kv_transfer.offload.device import plans

WAYS = ("h2d", "d2h", "both")
_ROUNDS = 9


class Ends(NamedTuple):
    """Two memories of the same size, each a multiple of 16 bytes."""

    gpu: int
    host: int
    """Registered. Addresses."""


def copy_records(run_bytes: Sequence[int], programs: Sequence[int], total_bytes: int) -> Iterator[dict[str, Any]]:
    """For each size of ranges, a record; bytes a second are of both directions together. Blocks for some seconds.

    Args:
        run_bytes: of a range; multiples of 16.
        programs: to try: processors of the GPU that the kernel takes in each direction.
        total_bytes: copied at a time in each direction.
    """
    if not (torch.cuda.is_available() and on_gpu.AVAILABLE):
        yield {"skipped": "no CUDA device, or no Triton"}
        return
    # Half of each memory is read and half is written, so that both directions can go at once.
    memory = DeviceBuffer(2 * total_bytes, 0)
    host = np.frombuffer(mmap.mmap(-1, 2 * total_bytes), np.uint8)
    host[:] = 1
    cuda_memory.register_host(host.ctypes.data, host.nbytes, 0)
    try:
        for size in run_bytes:
            yield measure(Ends(memory.address, host.ctypes.data), size, programs, total_bytes)
    finally:
        cuda_memory.unregister_host(host.ctypes.data, 0)


def measure(ends: Ends, run_bytes: int, programs: Sequence[int], total_bytes: int) -> dict[str, Any]:
    """One size of ranges; every way of copying in turns, `_ROUNDS` times: medians."""
    runs = {"h2d": scattered(run_bytes, total_bytes, 0), "d2h": scattered(run_bytes, total_bytes, total_bytes)}
    rows = {way: gather.lay_out(*found) for way, found in runs.items()}
    whole = {way: _one_run(found) for way, found in runs.items()}
    queues = {}
    for count in programs:
        found = plans(count)
        queues["h2d", count] = CopyQueue(0, CopyPlans.always(found.read))
        queues["d2h", count] = CopyQueue(0, CopyPlans.always(found.write))
    streams = {way: torch.cuda.Stream(0) for way in runs}
    for queue in queues.values():
        queue.warm_up()

    def by_kernel(ways: Sequence[str], count: int) -> None:
        copies = [queues[way, count].start(*_from_to(ends, way), rows[way]) for way in ways]
        for copy in copies:
            copy.synchronize()

    def by_batch(ways: Sequence[str]) -> None:
        copies = [queues[way, programs[0]].start_large(*_from_to(ends, way), runs[way]) for way in ways]
        for copy in copies:
            copy.synchronize()

    def by_engine(ways: Sequence[str], found: dict[str, Runs]) -> None:
        for way in ways:
            memcpy(*_from_to(ends, way), found[way], streams[way])
        for way in ways:
            streams[way].synchronize()

    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for way in WAYS:
        ways = ("h2d", "d2h") if way == "both" else (way,)
        for count in programs:
            calls[way, f"kernel_{count}"] = lambda ways=ways, count=count: by_kernel(ways, count)  # type: ignore[misc]
        calls[way, "engine"] = lambda ways=ways: by_batch(ways)  # type: ignore[misc]
        calls[way, "memcpy_each"] = lambda ways=ways: by_engine(ways, runs)  # type: ignore[misc]
        calls[way, "memcpy_whole"] = lambda ways=ways: by_engine(ways, whole)  # type: ignore[misc]
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS + 1):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start_s)
    record: dict[str, Any] = {"run_bytes": run_bytes, "bytes_each_way": total_bytes, "rounds": _ROUNDS}
    for (way, how), times in seconds.items():
        moved = total_bytes * (2 if way == "both" else 1)
        record[f"{way}_{how}_gb_per_s"] = round(moved / statistics.median(times[1:]) / 1e9, 2)
    return record


def scattered(run_bytes: int, total_bytes: int, first: int) -> Runs:
    """Ranges that fill ``total_bytes`` from ``first`` on, in random order at either end."""
    rng = np.random.default_rng(run_bytes)
    count = total_bytes // run_bytes
    here, there = (first + rng.permutation(count) * run_bytes for _ in range(2))
    return Runs(here, there, np.full(count, run_bytes, np.int64))


def memcpy(source: int, target: int, runs: Runs, stream: torch.cuda.Stream) -> None:
    """Queue one copy for each range."""
    kind = cuda_memory.runtime().cudaMemcpyKind.cudaMemcpyDefault
    for here, there, size in zip(*(part.tolist() for part in runs), strict=True):
        cuda_memory.call("cudaMemcpyAsync", target + there, source + here, size, kind, stream.cuda_stream)


def _from_to(ends: Ends, way: str) -> tuple[int, int]:
    return (ends.gpu, ends.host) if way == "d2h" else (ends.host, ends.gpu)


def _one_run(runs: Runs) -> Runs:
    first, size = int(runs.source_offsets.min()), runs.num_bytes
    return Runs(*(np.array([value], np.int64) for value in (first, first, size)))
