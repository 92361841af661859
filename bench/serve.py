"""`tandem bench serve`: load against a served model, and the same load against a baseline, in turns.

Each arm is a whole cluster of its own on the same machine; only one is loaded at a time, and the order changes with
every repetition. The transformers arm runs the same prompts as one batch of `generate`.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prometheus_client.parser import text_string_to_metric_families

from ..core.checkpoint import model_folder
from ..core.config import Config
from ..core.errors import ConfigError, WorkerError
from .client import Reply, Server
from .summary import Slo, summarize
from .workload import Job

Step = Callable[[str, int, int], None]
"""Called with an arm's name, requests done, and requests in all."""

_TRANSFORMERS = Path(__file__).with_name("transformers_batch.py")

_HISTOGRAMS = {
    "tandem_stage_seconds": "stage",
    "tandem_step_seconds": "kind",
    "tandem_step_forward_seconds": "kind",
}
"""What is taken from the server's metrics, by which label."""

_Sums = dict[str, dict[str, list[float]]]


class Load(NamedTuple):
    """How jobs are sent."""

    jobs: Sequence[Job]
    concurrency: int | None
    """Requests in flight, of a closed loop; None: at their times, whatever is in flight."""
    slo: Slo


class Arm(Protocol):
    """Something that is measured."""

    name: str

    def run(self, load: Load, step: Step) -> dict[str, Any]:
        """Run a load, and return its figures. Blocks."""
        ...


class ServedArm:
    """A running server.

    Args:
        name: of the arm.
        server: where it is.
    """

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self._server = server

    def run(self, load: Load, step: Step) -> dict[str, Any]:
        return asyncio.run(self._run(load, step))

    async def _run(self, load: Load, step: Step) -> dict[str, Any]:
        before = await self._sums()
        replies: list[Reply] = []

        async def one(job: Job) -> None:
            body = {"prompt": job.prompt, "max_tokens": job.output_tokens, "temperature": 0, "ignore_eos": True}
            replies.append(await self._server.complete(body))
            step(self.name, len(replies), len(load.jobs))

        if load.concurrency is None:
            await _open_loop(load.jobs, one)
        else:
            await _closed_loop(load.jobs, load.concurrency, one)
        means = _means(before, await self._sums())
        return summarize(replies, load.slo) | {
            name.removeprefix("tandem_").replace("seconds", "mean_s"): mean for name, mean in means.items()
        }

    async def _sums(self) -> _Sums:
        """Sum and count of each kind of seconds, as the server has counted them."""
        status, text = await self._server.get("/metrics")
        sums: _Sums = {}
        for family in text_string_to_metric_families(text) if status == 200 else ():
            label = _HISTOGRAMS.get(family.name, "")
            for sample in family.samples:
                if label and sample.name.endswith(("_sum", "_count")):
                    pair = sums.setdefault(family.name, {}).setdefault(sample.labels[label], [0.0, 0.0])
                    pair[0 if sample.name.endswith("_sum") else 1] += sample.value
        return sums


class TransformersArm:
    """`transformers.generate` on all prompts of a load as one batch, in a process of its own."""

    name = "transformers"

    def __init__(self, config: Config, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_TRANSFORMERS), str(model_folder(config)), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, load: Load, step: Step) -> dict[str, Any]:
        lengths = {(len(job.prompt), job.output_tokens) for job in load.jobs}
        if len(lengths) != 1:
            raise ConfigError("the transformers baseline runs one batch", fix="give one input and one output length")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"prompts": [job.prompt for job in load.jobs], "output_tokens": load.jobs[0].output_tokens}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError("the transformers baseline died; its error is above")
        seconds = json.loads(line)["seconds"]
        step(self.name, len(load.jobs), len(load.jobs))
        tokens = len(load.jobs) * load.jobs[0].output_tokens
        return {"requests": len(load.jobs), "seconds": round(seconds, 4), "output_tokens": tokens,
                "output_tokens_per_s": round(tokens / seconds, 2)}  # fmt: skip

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def colocated(config: Config) -> Config:
    """The same model on as many workers, each of which does both."""
    pools = config.pools
    if pools.prefill is None or pools.decode is None:
        raise ConfigError("the configuration is colocated itself", fix="give prefill and decode pools to compare")
    pool = {
        "replicas": pools.prefill.replicas + pools.decode.replicas,
        "cpus_per_replica": pools.decode.cpus_per_replica,
        "threads": pools.decode.threads,
        "max_running": pools.decode.max_running,
        "max_batched_tokens": pools.prefill.max_batched_tokens,
    }
    return Config.model_validate(config.model_dump() | {"pools": {"colocated": pool}})


def compare(arms: Sequence[Arm], loads: Sequence[Load], step: Step) -> list[dict[str, Any]]:
    """Run every load on every arm, alternating; one record a run."""
    records = []
    for repeat, load in enumerate(loads):
        order = list(arms) if repeat % 2 == 0 else list(reversed(arms))
        for arm in order:
            records.append({"arm": arm.name, "repeat": repeat, **arm.run(load, step)})
    return records


def verdict(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions, and the first arm's against each other's."""
    arms = list(dict.fromkeys(record["arm"] for record in records))
    medians: dict[str, dict[str, float]] = {}
    for arm in arms:
        own = [record for record in records if record["arm"] == arm]
        figures = {"output_tokens_per_s": [record["output_tokens_per_s"] for record in own]}
        for name in ("ttft_s", "itl_s", "e2e_s"):
            for percent in ("p50", "p90", "p99"):
                figures[f"{name}_{percent}"] = [record[name][percent] for record in own if name in record]
        figures["goodput_requests_per_s"] = [r["goodput_requests_per_s"] for r in own if "goodput_requests_per_s" in r]
        medians[arm] = {name: _median(values) for name, values in figures.items() if values}
    ratios = {
        arm: {
            name: round(value / medians[arm][name], 4)
            for name, value in medians[arms[0]].items()
            if medians[arm].get(name)
        }
        for arm in arms[1:]
    }
    return {"median": medians, "ratio_to": ratios}


async def _open_loop(jobs: Sequence[Job], one: Callable[[Job], Any]) -> None:
    start_s = time.perf_counter()
    tasks = []
    for job in jobs:
        await asyncio.sleep(max(0.0, start_s + job.at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(job)))
    await asyncio.gather(*tasks)


async def _closed_loop(jobs: Sequence[Job], concurrency: int, one: Callable[[Job], Any]) -> None:
    waiting = list(reversed(jobs))

    async def worker() -> None:
        while waiting:
            await one(waiting.pop())

    await asyncio.gather(*(worker() for _ in range(concurrency)))


def _means(before: _Sums, after: _Sums) -> dict[str, dict[str, float]]:
    """Mean seconds of what was counted in between, by histogram and label."""
    means: dict[str, dict[str, float]] = {}
    for name, kinds in after.items():
        for kind, (total, count) in kinds.items():
            old_total, old_count = before.get(name, {}).get(kind, (0.0, 0.0))
            if count > old_count:
                means.setdefault(name, {})[kind] = round((total - old_total) / (count - old_count), 6)
    return means


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else round((ordered[middle - 1] + ordered[middle]) / 2, 6)


def warm_up_jobs(vocabulary: int, count: int, seed: int) -> list[Job]:
    """A few requests that nobody measures."""
    rng = random.Random(seed)
    return [Job(0.0, [rng.randrange(vocabulary) for _ in range(64)], 16) for _ in range(count)]
