"""How fast one GPU copies KV out of another's memory.

The memory's owner is another process, which sees its own GPU alone, as a worker does: `python -m
tandem.bench.kv_copies BYTES` is that process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels import cuda_memory, gather
from ..kv_transfer.layout import Runs
from ..kv_transfer.memory import DeviceBuffer
from ..kv_transfer.transports import Read, Region
from ..kv_transfer.transports.cuda_ipc import CudaIpcTransport

PEER = "prefill-0#1"
_ROUNDS = 7
_PLANS = [
    gather.Plan(programs, warps, kib << 10)
    for programs in (8, 16, 24, 32)
    for warps, kib in ((8, 32), (8, 64), (16, 32), (16, 64), (16, 128), (32, 64))
]


class Case(NamedTuple):
    """Ranges of ``run_bytes`` at the source, converted if dtypes are given."""

    name: str
    run_bytes: int
    source_dtype: str = ""
    target_dtype: str = ""


CASES = [
    Case("4 KiB", 4 << 10),
    Case("16 KiB", 16 << 10),
    Case("64 KiB", 64 << 10),
    Case("256 KiB", 256 << 10),
    Case("16 KiB bf16 to fp8", 16 << 10, "bfloat16", "fp8_e4m3"),
    Case("4 KiB bf16 to fp8", 4 << 10, "bfloat16", "fp8_e4m3"),
    Case("16 KiB fp8 to bf16", 16 << 10, "fp8_e4m3", "bfloat16"),
    Case("16 KiB bf16 to fp16", 16 << 10, "bfloat16", "float16"),
]


class Owner:
    """A process that has memory on a GPU.

    Args:
        num_bytes: of the memory.
        gpu: the only one that the process sees.
    """

    def __init__(self, num_bytes: int, gpu: int) -> None:
        self.num_bytes = num_bytes
        command = ["env", f"CUDA_VISIBLE_DEVICES={gpu}", sys.executable, "-m", __name__, str(num_bytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.descriptor = bytes.fromhex(self._process.stdout.readline())
        if not self.descriptor:
            raise RuntimeError(f"the owner of GPU {gpu}'s memory did not start")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Reader:
    """This process's end, on GPU 0."""

    def __init__(self, owner: Owner, programs: int, landing: DeviceBuffer | None = None) -> None:
        self.news = threading.Event()
        self.landing = landing or DeviceBuffer(owner.num_bytes, 0)
        self.transport = CudaIpcTransport(self.news.set, 0, programs)
        self.transport.register(Region("landing", self.landing))
        self.transport.add_peer(PEER, owner.descriptor)

    def pull(self, runs: Runs, source_dtype: str = "", target_dtype: str = "") -> float:
        """Seconds of one read, until this thread, asleep meanwhile, has been told."""
        start_s = time.perf_counter()
        self.transport.submit(Read(PEER, "blocks", "landing", runs, source_dtype, target_dtype))
        while not (results := self.transport.poll()):
            self.news.wait()
            self.news.clear()
        if results[0].error:
            raise RuntimeError(results[0].error)
        return time.perf_counter() - start_s


def own(num_bytes: int) -> None:
    """Be an owner: tell where the memory is, and hold it until the standard input ends."""
    buffer = DeviceBuffer(num_bytes, 0)
    words = buffer.tensor().view(torch.int64)
    torch.arange(len(words), out=words)
    torch.cuda.synchronize()
    transport = CudaIpcTransport(lambda: None, 0, 1)
    transport.register(Region("blocks", buffer))
    print(transport.descriptor().hex(), flush=True)
    sys.stdin.read()


def percentiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """50th, 90th and 99th, and how many there are."""
    found = {f"p{percent}": round(float(np.percentile(values, percent)), digits) for percent in (50, 90, 99)}
    return found | {"n": len(values)}


