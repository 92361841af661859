"""What deaths and restarts of workers cost the clients of a `tandem serve` under load.

    python -m tandem.bench.faults kills   [--rate 10] [--repeats 2]
    python -m tandem.bench.faults restart [--rate 10] [--repeats 2]

The same requests come at the same times, undisturbed and disturbed, in turns: by a SIGKILL of every worker once, each
when the one before is back, or by a `tandem restart` of all. One JSON line a pair of runs, and one with the worst.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ..cluster.control.client import ControlClient
from ..cluster.control.credentials import Credentials
from ..core.errors import WorkerError
from .client import Reply
from .machine import describe
from .summary import percentile, spread
from .tiers import Served

SETTINGS = (
    "pools.prefill={replicas: 2, cpus_per_replica: 0.25}",
    "pools.decode={replicas: 2, cpus_per_replica: 0.25}",
    "kv.capacity=64MiB",
)
_NUM_BODIES = 64
_SETTLE_S = 2.0
"""Between two kills, beside what the first takes to be back."""
_BACK_TIMEOUT_S = 120.0


class Run(NamedTuple):
    """Requests by their number, and what happened to each."""

    replies: list[Reply]
    seconds: float
    done: list[float]
    """Seconds into the run at which the disturbances ended."""
    noticed: list[float]
    """Seconds from each kill until the controller knew, and told the gateways."""


class Cluster:
    """A served cluster, and who can disturb it.

    Args:
        folder: for its caches and logs.
        settings: "kv.capacity=8MiB" each.
    """

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self._served = Served(folder / "home", settings)
        self._folder = folder
        self.server = self._served.server
        self.noticed_s: list[float] = []
        """Seconds from each kill until the controller knew."""

    def wait_ready(self) -> None:
        """Until it serves. Blocks."""
        self._served.wait_ready()
        [note] = self._folder.glob("home/tandem/logs/*/control.json")
        self._control = Credentials.read(note)

    def close(self) -> None:
        """End it. Blocks."""
        self._served.close()

    async def kill_each(self) -> list[str]:
        """SIGKILL every worker once, each when the one before is back. Returns their names."""
        names = [worker.name for worker in await asyncio.to_thread(self._workers)]
        for name in names:
            lives = {worker.name: worker.restarts for worker in await asyncio.to_thread(self._workers)}
            killed_s = await asyncio.to_thread(self._kill, name)
            until_s = time.monotonic() + _BACK_TIMEOUT_S
            while not any(
                worker.name == name and worker.restarts > lives[name] and worker.phase == "ready"
                for worker in await asyncio.to_thread(self._workers)
            ):
                if time.monotonic() > until_s:
                    raise WorkerError(f"{name} does not come back")
                await asyncio.sleep(0.2)
            self.noticed_s.append(round(await asyncio.to_thread(self._gone_s, name, lives[name] + 1) - killed_s, 3))
            await asyncio.sleep(_SETTLE_S)
        return names

    def _kill(self, worker: str) -> float:
        process = self._process(worker)
        killed_s = time.time()
        process.kill()
        return killed_s

    def _gone_s(self, worker: str, life: int) -> float:
        """When the controller found a life to be over."""
        with ControlClient(self._control) as client:
            return next(e.at_s for e in client.watch() if e.text.startswith(f"{worker}#{life} is gone"))

    async def restart_each(self) -> list[str]:
        """`tandem restart`. Returns the workers' names."""

        def restart() -> list[str]:
            with ControlClient(self._control) as client:
                return list(client.restart("", 600.0))

        return await asyncio.to_thread(restart)

    def _workers(self) -> list[Any]:
        with ControlClient(self._control) as client:
            return [worker for worker in client.status() if worker.role != "gateway" and worker.phase != "drained"]

    def _process(self, worker: str) -> psutil.Process:
        """The newest process of a worker: it has the log open."""
        found: list[tuple[int, psutil.Process]] = []
        for process in self._served.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for file in process.open_files():
                    life = re.search(rf"/{worker}#(\d+)\.log$", file.path)
                    if life:
                        found.append((int(life[1]), process))
        if not found:
            raise WorkerError(f"no process of {worker}")
        return max(found, key=lambda pair: pair[0])[1]


def bodies(seed: int, output_tokens: int) -> list[dict[str, Any]]:
    """Requests that are sampled, with seeds: each has one right answer."""
    rng = random.Random(seed)
    return [
        {
            "prompt": [rng.randrange(5, 4000) for _ in range(rng.randint(32, 192))],
            "max_tokens": output_tokens, "temperature": 1.0, "seed": number, "ignore_eos": True,
        }
        for number in range(_NUM_BODIES)
    ]  # fmt: skip


