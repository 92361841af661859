"""A worker whose model is shared by two processes: it says what one says, and a rank's death is a worker's."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support.living import living
from support.served import Served, wait_for


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pools = "pools={colocated: {tensor_parallel: 2, threads: 1}}"
    tiers = "offload.tiers=[{kind: host, capacity: 64MiB}]"
    served = Served(tmp_path_factory.mktemp("ranks"), "--set", pools, "--set", tiers)
    try:
        served.wait_ready()
        yield served
        assert served.stop() == 0, served.text()
    finally:
        served.kill()


def followers(served: Served) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "tandem.engine.follower" in child.cmdline():
                found.append(child)
    return found


def complete(served: Served, **changes: object) -> list[str]:
    body = {"model": "tandem-demo", "prompt": "The library", "max_tokens": 40, "temperature": 0} | changes
    reply = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def test_two_ranks_say_what_one_says(shared: Served, served: Served) -> None:
    for changes in ({}, {"frequency_penalty": 0.8}, {"temperature": 0.9, "seed": 7, "n": 3}):
        assert complete(shared, **changes) == complete(served, **changes)


def test_a_dead_rank_is_a_dead_worker(shared: Served) -> None:
    prompts = [f"{number} libraries have a room for every book. " * 24 for number in range(4)]
    wanted = [complete(shared, prompt=prompt) for prompt in prompts]
    wait_for(lambda: shared.metric("tandem_offload_blocks_total", event="stored") > 0, 20, "a store")
    [before] = followers(shared)
    os.kill(before.pid, signal.SIGKILL)
    after = wait_for(
        lambda: [child for child in followers(shared) if child.pid != before.pid], 60, "the worker starts again"
    )
    assert [complete(shared, prompt=prompt) for prompt in prompts] == wanted
    assert len(after) == 1
    wait_for(lambda: shared.metric("tandem_offload_tokens_total") > 0, 20, "what both ranks stored outlives them")


def test_the_other_ranks_end_with_the_first(tmp_path: Path) -> None:
    served = Served(tmp_path, "--set", "pools={colocated: {tensor_parallel: 2, threads: 1}}")
    try:
        served.wait_ready()
        [rank] = followers(served)
        first = psutil.Process(rank.pid).parent()
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: not living([rank]), 10, "the other rank ends")
        assert served.stop() == 0, served.text()
    finally:
        served.kill()
