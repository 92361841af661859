"""What KV that arrives costs the steps that a GPU computes meanwhile, and which way to copy it costs least."""

from __future__ import annotations

import random
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
from ..engine.sequence import Sequence as Tokens
from ..kernels import gather
from ..kv_transfer.copy_queue import CopyPlans, CopyQueue
from ..kv_transfer.layout import Runs
from ..kv_transfer.memory import DeviceBuffer
from ..kv_transfer.transports import Read
from .kv_copies import PEER, Owner, Reader, percentiles, text

LEAST_IDLE_GB_PER_S = 340.0
"""What a copy must reach where nothing else is computed."""
_SETTLING_STEPS = 3
_TURN_STEPS = 16
_IDLE_S = 0.25
SWEEP_ROOM_TOKENS = 640
"""Between two beginnings of a sweep's sequences: a step should take as long at the end as at the start."""


class Load(NamedTuple):
    """Pulls of half the layers of some blocks, as a prompt's first layer group is read."""

    name: str
    chunk_bytes: int
    at_once: int


PACED = Load("paced", 144 << 20, 2)
"""Submitted once a step, and over long before the next: some 300 MB a step."""
FULL = Load("full", 1 << 30, 4)
"""Enough to copy all through a step of 10 ms."""


class Decoding:
    """An engine with a batch that decodes, and blocks for KV to land in.

    Args:
        folder: of the model; its weights are made up.
        batch: sequences.
        context: tokens of each at first.
        room: tokens of each at most.
        loads: KV lands in enough blocks for each of them.
        device: that computes.
        capacity: of the KV cache.
    """

    def __init__(
        self,
        folder: Path,
        batch: int,
        context: int,
        room: int,
        loads: Sequence[Load],
        device: torch.device = torch.device("cuda", 0),
        capacity: str = "36GiB",
    ) -> None:
        pool = {"gpus_per_replica": int(device.type == "cuda"), "max_running": batch, "max_batched_tokens": 8192}
        config = Config.model_validate(
            {
                "model": {"path": str(folder), "load": "dummy", "max_model_len": context + room + 64},
                "pools": {"colocated": pool},
                "kv": {"prefix_cache": False, "capacity": capacity},
            }
        )
        self.engine = build_engine(config, batch, device, lambda *_: None, 8192).engine
        warm_up(self.engine, 8192, lambda *_: None)
        self._context = context
        self._room = room
        self._rng = np.random.default_rng(0)
        self._prompts = self._rng.integers(self.engine.model.spec.vocab_size, size=(batch, context)).tolist()
        self._sequences: list[Tokens] = []
        self._half_bytes = self.engine.cache.layout.block_bytes // 2
        landing = self.engine.pool.allocate(max(load.at_once * self._blocks(load) for load in loads))
        assert landing is not None, "no room for blocks to land in"
        self._landing = np.array(landing)
        self.begin()

    @property
    def buffer(self) -> DeviceBuffer:
        """The cache's memory."""
        assert isinstance(self.engine.cache.blocks, DeviceBuffer)
        return self.engine.cache.blocks

    def begin(self) -> None:
        """Compute the prompts, of new sequences."""
        for sequence in self._sequences:
            self.engine.discard(sequence)
        self._sequences = [
            Tokens("bench", prompt, self._context, [Child(0, index)], Sampling(), root_hash("bench"))
            for index, prompt in enumerate(self._prompts)
        ]
        for sequence in self._sequences:
            if not self.engine.reserve(sequence, self._context + self._room + 16):
                raise MemoryError("the KV cache is too small")
        at_once = max(8192 // self._context, 1)
        for start in range(0, len(self._sequences), at_once):
            part = self._sequences[start : start + at_once]
            _append(self.engine.step([Work(sequence, self._context) for sequence in part]))

    def has_room(self, steps: int) -> bool:
        """Whether so many more steps fit."""
        return self._sequences[0].num_tokens + steps <= self._context + self._room

    def times(self, steps: int, pulls: Pulls | None) -> list[float]:
        """Seconds between the ends of steps, the host one ahead."""
        ends, flight = [], None
        for number in range(steps + 1):
            started = self.engine.submit([Work(s, 1) for s in self._sequences]) if number < steps else None
            if pulls is not None:
                pulls.poll()
            if flight is not None:
                _append(self.engine.collect(flight))
                ends.append(time.perf_counter())
            flight = started
        return [float(seconds) for seconds in np.diff(ends)[_SETTLING_STEPS:]]

    def pulls(self, reader: Reader, load: Load, room: int) -> Pulls:
        """Begin to pull from an owner of ``room`` bytes."""
        count, block_bytes = self._blocks(load), 2 * self._half_bytes
        room_blocks = room // block_bytes
        runs = []
        for part in self._landing[: load.at_once * count].reshape(load.at_once, count):
            source = self._rng.permutation(max(room_blocks, count))[:count] % room_blocks
            size = np.full(count, self._half_bytes, np.int64)
            runs.append(Runs(source * block_bytes, np.sort(part) * block_bytes, size))
        return Pulls(reader, runs)

    def close(self) -> None:
        """Give all blocks back."""
        for sequence in self._sequences:
            self.engine.discard(sequence)
        self.engine.pool.release(self._landing.tolist())

    def _blocks(self, load: Load) -> int:
        return load.chunk_bytes // self._half_bytes


class Pulls:
    """Reads, some at a time, each started anew when it has ended."""

    def __init__(self, reader: Reader, runs: Sequence[Runs]) -> None:
        self._transport = reader.transport
        self._runs = runs
        self._open = {self._submit(index): index for index in range(len(runs))}
        self.num_bytes = 0
        """Of those that have ended."""

    def _submit(self, index: int) -> int:
        return self._transport.submit(Read(PEER, "blocks", "landing", self._runs[index]))

    def poll(self, *, again: bool = True) -> None:
        """Start anew what has ended."""
        for result in self._transport.poll():
            if result.error:
                raise RuntimeError(result.error)
            index = self._open.pop(result.number)
            self.num_bytes += self._runs[index].num_bytes
            if again:
                self._open[self._submit(index)] = index

    def end(self) -> None:
        """Wait for the last."""
        while self._open:
            self.poll(again=False)


class Way(NamedTuple):
    """A way to copy beside steps."""

    name: str
    plans: CopyPlans


def ways(programs: Sequence[int]) -> list[Way]:
    """Everything that a sweep tries. Pure.

    A program of 32 warps fills a processor, so that none of a step's programs finds room beside it; of 8 warps,
    there is room, and more programs are needed for as many bytes under way.
    """
    shapes = ((32, 64), (16, 32), (8, 32), (8, 16))
    found = []
    for priority, told in ((-1, "before steps"), (0, "as steps")):
        for warps, kib in shapes:
            for count in programs:
                plan = gather.Plan(count, warps, kib << 10)
                found.append(Way(f"{text(plan)}, {told}", CopyPlans(plan, plan, 0, priority)))
        engines = CopyPlans(gather.Plan(), gather.Plan(), 1, priority)
        found.append(Way(f"copy engines, {told}", engines))
    return found


def decode_records(owner: Owner, folder: Path, batch: int, context: int, steps: int) -> Iterator[dict[str, Any]]:
    """Times between a batch's tokens, alone and while KV of others arrives all the time, in turns."""
    counts = (8, 16, 32)
    decoding = Decoding(folder, batch, context, len(counts) * steps, [PACED])
    for programs in counts:
        reader = Reader(owner, programs, decoding.buffer)
        times: dict[bool, list[float]] = {False: [], True: []}
        num_bytes = seconds = 0.0
        for busy in (False, True, True, False):  # contexts grow by every step
            pulls = decoding.pulls(reader, PACED, owner.num_bytes) if busy else None
            start_s = time.perf_counter()
            times[pulls is not None] += decoding.times(steps // 4, pulls)
            if pulls is not None:
                seconds += time.perf_counter() - start_s
                num_bytes += pulls.num_bytes
                pulls.end()
        alone, beside = (percentiles([1e3 * s for s in times[busy]]) for busy in (False, True))
        yield {
            "bench": "kv-decode", "batch": batch, "context": context, "programs": programs, "alone_ms": alone,
            "while_pulling_ms": beside, "slower": round(beside["p50"] / alone["p50"] - 1, 4),
            "pulled_gb_per_s": round(num_bytes / seconds / 1e9, 1),
        }  # fmt: skip
        reader.transport.close()
    decoding.close()


def sweep_records(
    owner: Owner, decoding: Decoding, tried: Sequence[Way], loads: Sequence[Load], rounds: int
) -> Iterator[dict[str, Any]]:
    """For each way to copy, under each load: how fast it is alone, what it costs steps, how fast it is beside them.

    All take turns in every round, in another order each time; steps alone and beside it, in turns, too. Blocks for
    minutes before the first record.

    Args:
        owner: of what is pulled.
        decoding: computes meanwhile.
        tried: ways to copy.
        loads: of those that ``decoding`` was made for.
        rounds: turns of each.
    """
    reader = Reader(owner, gather.Plan().programs, decoding.buffer)
    use = _switch(reader)
    idle = {}
    for way in tried:
        use(way.plans)
        idle[way.name] = _idle_gb_per_s(decoding.pulls(reader, loads[-1], owner.num_bytes))
    cases = [(way, load) for way in tried for load in loads]
    found = {(way.name, load.name): _Turns() for way, load in cases}
    order = random.Random(0)
    for number in range(rounds):
        order.shuffle(cases)
        for way, load in cases:
            if not decoding.has_room(2 * _TURN_STEPS + 2):
                decoding.begin()
            use(way.plans)
            turns = found[way.name, load.name]
            for busy in (False, True) if number % 2 else (True, False):
                turns.take(decoding, decoding.pulls(reader, load, owner.num_bytes) if busy else None)
    for way in tried:
        for load in loads:
            told = {"bench": "kv-sweep", "way": way.name, "load": load.name, "idle_gb_per_s": idle[way.name]}
            yield told | found[way.name, load.name].record()
    reader.transport.close()


def lost_per_gb(record: dict[str, Any]) -> float:
    """Of a sweep's record: milliseconds that steps lose to each gigabyte that arrives, which a slower copy does not
    make look better. Pure."""
    step_ms = record["while_pulling_ms"]["p50"]
    arrived_gb = record["pulled_gb_per_s"] * step_ms / 1e3
    lost_ms: float = step_ms - record["alone_ms"]["p50"]
    return lost_ms / arrived_gb if arrived_gb else float("inf")


class _Turns:
    """What was seen of one case."""

    def __init__(self) -> None:
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._num_bytes = 0
        self._seconds = 0.0

    def take(self, decoding: Decoding, pulls: Pulls | None) -> None:
        start_s = time.perf_counter()
        self._times[pulls is not None] += decoding.times(_TURN_STEPS, pulls)
        if pulls is not None:
            self._seconds += time.perf_counter() - start_s
            self._num_bytes += pulls.num_bytes
            pulls.end()

    def record(self) -> dict[str, Any]:
        alone, beside = (percentiles([1e3 * s for s in self._times[busy]]) for busy in (False, True))
        return {
            "alone_ms": alone, "while_pulling_ms": beside, "slower": round(beside["p50"] / alone["p50"] - 1, 4),
            "pulled_gb_per_s": round(self._num_bytes / self._seconds / 1e9, 6),
        }  # fmt: skip


def _switch(reader: Reader) -> Callable[[CopyPlans], None]:
    """What changes how a reader, of which nothing is on its way, copies. Each way is warmed up when it first comes."""
    queues: dict[CopyPlans, CopyQueue] = {}

    def use(plans: CopyPlans) -> None:
        if plans not in queues:
            queues[plans] = CopyQueue(0, plans)
            queues[plans].warm_up()
        reader.transport._copies = queues[plans]

    return use


def _idle_gb_per_s(pulls: Pulls) -> float:
    """How fast it goes while nothing is computed, for a quarter of a second after as long, and one read at least."""
    for _ in range(2):
        start_s, before = time.perf_counter(), pulls.num_bytes
        while time.perf_counter() - start_s < _IDLE_S or pulls.num_bytes == before:
            pulls.poll()
            time.sleep(0.0005)
        rate = (pulls.num_bytes - before) / (time.perf_counter() - start_s) / 1e9
    pulls.end()
    return round(rate, 6)


def _append(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if outcome.samples is not None:
            outcome.sequence.tokens.append(outcome.samples[0].token if outcome.samples[0] is not None else 0)
