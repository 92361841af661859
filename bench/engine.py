"""`tandem bench engine`: one engine on one device, by the rules of offline `generate`.

A prefill row is the wall time of fresh random prompts with one output token, best of three. A decode row is (wall time
with 129 output tokens − wall time with 1) ÷ 128, best of two each. Greedy, no prefix cache, after one warm-up call.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..core.config import Config
from ..core.errors import ConfigError
from ..core.hashing import root_hash
from ..core.messages import Child, Sampling
from ..engine.batch import Work
from ..engine.build import build_engine
from ..engine.engine import Engine
from ..engine.sequence import Sequence
from .machine import describe

_DECODE_TOKENS = 128


class Row(NamedTuple):
    """One measurement: ``kind`` is "prefill" or "decode", of ``batch`` prompts of ``context`` tokens."""

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
]


def records(config: Config) -> Iterator[dict[str, Any]]:
    """Everything that is printed: a header with configuration and machine, then a record a row. Blocks.

    Args:
        config: of the model and the cache, and a `colocated` pool, whose limits and device are used.

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
    bench = EngineBench(config, device)
    yield {"bench": "engine", "config": config.model_dump(mode="json"), "machine": machine}
    yield {"build_s": round(bench.build_s, 2), "num_blocks": bench.num_blocks}
    yield from bench.run(ROWS)


class EngineBench:
    """An engine, and prompts for it.

    Args:
        config: of the model and the cache; its `colocated` pool's limits are used.
        device: where.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        pool = config.pools.colocated
        assert pool is not None
        self._max_batched_tokens = pool.max_batched_tokens
        self._device = device
        start_s = time.perf_counter()
        built = build_engine(config, pool.max_running, device, lambda *_: None)
        self._engine: Engine = built.engine
        self._max_model_len = built.max_model_len
        self.build_s = time.perf_counter() - start_s
        self.num_blocks = self._engine.pool.num_blocks
        self._rng = random.Random(0)
        self._root = root_hash("bench")

    def run(self, rows: list[Row]) -> Iterator[dict[str, Any]]:
        """Measure; one record a row. Blocks."""
        self._generate(2, 64, 8)
        for row in rows:
            length = row.context + 1 + (_DECODE_TOKENS if row.kind == "decode" else 0)
            blocks = row.batch * -(-length // self._engine.block_tokens)
            if length > self._max_model_len:
                yield {**row._asdict(), "skipped": f"needs a context of {length}, the model has {self._max_model_len}"}
                continue
            if blocks > self._engine.pool.num_blocks:
                yield {**row._asdict(), "skipped": f"needs {blocks} blocks of {self._engine.pool.num_blocks}"}
                continue
            if row.kind == "prefill":
                seconds = min(self._generate(row.batch, row.context, 1) for _ in range(3))
                yield {**row._asdict(), "tokens_per_s": round(row.batch * row.context / seconds, 1)}
            else:
                self._generate(row.batch, row.context, 4)
                one = min(self._generate(row.batch, row.context, 1) for _ in range(2))
                many = min(self._generate(row.batch, row.context, _DECODE_TOKENS + 1) for _ in range(2))
                yield {**row._asdict(), "step_ms": round((many - one) / _DECODE_TOKENS * 1e3, 3)}

    def _generate(self, batch: int, context: int, count: int) -> float:
        """Wall seconds of a whole generation."""
        engine = self._engine
        sequences = [self._sequence(context, index) for index in range(batch)]
        self._wait()
        start_s = time.perf_counter()
        for sequence in sequences:
            if not engine.reserve(sequence, context + count):
                raise MemoryError("the KV cache is too small")
        todo = sequences
        while todo:
            for outcome in engine.step(self._plan(todo)):
                if outcome.samples is not None and outcome.samples[0] is not None:
                    outcome.sequence.tokens.append(outcome.samples[0].token)
            todo = [sequence for sequence in todo if sequence.num_output_tokens < count]
        self._wait()
        seconds = time.perf_counter() - start_s
        for sequence in sequences:
            engine.pool.release(sequence.drop_blocks())
        return seconds

    def _sequence(self, context: int, index: int) -> Sequence:
        vocabulary = self._engine.model.spec.vocab_size
        prompt = [self._rng.randrange(vocabulary) for _ in range(context)]
        return Sequence("bench", prompt, context, [Child(0, index)], Sampling(), self._root)

    def _plan(self, sequences: list[Sequence]) -> list[Work]:
        """Chunks of prompts while there are any, then a token of each."""
        room = self._max_batched_tokens
        plan = []
        prompts = [s for s in sequences if s.num_computed < s.num_prompt_tokens]
        for sequence in prompts or sequences:
            num_new = min(room, sequence.num_tokens - sequence.num_computed)
            if num_new:
                plan.append(Work(sequence, num_new))
                room -= num_new
        return plan

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
