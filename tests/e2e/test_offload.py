"""Conversations that do not fit the workers' memory, served with and without tiers below it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from support.living import living
from support.patience import stretched
from support.served import Served, wait_for
from support.traces import Traces

NUM_CONVERSATIONS = 5
NUM_TURNS = 3
MODEL = "model.max_model_len=1024"
CAPACITY = "kv.capacity=8MiB"
POOLS = {"together": "pools={colocated: {}}", "apart": "routing.local_prefill=never"}


def ask(served: Served, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens, and the seconds until the first came."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": True}
    body |= {"return_token_ids": True, "ignore_eos": True}
    tokens: list[int] = []
    first_s = 0.0
    started_s = time.monotonic()
    with served.client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                first_s = first_s or time.monotonic() - started_s
                tokens += choice.get("token_ids") or []
    return tokens, first_s


def talk(served: Served) -> tuple[list[list[int]], float]:
    """Conversations that take turns: the answers, and the mean time to a first token in the turns after the first."""
    rng = np.random.default_rng(7)
    histories: list[list[int]] = [rng.integers(5, 250, 600).tolist() for _ in range(NUM_CONVERSATIONS)]
    answers, times = [], []
    for turn in range(NUM_TURNS):
        for history in histories:
            history += rng.integers(5, 250, 40).tolist()
            tokens, first_s = ask(served, history)
            answers.append(tokens)
            history += tokens
            if turn:
                times.append(first_s)
    return answers, mean(times)


def talk_until(served: Served, condition: Callable[[], bool], what: str, expected: list[list[int]]) -> float:
    """`talk`, and again until something is so: it may be quicker to compute than to load on a machine whose disk and
    memory are slow just now. Returns the last mean time."""
    times = []

    def talked() -> bool:
        answers, seconds = talk(served)
        assert answers == expected
        times.append(seconds)
        return condition()

    wait_for(talked, 60, what)
    return times[-1]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], float]:
    """What `talk` says without tiers: the answers, wherever prompts are computed, and how long they take by one worker."""
    served = Served(
        tmp_path_factory.mktemp("off"), "--set", MODEL, "--set", CAPACITY, "--set", POOLS["together"]
    )  # fmt: skip
    try:
        served.wait_ready()
        told = talk(served)
        assert served.stop() == 0
    finally:
        served.kill()
    return told


@pytest.mark.parametrize("pools", POOLS)
def test_conversations_outlive_the_pool_and_a_worker(
    tmp_path: Path, pools: str, without: tuple[list[list[int]], float]
) -> None:
    traces = Traces()
    expected, off_s = without
    tiers = f"offload.tiers=[{{kind: host, capacity: 64MiB}}, {{kind: disk, capacity: 64MiB, path: {tmp_path}/disk}}]"
    on = Served(tmp_path, "--set", MODEL, "--set", CAPACITY, "--set", POOLS[pools], "--set", tiers)
    try:
        on.wait_ready()
        on_s = talk_until(on, lambda: on.metric("tandem_offload_tokens_total") > 600, "loads", expected)
        assert on.metric("tandem_offload_loads_total", outcome="loaded") > 0
        print(f"mean time to the first token: tiers on {on_s * 1e3:.1f} ms, off {off_s * 1e3:.1f} ms")
        worker = "colocated-0" if pools == "together" else "prefill-0"
        on.worker(worker).kill()
        wait_for(lambda: f"{worker}#2 is ready" in on.text(), 60, "the next life")

        # Counted anew: of the process that was killed, nothing is left.
        def loaded() -> float:
            return on.metric("tandem_offload_blocks_total", tier="host-0", event="loaded", worker=worker)

        talk_until(on, lambda: loaded() > 0, "loads of what the dead worker stored", expected)
        processes = on.tree()
        assert on.stop() == 0
        wait_for(lambda: not living(processes), 10, "the end of all")
    finally:
        on.kill()
    traces.check()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("offload.tiers=[{kind: host, capacity: 1000TiB}]", "offload.tiers.0.capacity"),
        ("offload.tiers=[{kind: host, capacity: 1}]", "offload.tiers.0.capacity"),
    ],
)
def test_tiers_that_cannot_be_end_the_start(tmp_path: Path, value: str, said: str) -> None:
    traces = Traces()
    served = Served(tmp_path, "--set", MODEL, "--set", POOLS["together"], "--set", value)
    try:
        assert served.process.wait(timeout=stretched(60)) != 0
        assert said in served.text()
        traces.check()
    finally:
        served.kill()
