"""Prefill and decode workers of different numbers of ranks, and blocks of different sizes: each rank reads the heads that
it lacks from those that have them, and nobody can tell by the tokens."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.served import Served, wait_for

PROMPTS = ["The library", "In the morning " * 60, "A long way from home, " * 20 + "the ship"]


def start(home: Path, prefill: int, decode: int, transport: str = "auto") -> Served:
    blocks = "kv: {block_tokens: 24}"
    pools = f"pools={{prefill: {{tensor_parallel: {prefill}, threads: 1, {blocks}}}, decode: {{tensor_parallel: {decode}, threads: 1}}}}"
    return Served(
        home,
        "--set", pools,
        "--set", f"kv.transport={transport}",
        "--set", "routing.local_prefill=never",
        "--set", "kv.prefix_cache=false",
        "--set", "kv.checksums=true",
    )  # fmt: skip


def followers(served: Served, worker: str) -> list[psutil.Process]:
    found = []
    for child in served.worker(worker).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "tandem.engine.follower" in child.cmdline():
                found.append(child)
    return found


def texts(served: Served) -> list[str]:
    bodies = [{"model": "tandem-demo", "prompt": prompt, "max_tokens": 32, "temperature": 0} for prompt in PROMPTS]
    return [str(served.complete(**body)["choices"][0]["text"]) for body in bodies]


@pytest.fixture(scope="module")
def wanted(served: Served) -> list[str]:
    return texts(served)


@pytest.mark.parametrize(("prefill", "decode", "transport"), [(2, 1, "shm"), (1, 2, "zmq")])
def test_split_ranks_say_what_one_says(
    prefill: int, decode: int, transport: str, wanted: list[str], tmp_path: Path
) -> None:
    served = start(tmp_path, prefill, decode, transport)
    try:
        served.wait_ready()
        assert texts(served) == wanted
        assert served.metric("tandem_transfer_bytes_total", transport=transport) > 0
        assert served.metric("tandem_kv_load_failures_total") == 0
        served.wait_idle()
        assert served.stop() == 0, served.text()
    finally:
        served.kill()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start(tmp_path_factory.mktemp("both"), 2, 2)
    try:
        served.wait_ready()
        yield served
        assert served.stop() == 0, served.text()
    finally:
        served.kill()


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_requests_survive_the_death_of_a_rank(worker: str, both: Served, wanted: list[str]) -> None:
    both.wait_routable()
    [rank] = followers(both, worker)
    body = {"model": "tandem-demo", "prompt": PROMPTS[1], "max_tokens": 128, "temperature": 0}
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(both.complete, **body) for _ in range(4)]
        wait_for(lambda: both.metric("tandem_requests_in_flight") == 4, 10, "requests in flight")
        os.kill(rank.pid, signal.SIGKILL)
        assert len({answer.result()["choices"][0]["text"] for answer in answers}) == 1
    both.wait_routable()
    assert texts(both) == wanted
    [after] = followers(both, worker)
    assert after.pid != rank.pid
    both.wait_idle()
