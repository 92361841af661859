"""What routing by KV does for those who wait: `tandem serve` with one policy and with another, loaded in turns.

The load is a service of several tenants. Each has instructions for the model, 1,536 tokens long, that all its requests
begin with; a request adds a question of 64 tokens and gets 16 tokens. Which tenant asks is drawn at random. A worker's
cache holds the instructions of a few tenants, all workers together those of all: a router that does not look sends a
request to a worker that has lost them, three times of four.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..core.errors import WorkerError
from .serve import Load, compare, warm_up_jobs
from .summary import Slo
from .tiers import CountedArm, Served
from .workload import Job

_VOCABULARY = 4000
_SLO = Slo(1.0, 0.05)


class Tenants(NamedTuple):
    """The load."""

    num_tenants: int = 16
    instruction_tokens: int = 1536
    question_tokens: int = 64
    output_tokens: int = 16
    num_requests: int = 96
    """Of a run."""
    rate: float | None = None
    """Requests a second, Poisson; None: a closed loop."""
    concurrency: int = 2
    """Of the closed loop."""

    def jobs(self, instructions: Sequence[list[int]], rng: random.Random) -> list[Job]:
        """One run."""
        jobs, at_s = [], 0.0
        for _ in range(self.num_requests):
            at_s += rng.expovariate(self.rate) if self.rate else 0.0
            jobs.append(Job(at_s, rng.choice(instructions) + _tokens(rng, self.question_tokens), self.output_tokens))
        return jobs


def measure(
    tenants: Tenants, policies: Sequence[str], num_workers: int, settings: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Each policy's times to the first token, and how much sooner the first policy's are than the others'. Blocks.

    Args:
        tenants: the load.
        policies: of the clusters, which have the same workers.
        num_workers: of each; they do both prefill and decode.
        settings: of all, "kv.capacity=12MiB" each.
        repeats: of a run, in turns, each time with other questions. Before them, one that is not counted.
    """
    rng = random.Random(0)
    instructions = [_tokens(rng, tenants.instruction_tokens) for _ in range(tenants.num_tenants)]
    served: dict[str, Served] = {}
    pool = f"pools.colocated={{replicas: {num_workers}, cpus_per_replica: 0.1}}"
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        try:
            for policy in policies:
                served[policy] = Served(Path(folder) / policy, [pool, *settings, f"routing.policy={policy}"])
                served[policy].wait_ready()
            arms = [CountedArm(policy, one) for policy, one in served.items()]
            concurrency = None if tenants.rate else tenants.concurrency
            compare(arms, [Load(warm_up_jobs(_VOCABULARY, 2 * num_workers, 0), 2, _SLO)], lambda *_: None)
            loads = [Load(tenants.jobs(instructions, rng), concurrency, _SLO) for _ in range(repeats + 1)]
            records = [record for record in compare(arms, loads, lambda *_: None) if record["repeat"]]
        finally:
            for one in served.values():
                one.close()
    failures = [record["failures"] for record in records if record["failures"]]
    if failures:
        raise WorkerError(f"requests failed: {failures}")
    means = {policy: [r["ttft_s"]["mean"] for r in records if r["arm"] == policy] for policy in policies}
    sooner = {
        policy: [other / first for first, other in zip(means[policies[0]], means[policy], strict=True)]
        for policy in policies[1:]
    }
    return {
        "tenants": tenants._asdict(), "workers": num_workers, "settings": list(settings), "repeats": repeats,
        "mean_ttft_s": {policy: round(median(values), 6) for policy, values in means.items()},
        "times_sooner_than": {policy: round(median(ratios), 3) for policy, ratios in sooner.items()},
        "times_sooner_each": {policy: [round(r, 3) for r in ratios] for policy, ratios in sooner.items()},
        "must": 1.8, "aim": 3.0, "runs": records,
    }  # fmt: skip


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, _VOCABULARY) for _ in range(count)]