async def load(
    cluster: Cluster, requests: list[dict[str, Any]], rate: float, seconds: float, disturb: Callable[[], Any] | None
) -> Run:
    """Send requests at a rate for ``seconds``, and for as long as the disturbance takes."""
    start_s = time.perf_counter()
    disturbance = asyncio.ensure_future(disturb()) if disturb else None
    tasks: list[asyncio.Task[Reply]] = []
    while True:
        now_s = time.perf_counter() - start_s
        if now_s >= seconds and (disturbance is None or disturbance.done()):
            break
        body = {**requests[len(tasks) % len(requests)], "cache_salt": f"{len(tasks)}-{time.monotonic_ns()}"}
        tasks.append(asyncio.create_task(cluster.server.complete(body)))
        await asyncio.sleep(max(0.0, start_s + len(tasks) / rate - time.perf_counter()))
    done = []
    if disturbance is not None:
        await disturbance
        done.append(round(time.perf_counter() - start_s, 3))
    replies = list(await asyncio.gather(*tasks))
    noticed, cluster.noticed_s = cluster.noticed_s, []
    return Run(replies, time.perf_counter() - start_s, done, noticed)


def figures(quiet: Run, disturbed: Run, golden: list[list[int]]) -> dict[str, Any]:
    """What a disturbance cost: failures, changed answers, time added to a request and between tokens."""

    def wrong(run: Run) -> dict[str, Any]:
        errors = [reply.error for reply in run.replies if reply.error]
        changed = sum(
            not reply.error and reply.tokens != golden[number % len(golden)] for number, reply in enumerate(run.replies)
        )
        return {"requests": len(run.replies), "failed": len(errors), "changed": changed, "errors": errors[:3]}

    def times(run: Run) -> tuple[list[float], list[float], list[float]]:
        good = [reply for reply in run.replies if not reply.error]
        gaps = [b - a for r in good for a, b in zip(r.token_times_s, r.token_times_s[1:], strict=False)]
        stalls = [max(b - a for a, b in zip([r.sent_s, *r.token_times_s], r.token_times_s, strict=False)) for r in good]
        return [reply.end_s - reply.sent_s for reply in good], gaps, stalls

    (e2e_a, gaps_a, _), (e2e_b, gaps_b, stalls_b) = times(quiet), times(disturbed)
    usual: dict[int, list[float]] = {}
    for number, reply in enumerate(quiet.replies):
        usual.setdefault(number % len(golden), []).append(reply.end_s - reply.sent_s)
    # Of a request against the same one undisturbed: what the disturbance added, the machine's noise included.
    added = [
        reply.end_s - reply.sent_s - sorted(usual[number % len(golden)])[len(usual[number % len(golden)]) // 2]
        for number, reply in enumerate(disturbed.replies)
        if not reply.error and number % len(golden) in usual
    ]
    return {
        "undisturbed": wrong(quiet) | {"e2e_s": spread(e2e_a), "itl_s": spread(gaps_a)},
        "disturbed": wrong(disturbed)
        | {"e2e_s": spread(e2e_b), "itl_s": spread(gaps_b), "longest_gap_s": spread(stalls_b)},
        "disturbed_for_s": disturbed.done,
        "death_noticed_s": disturbed.noticed,
        "added_latency_s": spread(added) | {"max": round(max(added), 6)},
        "itl_p99_ratio": round(percentile(gaps_b, 99) / percentile(gaps_a, 99), 3),
    }  # fmt: skip


async def measure(cluster: Cluster, scenario: str, rate: float, output_tokens: int, repeats: int) -> None:
    """Print a line for each pair of runs, and one with the worst of each figure."""
    requests = bodies(0, output_tokens)
    golden = []
    for body in requests:
        reply = await cluster.server.complete(body)
        if reply.error:
            raise WorkerError(f"an undisturbed request fails: {reply.error}")
        golden.append(reply.tokens)
    disturb = {"kills": cluster.kill_each, "restart": cluster.restart_each}[scenario]
    common = {"bench": "faults", "scenario": scenario, "rate": rate, "output_tokens": output_tokens}
    pairs = []
    for repeat in range(repeats):
        disturbed = await load(cluster, requests, rate, 0.0, disturb)
        quiet = await load(cluster, requests, rate, max(10.0, len(requests) / rate), None)
        pairs.append(figures(quiet, disturbed, golden))
        print(json.dumps({**common, "repeat": repeat, **pairs[-1]}), flush=True)
    worst = {
        "failed": sum(pair["disturbed"]["failed"] for pair in pairs),
        "changed": sum(pair["disturbed"]["changed"] for pair in pairs),
        "requests": sum(pair["disturbed"]["requests"] for pair in pairs),
        "added_latency_p99_s": max(pair["added_latency_s"]["p99"] for pair in pairs),
        "itl_p99_ratio": max(pair["itl_p99_ratio"] for pair in pairs),
    }
    print(json.dumps({**common, "worst": worst, "machine": describe()}), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["kills", "restart"])
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        cluster = Cluster(Path(folder), [*SETTINGS, *arguments.settings])
        try:
            cluster.wait_ready()
            asyncio.run(
                measure(cluster, arguments.scenario, arguments.rate, arguments.output_tokens, arguments.repeats)
            )
        finally:
            cluster.close()


if __name__ == "__main__":
    main()
