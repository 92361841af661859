"""A thousand clients that leave, at every moment of a request, on real processes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest
from support.load import connecting
from support.served import Served

pytestmark = pytest.mark.chaos


def test_a_thousand_clients_leave(tmp_path: Path) -> None:
    served = Served(
        tmp_path, "--set", "pools.prefill={max_batched_tokens: 128}", "--set", "pools.decode={max_running: 8}",
        "--set", "routing.local_prefill=auto",
    )  # fmt: skip
    try:
        served.wait_ready()
        golden = served.complete(prompt="def neighbour(", max_tokens=16, temperature=1.0, seed=3)["choices"][0]["text"]
        rng = random.Random(0)
        counts: Counter[str] = Counter()

        async def one(client: httpx.AsyncClient, index: int) -> None:
            if index % 10 == 0:
                body = {"prompt": "def neighbour(", "max_tokens": 16, "temperature": 1.0, "seed": 3}
                answer = await client.post("/v1/completions", json=body)
                assert answer.json()["choices"][0]["text"] == golden
                counts["neighbours"] += 1
                return
            body = {
                "prompt": [rng.randrange(4096) for _ in range(rng.choice([3, 40, 300, 1500]))],
                "max_tokens": rng.choice([1, 20, 200]),
                "stream": rng.random() < 0.5,
                "n": rng.choice([1, 1, 2]),
                "ignore_eos": True,
            }
            async with connecting(served.url, 120) as leaving:
                try:
                    await asyncio.wait_for(leaving.post("/v1/completions", json=body), rng.random() ** 2 * 1.5)
                    counts["finished"] += 1
                except TimeoutError:
                    counts["left"] += 1

        async def all_of_them() -> None:
            async with connecting(served.url, 120) as client:
                pending = iter(range(1300))

                async def worker() -> None:
                    for index in pending:
                        await one(client, index)

                await asyncio.gather(*(worker() for _ in range(24)))

        asyncio.run(all_of_them())
        assert counts["left"] >= 1000 * 0.6, counts
        served.wait_idle(timeout_s=15)
        states = {
            state: served.metric("tandem_aborts_total", state=state)
            for state in ("waiting", "loading", "prefilling", "running", "queued")
        }
        print(dict(counts), states)
        assert states["waiting"] + states["queued"] > 0
        assert states["loading"] > 0
        assert states["running"] > 0
        assert served.stop() == 0
    finally:
        served.kill()
