"""What tiers do for those who wait, and what they cost those whom they do not help: `tandem serve` with tiers and
without, loaded in turns."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from ..core.errors import WorkerError
from .client import Reply, Server
from .serve import Load, ServedArm, Step, compare, verdict, warm_up_jobs
from .summary import Slo, spread
from .workload import Job

_READY_TIMEOUT_S = 300.0
_VOCABULARY = 4000
_SERVE = "from tandem.cluster.cli import main; main()"
_SLO = Slo(1.0, 0.05)


class Served:
    """A `tandem serve` of its own, of the demo model.

    Args:
        home: for its caches and logs.
        settings: "kv.capacity=8MiB" each.
    """

    def __init__(self, home: Path, settings: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        arguments = [argument for setting in (*settings, f"gateway.port={port}") for argument in ("--set", setting)]
        home.mkdir()
        self._output = home / "output"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                ["env", f"XDG_CACHE_HOME={home}", sys.executable, "-c", _SERVE, "serve", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.server = Server(f"http://127.0.0.1:{port}")

    def wait_ready(self) -> None:
        """Until it serves. Blocks.

        Raises:
            WorkerError: it does not.
        """
        until_s = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < until_s and self._process.poll() is None:
            try:
                if asyncio.run(self.server.get("/readyz"))[0] == 200:
                    return
            except (OSError, asyncio.IncompleteReadError):
                pass
            time.sleep(0.2)
        raise WorkerError(f"tandem serve does not: {self._output.read_text()[-2000:]}")

    def metrics(self) -> dict[str, float]:
        """What tiers did, by metric and labels, of all workers together."""
        sums: dict[str, float] = {}
        for line in asyncio.run(self.server.get("/metrics"))[1].splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("tandem_offload_") and "_created" not in name:
                family, _, labels = name.partition("{")
                kept = [label for label in labels.rstrip("}").split(",") if label and not label.startswith("worker=")]
                key = ",".join([family, *kept]).replace('"', "")
                sums[key] = sums.get(key, 0.0) + float(value)
        return {name: value for name, value in sums.items() if value}

    def cpu_s(self) -> float:
        """Processor time that all of its processes have taken."""
        times = [process.cpu_times() for process in self.processes()]
        return sum(one.user + one.system for one in times)

    def processes(self) -> list[psutil.Process]:
        """All of them."""
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def close(self) -> None:
        """End it. Blocks."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class CountedArm(ServedArm):
    """An arm whose processor time is counted: other load on the machine changes that less than throughput."""

    def __init__(self, name: str, served: Served) -> None:
        super().__init__(name, served.server)
        self._served = served

    def run(self, load: Load, step: Step) -> dict[str, Any]:
        before_s = self._served.cpu_s()
        return super().run(load, step) | {"cpu_s": round(self._served.cpu_s() - before_s, 3)}


def _start(folder: Path, settings: Sequence[str], tiers: str) -> dict[str, Served]:
    arms: dict[str, Served] = {}
    try:
        for name, value in (("tiers", tiers), ("none", "[]")):
            arms[name] = Served(folder / name, [*settings, f"offload.tiers={value}"])
            # One after the other: both at once would be slower.
            arms[name].wait_ready()
    except BaseException:
        for arm in arms.values():
            arm.close()
        raise
    return arms


