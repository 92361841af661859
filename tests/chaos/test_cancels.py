"""Requests that are called off in every state, on both sides, and calls of many outputs: no block stays behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from support.footprint import Footprint
from support.load import Body, Tokens, ask_all, body, check
from support.processes import Processes

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]

WORKERS: dict[str, dict[str, dict[str, Any]]] = {
    "prefill-0": {"pools": {"prefill": {"max_batched_tokens": 64, "max_running": 6}, "decode": {}}},
    # Its KV is late: the time between a prompt and its decoding is long enough to be hit.
    "decode-0": {"kv": {"inject_faults": {"share": 1.0, "kind": "delay", "delay_s": 0.7}}},
    # A third of its reads fail, and it computes their prompts itself, slowly.
    "decode-1": {
        "kv": {"inject_faults": {"share": 0.3}}, "pools": {"prefill": {}, "decode": {"max_batched_tokens": 16}},
    },
    "decode-2": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    config = {
        "model": {"max_model_len": 2048}, "kv": {"capacity": "24MiB", "poison_freed": True},
        "routing": {"local_prefill": "never"}, "pools": {"prefill": {}, "decode": {"max_running": 8}},
    }  # fmt: skip
    with Processes(tmp_path_factory.mktemp("cancels"), config, WORKERS) as cluster:
        yield cluster


def footprint_of(cluster: Processes, *workers: str) -> Footprint:
    ask_all(cluster.url, [body(i, max_tokens=2) for i in range(6)])
    return Footprint(cluster, [cluster.all[name].system for name in workers])


def test_clients_leave_between_prefill_and_decode(cluster: Processes) -> None:
    """With the first token, which comes before the KV, they are gone."""
    cluster.serve("prefill-0", "decode-0")
    footprint = footprint_of(cluster, "prefill-0", "decode-0")
    before = cluster.metric("tandem_aborts_total", worker="decode-0", state="loading")

    async def one(client: httpx.AsyncClient, index: int) -> int:
        tokens = 0
        async with client.stream("POST", "/v1/completions", json=body(index, stream=True)) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
                    if tokens:
                        break
        return tokens

    async def all_of_them() -> list[int]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60, trust_env=False) as client:
            return await asyncio.gather(*(one(client, i) for i in range(20)))

    assert asyncio.run(all_of_them()) == [1] * 20
    cluster.wait_metric("tandem_aborts_total", before + 20, worker="decode-0", state="loading")
    footprint.check()


def test_aborts_in_every_state_on_both_sides(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    names = ("prefill-0", "decode-0", "decode-1")

    def aborted() -> dict[str, float]:
        states = [("prefill-0", "queued"), ("prefill-0", "running")]
        states += [("decode-0", "waiting"), ("decode-0", "loading")]
        states += [("decode-1", "prefilling"), ("decode-1", "running")]
        return {
            f"{worker} {state}": cluster.metric("tandem_aborts_total", worker=worker, state=state)
            for worker, state in states
        }

    for seed in seeds:
        rng = random.Random(seed)
        cluster.serve(*names)
        footprint = footprint_of(cluster, *names)
        before = aborted()
        requests, leave = [], []
        for index in range(240):
            length = rng.choice([100, 600, 1500])
            stays = index % 8 == 0
            prompt = {} if stays else {"prompt": [rng.randrange(4096) for _ in range(length)]}
            requests.append(body(index, max_tokens=20 if stays else rng.choice([1, 30, 300]), **prompt))
            leave.append(None if stays else rng.random() ** 2 * 3)
        staying = [index for index, after_s in enumerate(leave) if after_s is None]
        answers = ask_all(cluster.url, requests, 24, leave.__getitem__)
        check([answers[i] for i in staying], golden([requests[i] for i in staying]))
        footprint.check()
        hits = {state: count - before[state] for state, count in aborted().items()}
        print(hits)
        assert all(hits.values()), hits


def test_calls_of_many_outputs_half_of_them_cancelled(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    """500 calls of two prompts and four outputs each."""
    for seed in seeds:
        rng = random.Random(seed)
        cluster.serve("prefill-0", "decode-2")
        footprint = footprint_of(cluster, "prefill-0", "decode-2")
        requests = []
        for index in range(500):
            prompts = [[(11 * index + 3 * j + k) % 4000 + 5 for j in range(10 + index % 50)] for k in range(2)]
            # Twenty different calls, so that few must be made undisturbed.
            requests.append(body(index % 20, prompt=prompts if index < 20 else requests[index % 20]["prompt"], n=4,
                                 max_tokens=6))  # fmt: skip
        leave = [None if index % 2 else rng.random() * 0.2 for index in range(500)]
        answers = ask_all(cluster.url, requests, 20, leave.__getitem__)
        check(answers, golden(requests))
        assert sum(answer.status == 0 for answer in answers) > 150
        footprint.check()