def scattered(case: Case, total: int, room: int, rng: np.random.Generator) -> Runs:
    """Ranges of a case of ``total`` bytes at the larger end, at random places of two memories of ``room`` bytes."""
    factor = 1.0
    if case.source_dtype:
        factor = gather.DTYPES[case.target_dtype].itemsize / gather.DTYPES[case.source_dtype].itemsize
    landed = int(case.run_bytes * factor)
    count = total // max(case.run_bytes, landed)
    source = rng.permutation(room // case.run_bytes)[:count] * case.run_bytes
    target = np.sort(rng.permutation(room // landed)[:count]) * landed
    return Runs(source, target, np.full(count, case.run_bytes, np.int64))


def copy_records(owner: Owner, total: int, plans: Sequence[gather.Plan] = _PLANS) -> Iterator[dict[str, Any]]:
    """For each case: the kernel with every plan, in turns with a plain copy of as many bytes; then reads of the
    transport, as a worker makes them."""
    reader = Reader(owner, gather.Plan().programs)
    address = reader.transport._peers[PEER].places["blocks"][0]
    target = reader.landing.tensor()
    rng = np.random.default_rng(0)
    stream = torch.cuda.Stream(0)
    for case in CASES:
        runs = scattered(case, total, owner.num_bytes, rng)
        dtypes = case.source_dtype, case.target_dtype
        rows = gather.lay_out(*runs, *dtypes)
        lists = torch.from_numpy(rows.lists).to(target.device)

        def plain(num_bytes: int = runs.num_bytes) -> None:
            kind = cuda_memory.runtime().cudaMemcpyKind.cudaMemcpyDefault
            cuda_memory.call("cudaMemcpyAsync", target.data_ptr(), address, num_bytes, kind, stream.cuda_stream)

        calls: dict[str, Callable[[], None]] = {"plain": plain}
        for plan in dict.fromkeys([gather.Plan(), *plans]):
            calls[text(plan)] = lambda plan=plan, rows=rows, lists=lists: gather.fused(  # type: ignore[misc]
                address, target.data_ptr(), rows, lists, plan
            )
        rates = {
            name: round(runs.num_bytes / milliseconds / 1e6, 1)
            for name, milliseconds in _milliseconds(calls, stream).items()
        }
        default = text(gather.Plan())
        best = max((name for name in rates if name != "plain"), key=lambda name: rates[name])
        seconds = [reader.pull(runs, *dtypes) for _ in range(_ROUNDS + 1)][1:]
        yield {
            "bench": "kv-copy", "case": case.name, "runs": len(runs.sizes), "bytes": runs.num_bytes,
            "plain_gb_per_s": rates["plain"], "kernel_gb_per_s": rates[default], "best_gb_per_s": rates[best],
            "best_plan": best, "all_gb_per_s": rates, "pull_ms": percentiles([1e3 * s for s in seconds]),
            "pull_gb_per_s": round(runs.num_bytes / statistics.median(seconds) / 1e9, 1),
            "correct": None if case.source_dtype else _landed(reader, runs),
        }  # fmt: skip
    for blocks in (1, 16, 128):
        runs = scattered(Case("", 64 << 10), blocks << 16, owner.num_bytes, rng)
        times = [1e6 * reader.pull(runs) for _ in range(220)][20:]
        yield {"bench": "kv-pull-latency", "bytes": runs.num_bytes, "us": percentiles(times, 1)}
    reader.transport.close()


def _milliseconds(calls: dict[str, Callable[[], None]], stream: torch.cuda.Stream) -> dict[str, float]:
    """Median device time of each, in turns."""
    turns: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    with torch.cuda.stream(stream):
        for call in calls.values():
            call()
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                stop.record()
                turns[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in events) for name, events in turns.items()}


def _landed(reader: Reader, runs: Runs) -> bool:
    """Whether each range at the target is what the owner wrote, its own places, counted in words."""
    size = int(runs.sizes[0])
    target = reader.landing.tensor()
    there = target.view(torch.int64).view(-1, size // 8)[
        torch.from_numpy(runs.target_offsets // size).to(target.device)
    ]
    first = torch.from_numpy(runs.source_offsets // 8).to(target.device)
    return bool((there == first[:, None] + torch.arange(size // 8, device=target.device)).all())


def text(plan: gather.Plan) -> str:
    """A plan for people."""
    return f"{plan.programs} x {plan.warps} warps x {plan.tile_bytes >> 10} KiB"


if __name__ == "__main__":
    own(int(sys.argv[1]))