def measure_chat(
    num_users: int, num_turns: int, input_tokens: int, settings: Sequence[str], tiers: str, repeats: int
) -> dict[str, Any]:
    """Mean time to the first token of conversations that take turns, with tiers and without.

    Args:
        num_users: conversations; a question of each is asked at a time, in turn.
        num_turns: of each.
        input_tokens: of the first question; later ones have a tenth.
        settings: of both arms.
        tiers: `offload.tiers` of one.
        repeats: of all, in turns, each time with other conversations.
    """
    turns: dict[str, list[dict[str, Any]]] = {"tiers": [], "none": []}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        arms = _start(Path(folder), settings, tiers.replace("FOLDER", folder))
        try:
            for repeat in range(repeats):
                answers = {}
                for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
                    replies = asyncio.run(_chat(arms[name].server, num_users, num_turns, input_tokens, repeat))
                    turns[name].append(_of_chat(replies, num_users))
                    answers[name] = [reply.tokens for reply in replies]
                if answers["tiers"] != answers["none"]:
                    raise WorkerError("the answers with tiers are not those without")
            metrics = arms["tiers"].metrics()
        finally:
            for arm in arms.values():
                arm.close()
    means = {name: [run["ttft_s"]["mean"] for run in runs] for name, runs in turns.items()}
    ratios = [none / with_tiers for with_tiers, none in zip(means["tiers"], means["none"], strict=True)]
    return {
        "users": num_users, "turns": num_turns, "input_tokens": input_tokens, "settings": list(settings),
        "tiers": tiers, "runs": turns, "metrics": metrics,
        "mean_ttft_s": {name: round(median(values), 6) for name, values in means.items()},
        "times_sooner": round(median(ratios), 3), "times_sooner_each": [round(ratio, 3) for ratio in ratios],
    }  # fmt: skip


async def _chat(server: Server, num_users: int, num_turns: int, input_tokens: int, seed: int) -> list[Reply]:
    rng = random.Random(seed)
    histories: list[list[int]] = [[] for _ in range(num_users)]
    replies = []
    for turn in range(num_turns):
        for history in histories:
            size = max(input_tokens // 10, 1) if turn else input_tokens
            history += [rng.randrange(5, _VOCABULARY) for _ in range(size)]
            reply = await server.complete({"prompt": history, "max_tokens": 16, "temperature": 0, "ignore_eos": True})
            if reply.error:
                raise WorkerError(reply.error)
            history += reply.tokens
            replies.append(reply)
    return replies


def _of_chat(replies: Sequence[Reply], num_users: int) -> dict[str, Any]:
    first = [reply.token_times_s[0] - reply.sent_s for reply in replies]
    return {
        "ttft_s": spread(first),
        "later_ttft_s": spread(first[num_users:]),
        "seconds": round(replies[-1].end_s - replies[0].sent_s, 4),
    }


def measure_misses(
    num_requests: int, input_tokens: int, output_tokens: int, settings: Sequence[str], tiers: str, repeats: int
) -> dict[str, Any]:
    """Throughput where nothing ever comes back, with tiers that store it all and without.

    Args:
        num_requests: of a run, 8 at a time.
        input_tokens: of each.
        output_tokens: likewise.
        settings: of both arms.
        tiers: `offload.tiers` of one.
        repeats: of a run, in turns.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        served = _start(Path(folder), settings, tiers.replace("FOLDER", folder))
        try:
            arms = [CountedArm(name, arm) for name, arm in served.items()]
            compare(arms, [Load(warm_up_jobs(_VOCABULARY, 8, 0), 4, _SLO)], lambda *_: None)
            rng = random.Random(0)
            loads = [
                Load(
                    [
                        Job(0.0, [rng.randrange(5, _VOCABULARY) for _ in range(input_tokens)], output_tokens)
                        for _ in range(num_requests)
                    ],
                    8,
                    _SLO,
                )
                for _ in range(repeats)
            ]
            records = compare(arms, loads, lambda *_: None)
            metrics = served["tiers"].metrics()
        finally:
            for arm in served.values():
                arm.close()
    figures: dict[str, dict[str, list[float]]] = {
        figure: {name: [record[figure] for record in records if record["arm"] == name] for name in served}
        for figure in ("output_tokens_per_s", "cpu_s")
    }
    rates, cpu_s = figures.values()
    lost = [1 - with_tiers / none for with_tiers, none in zip(rates["tiers"], rates["none"], strict=True)]
    more = [with_tiers / none - 1 for with_tiers, none in zip(cpu_s["tiers"], cpu_s["none"], strict=True)]
    return {
        "requests": num_requests, "input_tokens": input_tokens, "output_tokens": output_tokens,
        "settings": list(settings), "tiers": tiers, "metrics": metrics, **figures,
        "lost": round(median(lost), 4), "lost_each": [round(share, 4) for share in lost],
        "more_cpu": round(median(more), 4), "more_cpu_each": [round(share, 4) for share in more],
        "verdict": verdict(records),
    }  # fmt: skip
