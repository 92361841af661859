"""Everything at once, for as long as it is asked for: faults of every kind, kills, stops, and clients that leave.

`pytest tests/chaos/test_soak.py --soak MINUTES`; with `--soak`, every other chaos test that takes seeds repeats as well.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.footprint import Footprint
from support.load import Body, Tokens, ask_all, body, check
from support.processes import Processes

pytestmark = [pytest.mark.chaos, pytest.mark.soak]

Golden = Callable[[list[Body]], list[Tokens]]
BLOCK_BYTES = 6 * 2 * 2 * 16 * 32 * 4


class Nuisance:
    """Kills or stops a worker now and then, until it is left."""

    def __init__(self, cluster: Processes, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nuisance")

    def _run(self) -> None:
        while not self._over.wait(self._rng.uniform(0.5, 3)):
            victim = self._cluster.all[self._rng.choice([process.worker for process in self._cluster.workers()])]
            if self._rng.random() < 0.5:
                self._cluster.replace(victim.worker)
            else:
                victim.system.suspend()
                self._over.wait(self._rng.uniform(0.1, 4))
                victim.system.resume()

    def __enter__(self) -> Nuisance:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_everything_at_once(tmp_path: Path, golden: Golden, soak_minutes: float) -> None:
    """Rounds of a hundred requests on a new cluster of random settings each; a failure's round is printed."""
    until_s = time.monotonic() + soak_minutes * 60
    rounds = 0
    while time.monotonic() < until_s:
        seed = random.SystemRandom().randrange(1 << 31)
        rng = random.Random(seed)
        policy = rng.choice(["recompute", "fail"])
        faults = {
            "share": rng.choice([0.01, 0.1]), "kind": rng.choice(["error", "delay", "corrupt"]),
            "delay_s": rng.choice([0.05, 2.0]), "seed": seed,
        }  # fmt: skip
        config = {
            "model": {"max_model_len": 512}, "routing": {"local_prefill": rng.choice(["never", "auto"])},
            "pools": {"prefill": {"max_batched_tokens": rng.choice([64, 256])}, "decode": {}},
            "kv": {
                "poison_freed": True, "lease_s": rng.choice([1.0, 5.0]), "transport": rng.choice(["shm", "zmq"]),
                "capacity": rng.choice([60, 120]) * BLOCK_BYTES, "inject_faults": faults, "on_load_failure": policy,
            },
        }  # fmt: skip
        print(f"round {rounds}: seed {seed}: {config}", flush=True)
        folder = tmp_path / str(seed)
        folder.mkdir()
        with Processes(folder, config, {"prefill-0": {}, "prefill-1": {}, "decode-0": {}, "decode-1": {}}) as cluster:
            cluster.serve()
            requests = [body(rng.randrange(300), max_tokens=rng.choice([8, 60])) for _ in range(100)]
            leave = [rng.choice([None, None, rng.random()]) for _ in requests]
            with Nuisance(cluster, rng):
                answers = ask_all(cluster.url, requests, 16, leave.__getitem__)
            check(answers, golden(requests), errors=policy == "fail")
            cluster.wait_routable()
            answers = ask_all(cluster.url, requests[:20], 16)
            check(answers, golden(requests[:20]), errors=policy == "fail")
            Footprint(cluster, [process.system for process in cluster.workers()]).check()
        rounds += 1
    assert rounds > 0
