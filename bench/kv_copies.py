"""How fast one GPU copies KV out of another's memory, and what that costs the steps that it computes meanwhile.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..core.config import Config
from ..core.hashing import root_hash
from ..core.messages import Child, Sampling
from ..engine.batch import Work
from ..engine.build import build_engine, warm_up
from ..engine.engine import Engine
from ..engine.sequence import Sequence as Tokens
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
_PULL_BLOCKS = 128
_PULLS_AT_ONCE = 2


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
            calls[_text(plan)] = lambda plan=plan, rows=rows, lists=lists: gather.fused(  # type: ignore[misc]
                address, target.data_ptr(), rows, lists, plan
            )
        rates = {
            name: round(runs.num_bytes / milliseconds / 1e6, 1)
            for name, milliseconds in _milliseconds(calls, stream).items()
        }
        default = _text(gather.Plan())
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


def decode_records(owner: Owner, folder: Path, batch: int, context: int, steps: int) -> Iterator[dict[str, Any]]:
    """Times between a batch's tokens, alone and while KV of others arrives all the time, in turns."""
    pool = {"gpus_per_replica": 1, "max_running": batch, "max_batched_tokens": 8192}
    config = Config.model_validate(
        {
            "model": {"path": str(folder), "load": "dummy", "max_model_len": 8192},
            "pools": {"colocated": pool},
            "kv": {"prefix_cache": False, "capacity": "28GiB"},
        }
    )
    engine = build_engine(config, batch, torch.device("cuda", 0), lambda *_: None, 8192).engine
    warm_up(engine, 8192, lambda *_: None)
    rng = np.random.default_rng(0)
    vocabulary = engine.model.spec.vocab_size
    prompts = rng.integers(vocabulary, size=(batch, context)).tolist()
    sequences = [
        Tokens("bench", prompt, context, [Child(0, index)], Sampling(), root_hash("bench"))
        for index, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        if not engine.reserve(sequence, context + 3 * steps + 16):
            raise MemoryError("the KV cache is too small")
    for start in range(0, batch, 8192 // context):
        _append(engine.step([Work(s, context) for s in sequences[start : start + 8192 // context]]))
    landing = engine.pool.allocate(_PULLS_AT_ONCE * _PULL_BLOCKS)
    assert landing is not None, "no room for blocks to land in"
    assert isinstance(engine.cache.blocks, DeviceBuffer)
    for programs in (8, 16, 32):
        reader = Reader(owner, programs, engine.cache.blocks)
        times: dict[bool, list[float]] = {False: [], True: []}
        num_bytes = seconds = 0.0
        for turn in range(4):
            pulls = _Pulls(reader, engine, np.array(landing), owner.num_bytes, rng) if turn % 2 else None
            start_s = time.perf_counter()
            times[pulls is not None] += _decode(engine, sequences, steps // 4, pulls)
            if pulls is not None:
                seconds += time.perf_counter() - start_s
                num_bytes += pulls.end()
        alone, beside = (percentiles([1e3 * s for s in times[busy]]) for busy in (False, True))
        yield {
            "bench": "kv-decode", "batch": batch, "context": context, "programs": programs, "alone_ms": alone,
            "while_pulling_ms": beside, "slower": round(beside["p50"] / alone["p50"] - 1, 4),
            "pulled_gb_per_s": round(num_bytes / seconds / 1e9, 1),
        }  # fmt: skip
        reader.transport.close()
    engine.pool.release(landing)


class _Pulls:
    """Reads of half the layers of some blocks, one after another, some at a time."""

    def __init__(
        self, reader: Reader, engine: Engine, landing: np.ndarray, room: int, rng: np.random.Generator
    ) -> None:
        layout = engine.cache.layout
        self._transport = reader.transport
        size = layout.block_bytes // 2
        count = len(landing) // _PULLS_AT_ONCE
        self._runs = [
            Runs(
                rng.permutation(room // layout.block_bytes)[:count] * layout.block_bytes,
                np.sort(part) * layout.block_bytes,
                np.full(count, size, np.int64),
            )
            for part in landing.reshape(_PULLS_AT_ONCE, count)
        ]
        self._open = {self._submit(index): index for index in range(_PULLS_AT_ONCE)}
        self._num_bytes = 0

    def _submit(self, index: int) -> int:
        return self._transport.submit(Read(PEER, "blocks", "landing", self._runs[index]))

    def poll(self, *, again: bool = True) -> None:
        """Start anew what has ended."""
        for result in self._transport.poll():
            if result.error:
                raise RuntimeError(result.error)
            index = self._open.pop(result.number)
            self._num_bytes += self._runs[index].num_bytes
            if again:
                self._open[self._submit(index)] = index

    def end(self) -> int:
        """Wait for the last; returns the bytes of all."""
        while self._open:
            self.poll(again=False)
        return self._num_bytes


def _decode(engine: Engine, sequences: Sequence[Tokens], steps: int, pulls: _Pulls | None) -> list[float]:
    """Seconds between the ends of steps, the host one ahead."""
    ends, flight = [], None
    for number in range(steps + 1):
        started = engine.submit([Work(s, 1) for s in sequences]) if number < steps else None
        if pulls is not None:
            pulls.poll()
        if flight is not None:
            _append(engine.collect(flight))
            ends.append(time.perf_counter())
        flight = started
    return [float(seconds) for seconds in np.diff(ends)[3:]]


def _append(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if outcome.samples is not None:
            outcome.sequence.tokens.append(outcome.samples[0].token if outcome.samples[0] is not None else 0)


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


def _text(plan: gather.Plan) -> str:
    return f"{plan.programs} x {plan.warps} warps x {plan.tile_bytes >> 10} KiB"


if __name__ == "__main__":
    own(int(sys.argv[1]))
