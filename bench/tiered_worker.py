"""An engine with a host tier, and workers over it without sockets, in one process."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from ..core.clock import SystemClock
from ..core.config import Config
from ..core.errors import WorkerError
from ..core.garbage import settle
from ..core.messages import Child, Generate, Message, Refused, Sampling, Stopping, Update
from ..core.metrics import WorkerMetrics
from ..decode.worker import DecodeWorker
from ..engine.build import build_engine, warm_up
from ..engine.offloader import Offloader
from ..engine.tiers import open_tiers, whole_layout
from ..kv_transfer.connector import Connector
from ..kv_transfer.ends import End
from ..kv_transfer.offload.build import Place, start_host_tier

WAIT_S = 300.0
_TIER_S = 90.0
"""For registering its memory; where CUDA refuses, the log says so, and it is tried again and again."""
_GATEWAY = "gateway-0#1"


class Reply:
    """What has come of a request."""

    def __init__(self, sent_s: float) -> None:
        self.sent_s = sent_s
        self.first_s = 0.0
        self.tokens: list[int] = []
        self.stages: list[tuple[str, float]] = []
        self.finished = False


class Worker:
    """A worker over the bench's engine, without sockets.

    Args:
        bench: whose engine.
        tiers: whether it has them.
    """

    def __init__(self, bench: Bench, *, tiers: bool) -> None:
        self._wake = bench.wake
        self.metrics, clock = WorkerMetrics(CollectorRegistry()), SystemClock()
        engine, config = bench.engine, bench.config
        layout, kv, pool = engine.cache.layout, config.kv, config.pools.colocated
        assert pool is not None
        self._connector = Connector(
            "colocated-0#1", bench.fingerprint, layout, engine.groups, engine.runner.layer_groups,
            [End(range(layout.num_kv_heads), {})], kv.transport, kv.lease_s, clock, self.metrics,
        )  # fmt: skip
        self.offloader = Offloader[Any](engine, bench.tiers if tiers else None, clock, self.metrics)
        self._worker = DecodeWorker(
            engine, self._connector, pool, config, bench.fingerprint, bench.max_model_len, clock, self.metrics,
            self._take, None, self.offloader,
        )  # fmt: skip
        self._replies: dict[int, Reply] = {}

    def send(self, tokens: list[int], output_tokens: int) -> Reply:
        """A request, greedy."""
        ticket = len(self._replies) + 1
        reply = self._replies[ticket] = Reply(time.perf_counter())
        request = Generate(
            ticket, f"r{ticket}", tokens, len(tokens), [Child(0, ticket)], Sampling(temperature=0.0),
            Stopping(output_tokens),
        )  # fmt: skip
        self._worker.handle(_GATEWAY, request)
        return reply

    def turn(self) -> bool:
        """One step, or a short sleep where there is nothing to compute. Returns whether there was."""
        if self._worker.step():
            return True
        self._wake.wait(0.005)
        self._wake.clear()
        return False

    def run(self, done: Callable[[], bool]) -> None:
        """Until then.

        Raises:
            WorkerError: it does not come to that.
        """
        end_s = time.perf_counter() + WAIT_S
        while not done():
            self.turn()
            if time.perf_counter() > end_s:
                raise WorkerError(f"nothing came of it in {WAIT_S:g} s")

    def close(self) -> None:
        """Finish everything, stores too."""
        self.run(lambda: all(reply.finished for reply in self._replies.values()) and not self.offloader.num_open)
        while self._worker.step():  # what overlaps
            pass
        self._connector.close()

    def loads(self) -> dict[str, int]:
        """How many ended how."""
        names = ("loaded", "failed", "slow", "declined")
        return {name: int(self.metrics.offload_loads.labels(name)._value.get()) for name in names}

    def _take(self, _: str, message: Message) -> None:
        now_s = time.perf_counter()
        if isinstance(message, Refused):
            raise WorkerError(message.message)
        if isinstance(message, Update):
            for stage in message.stages:
                self._replies[stage.ticket].stages.append((stage.name, stage.at_s))
            for child in message.children:
                reply = self._replies[child.ticket]
                reply.first_s = reply.first_s or now_s
                reply.tokens += child.tokens
                reply.finished |= child.finish is not None


class Bench:
    """An engine with a host tier. Blocks until both are ready.

    Args:
        options: of the command line.
        folder: of the model.
        home: a folder for the keeper's socket.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, home: Path) -> None:
        self.options = options
        device = torch.device("cpu" if options.cpu else "cuda")
        pool = {
            "gpus_per_replica": int(not options.cpu), "max_running": options.batch,
            "max_batched_tokens": options.batched_tokens,
        }  # fmt: skip
        longest = max(options.prompt, options.context + options.num_windows * options.steps) + 64
        self.config = Config.model_validate(
            {
                "model": {"path": str(folder), "load": "dummy", "max_model_len": longest},
                "pools": {"colocated": pool},
                "kv": {"capacity": options.kv_capacity},
                "offload": {"tiers": [{"kind": "host", "capacity": options.capacity, "policy": "lru"}]},
            }
        )
        begin_s = time.perf_counter()
        built = build_engine(self.config, options.batch, device, lambda *_: None, options.batched_tokens)
        self.engine, self.fingerprint, self.max_model_len = built.engine, built.fingerprint, built.max_model_len
        built_s = time.perf_counter()
        warm_up(self.engine, options.batched_tokens, lambda *_: None)
        warm_s = time.perf_counter()
        self.block_bytes = whole_layout(self.engine).block_bytes
        self.rng = np.random.default_rng(options.seed)
        self.wake = threading.Event()
        self._keeper = start_host_tier(self.config.offload, self.block_bytes, home)
        tiers = open_tiers(self.config, self.engine, Place(home, "colocated-0", 1), SystemClock(), self.wake.set)
        assert tiers is not None
        self.tiers = tiers
        while tiers.stack.levels[0].tier.stats().away:
            tiers.stack.poll()
            time.sleep(0.01)
            if time.perf_counter() > warm_s + _TIER_S:
                raise WorkerError("the tier did not come")
        settle()
        self.started = {
            "bench": "offload-start", "build_s": round(built_s - begin_s, 1), "warm_up_s": round(warm_s - built_s, 1),
            "tier_s": round(time.perf_counter() - warm_s, 1), "num_blocks": self.engine.pool.num_blocks,
            "block_bytes": self.block_bytes, "tier_slots": tiers.stack.levels[0].tier.stats().num_slots,
        }  # fmt: skip

    def prompt(self, num_tokens: int) -> list[int]:
        """Nobody has seen it."""
        tokens: list[int] = self.rng.integers(self.engine.model.spec.vocab_size, size=num_tokens).tolist()
        return tokens

    def forget(self) -> None:
        """Of the prefix cache; the tier keeps what it has."""
        self.engine.pool.clear()

    def close(self) -> None:
        """End the tier, and then its keeper."""
        self.tiers.stack.close()
        self.engine.cache.close()
        if self._keeper is not None:
            self._keeper.communicate()
