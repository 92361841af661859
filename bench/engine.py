"""`tandem bench engine`: one engine on one device, by the rules of offline `generate`.

A prefill row is the wall time of fresh random prompts with one output token, best of three. A decode row is (wall time
with 129 output tokens − wall time with 1) ÷ 128, best of two each. Both are greedy. The mixed row is 256 requests at
temperature 0.6 whose lengths are pairs of `randint(100, 1024)`, from `random.Random(0)`, all there from the start,
once. No prefix cache, after one warm-up call.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from prometheus_client import CollectorRegistry

from ..core.clock import SystemClock
from ..core.config import ColocatedPool, Config
from ..core.errors import ConfigError
from ..core.garbage import settle
from ..core.hashing import root_hash
from ..core.messages import Child, Generate, Message, Refused, Sampling, Stopping, Update
from ..core.metrics import WorkerMetrics
from ..decode.worker import DecodeWorker
from ..engine.allocator import num_blocks_needed
from ..engine.batch import Work
from ..engine.build import warm_up
from ..engine.engine import Engine
from ..engine.expert_parallel import ExpertPlace
from ..engine.ranks import build_on_ranks
from ..engine.sequence import Sequence
from ..kv_transfer.connector import Connector
from ..kv_transfer.ends import End
from . import floor
from .machine import describe
from .step_profile import profile_steps

_DECODE_TOKENS = 128
_PROFILED_STEPS = 20


class Row(NamedTuple):
    """One measurement: ``kind`` is "prefill", "decode" or "mixed", of ``batch`` prompts of ``context`` tokens (mixed:
    of 100 to ``context``)."""

    kind: str
    batch: int
    context: int


ROWS = [
    Row("prefill", 1, 1024),
    Row("prefill", 1, 8192),
    Row("prefill", 8, 4096),
    Row("prefill", 32, 1024),
    Row("decode", 1, 1024),
    Row("decode", 8, 1024),
    Row("decode", 32, 1024),
    Row("decode", 128, 1024),
    Row("decode", 256, 512),
    Row("mixed", 256, 1024),
]


def records(config: Config, profiles: Path | None = None) -> Iterator[dict[str, Any]]:
    """Everything that is printed: a header with configuration and machine, then a record a row. Blocks.

    Args:
        config: of the model and the cache, and a `colocated` pool, whose limits and device are used.
        profiles: folder for traces; with it, rows say where their time goes.

    Raises:
        ConfigError: there is no such pool, or the model cannot be served.
    """
    pool = config.pools.colocated
    if pool is None:
        raise ConfigError(
            "one engine is measured, and the configuration has no colocated pool",
            fix="--set 'pools={colocated: {gpus_per_replica: 1, max_batched_tokens: 8192}}'",
        )
    device = torch.device("cuda" if pool.gpus_per_replica else "cpu")
    machine = describe()
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
    yield {"bench": "engine", "config": config.model_dump(mode="json"), "machine": machine}
    bench = EngineBench(config, pool, device)
    try:
        yield bench.started
        yield from bench.run(ROWS, profiles)
    finally:
        bench.close()


class EngineBench:
    """An engine, and prompts for it.

    Args:
        config: of the model and the cache.
        pool: its limits are used.
        device: where.
        place: among the ranks that share experts, each of which measures the same at the same time.
    """

    def __init__(
        self, config: Config, pool: ColocatedPool, device: torch.device, place: ExpertPlace | None = None
    ) -> None:
        self._config = config
        self._pool = pool
        self._device = device
        start_s = time.perf_counter()
        threads = pool.threads or psutil.cpu_count() or 1
        built, self._ranks = build_on_ranks(config, pool, threads, lambda *_: None, place)
        built_s = time.perf_counter()
        warm_up(built.engine, pool.max_batched_tokens, lambda *_: None)
        self._engine: Engine = built.engine
        built.engine.runner.serve()
        settle()
        self._max_model_len = built.max_model_len
        self._fingerprint = built.fingerprint
        self._rng = random.Random(0)
        self._root = root_hash("bench")
        warm_s = time.perf_counter()
        self._generate(1, 32, 1)
        self.started = {
            "build_s": round(built_s - start_s, 2),
            "warm_up_s": round(warm_s - built_s, 2),
            "process_to_first_token_s": round(time.time() - psutil.Process().create_time(), 2),
            "num_blocks": self._engine.pool.num_blocks,
        }
        if device.type == "cuda":
            self.started["free_mib"] = torch.cuda.mem_get_info(device)[0] >> 20

    @property
    def engine(self) -> Engine:
        """What is measured."""
        return self._engine

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self._ranks is not None:
            self._ranks.close()

    def run(self, rows: list[Row], profiles: Path | None) -> Iterator[dict[str, Any]]:
        """Measure; one record a row. Blocks."""
        self._generate(2, 64, 8)
        model = self._engine.model
        ceilings = floor.measure(self._device, model.dtype).of(self._pool.tensor_parallel)
        yield {
            "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9),
            "product_tflop_per_s": round(ceilings.flops / 1e12, 1),
        }
        for row in rows:
            length = row.context + 1 + (_DECODE_TOKENS if row.kind == "decode" else 0)
            chunk, block_tokens = self._pool.max_batched_tokens, self._engine.block_tokens
            blocks = row.batch * num_blocks_needed(self._engine.groups, length, chunk, block_tokens)
            record: dict[str, Any] = row._asdict()
            if row.kind == "mixed":
                length, blocks = 2 * row.context, 0
            if length > self._max_model_len:
                yield record | {"skipped": f"needs a context of {length}, the model has {self._max_model_len}"}
                continue
            if blocks > self._engine.pool.num_blocks:
                yield record | {"skipped": f"needs {blocks} blocks of {self._engine.pool.num_blocks}"}
                continue
            if row.kind == "prefill":
                seconds = min(self._generate(row.batch, row.context, 1) for _ in range(3))
                least_s = floor.prefill_s(model.spec, row.batch, row.context, ceilings)
                record |= {"tokens_per_s": round(row.batch * row.context / seconds, 1), "of_floor": least_s / seconds}
            elif row.kind == "decode":
                seconds = self.decode_step_s(row.batch, row.context)
                context = row.context + _DECODE_TOKENS // 2
                least_s = floor.decode_s(model.spec, row.batch, context, model.dtype.itemsize, ceilings)
                record |= {"step_ms": round(seconds * 1e3, 3), "of_floor": least_s / seconds}
            else:
                record |= self._mixed(row)
            if "of_floor" in record:
                record["of_floor"] = round(record["of_floor"], 3)
            yield record
            if profiles is not None and row.kind != "mixed":
                yield record | {"profile": self._profile(row, profiles)}

    def decode_step_s(self, batch: int, context: int, count: int = _DECODE_TOKENS) -> float:
        """Seconds of a decode step: best of two, after a warm-up."""
        self._generate(batch, context, min(4, count))
        one = min(self._generate(batch, context, 1) for _ in range(2))
        many = min(self._generate(batch, context, count + 1) for _ in range(2))
        return (many - one) / count

    def _profile(self, row: Row, folder: Path) -> dict[str, Any]:
        trace = folder / f"{row.kind}-{row.batch}x{row.context}.json.gz"
        sequences = [self._sequence(row.context, index) for index in range(row.batch)]
        if row.kind == "prefill":
            found = profile_steps(lambda: self._compute(sequences, 1), 1, self._device, trace)
        else:
            self._compute(sequences, 2)
            steps = _PROFILED_STEPS
            found = profile_steps(lambda: self._compute(sequences, 2 + steps), steps, self._device, trace)
        self._release(sequences)
        return found

    def _generate(self, batch: int, context: int, count: int) -> float:
        """Wall seconds of a whole generation."""
        sequences = [self._sequence(context, index) for index in range(batch)]
        self._wait()
        start_s = time.perf_counter()
        self._compute(sequences, count)
        seconds = time.perf_counter() - start_s
        self._release(sequences)
        return seconds

    def _compute(self, sequences: list[Sequence], count: int) -> None:
        """Go on until each has ``count`` output tokens."""
        engine = self._engine
        for sequence in sequences:
            if not engine.reserve(sequence, sequence.num_prompt_tokens + count):
                raise MemoryError("the KV cache is too small")
        flight = None
        while True:
            plan = self._plan(sequences, count)
            started = engine.submit(plan) if plan else None
            for step in (flight, None if engine.overlaps else started):
                for outcome in engine.collect(step) if step is not None else ():
                    if outcome.samples is not None and outcome.samples[0] is not None:
                        outcome.sequence.tokens.append(outcome.samples[0].token)
            flight = started if engine.overlaps else None
            if started is None:
                break
        self._wait()

    def _release(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._engine.discard(sequence)

    def _sequence(self, context: int, index: int) -> Sequence:
        vocabulary = self._engine.model.spec.vocab_size
        prompt = [self._rng.randrange(vocabulary) for _ in range(context)]
        return Sequence("bench", prompt, context, [Child(0, index)], Sampling(), self._root)

    def _plan(self, sequences: list[Sequence], count: int) -> list[Work]:
        """Chunks of prompts while there are any, then a token of each."""
        room = self._pool.max_batched_tokens
        plan = []
        todo = [s for s in sequences if s.num_expected < s.num_prompt_tokens + count]
        prompts = [s for s in todo if s.num_computed < s.num_prompt_tokens]
        for sequence in prompts or todo:
            num_new = min(room, sequence.num_expected - sequence.num_computed)
            if num_new:
                plan.append(Work(sequence, num_new))
                room -= num_new
        return plan

    def _mixed(self, row: Row) -> dict[str, Any]:
        """Requests through the worker that serves them, without sockets."""
        done = 0
        failed: list[str] = []

        def send(_: str, message: Message) -> None:
            nonlocal done
            if isinstance(message, Update):
                done += sum(child.finish is not None for child in message.children)
            elif isinstance(message, Refused):
                failed.append(message.message)

        kv, cache = self._config.kv, self._engine.cache
        metrics, clock = WorkerMetrics(CollectorRegistry()), SystemClock()
        layout = cache.layout
        connector = Connector(
            "colocated-0#1", self._fingerprint, layout, self._engine.groups, self._engine.runner.layer_groups,
            [End(range(layout.num_kv_heads), {})], kv.transport, kv.lease_s, clock, metrics,
        )  # fmt: skip
        worker = DecodeWorker(
            self._engine, connector, self._pool, self._config, self._fingerprint, self._max_model_len, clock, metrics,
            send,
        )  # fmt: skip
        rng = random.Random(0)
        vocabulary = self._engine.model.spec.vocab_size
        lengths = [(rng.randint(100, row.context), rng.randint(100, row.context)) for _ in range(row.batch)]
        requests = [
            Generate(
                ticket, f"bench-{ticket}", [self._rng.randrange(vocabulary) for _ in range(inputs)], inputs,
                [Child(0, ticket)], Sampling(temperature=0.6), Stopping(outputs),
            )
            for ticket, (inputs, outputs) in enumerate(lengths)
        ]  # fmt: skip
        self._wait()
        start_s = time.perf_counter()
        for request in requests:
            worker.handle("gateway-0#1", request)
        while worker.step():
            pass
        seconds = time.perf_counter() - start_s
        connector.close()
        outputs = sum(outputs for _, outputs in lengths)
        return {
            "output_tokens_per_s": round(outputs / seconds, 1),
            "seconds": round(seconds, 3),
            "output_tokens": outputs,
            "finished": done,
            "failed": failed[:3],
            "preemptions": int(metrics.preemptions._value.get()),
            "steps": {
                kind: {
                    "count": int(sum(bucket.get() for bucket in metrics.step_s.labels(kind)._buckets)),
                    "seconds": round(metrics.step_s.labels(kind)._sum.get(), 3),
                    "device_s": round(metrics.forward_s.labels(kind)._sum.get(), 3),
                }
                for kind in ("mixed", "decode")
            },
        }

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
