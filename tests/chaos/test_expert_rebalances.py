"""A real cluster whose decode workers share experts and move them all the time: nobody who asks notices, whatever
happens to a worker meanwhile, and operators see what is going on."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.golden import Golden
from support.load import Body, Load, body, check
from support.served import TANDEM, Served, wait_for
from tandem.core.config_experts import ExpertsConfig
from tandem.engine.expert_balancer import first_placement
from tandem.eplb.load_file import read_load

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SETTINGS = (
    "pools={prefill: {expert_parallel: 1, threads: 1}, decode: {replicas: 2, threads: 1}}",
    "experts={parallel: 2, redundant: 4, balance: {when: interval, interval_steps: 16, window_steps: 16, "
    "exchange_steps: 1, checksums: true}}",
)
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    served = Served(tmp_path_factory.mktemp("rebalances"), *settings)
    try:
        served.wait_ready()
        yield served
        assert served.stop() == 0, served.text()
    finally:
        served.kill()


def tandem(served: Served, *arguments: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [TANDEM, *arguments], env=os.environ | {"XDG_CACHE_HOME": str(served.home)}, capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def num_done(served: Served) -> float:
    return served.metric("tandem_expert_rebalances_total", outcome="done")


def num_begun(served: Served) -> int:
    """Moves of all lives so far."""
    return sum(path.read_text().count(" experts to move") for path in served.home.glob("tandem/logs/*/decode-0#*.log"))


def begun_where(served: Served, name: str) -> list[str]:
    """Which placement a worker's newest life began with, if it was the one that the life before had left."""
    logs = served.home.glob(f"tandem/logs/*/{name}#*.log")
    newest = max(logs, key=lambda path: int(path.stem.partition("#")[2]))
    return re.findall(r"experts begin where the group before had them, or its load says: (\w+)", newest.read_text())


def until_one_begins(served: Served, load: Load) -> None:
    begun = num_begun(served)

    def more() -> bool:
        assert load.running, "all are answered, and no experts have moved meanwhile"
        return num_begun(served) > begun

    wait_for(more, TIMEOUT_S, "experts to move")


def record(served: Served, golden: Golden, requests: list[Body], path: Path) -> None:
    """Record what experts compute, and ask the same again and again until that is done."""
    tracing = subprocess.Popen(
        [TANDEM, "trace", "experts", "--output", str(path), "--duration-s", "3"],
        env=os.environ | {"XDG_CACHE_HOME": str(served.home)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    asked: list[Body] = []

    def more() -> Iterator[Body]:
        for index in itertools.count():
            if index >= len(requests) and tracing.poll() is not None:
                return
            asked.append(requests[index % len(requests)])
            yield asked[-1]

    with Load(served.url, more()) as load:
        answers = load.answers()
    check(answers, golden(asked))
    assert tracing.returncode == 0


def test_nobody_notices_and_operators_see(group: Served, golden: Golden, tmp_path: Path) -> None:
    requests = [body(index, max_tokens=150) for index in range(24)]
    recorded = tmp_path / "load"
    record(group, golden, requests, recorded)
    assert num_done(group) >= 2 * 3, "on each of two workers"
    load_seen = read_load(recorded)
    assert load_seen.tokens.shape[1:] == (6, 16)
    assert len(set(load_seen.tokens.sum((0, 2)).tolist())) == 1, "all layers have seen the same tokens"

    said = tandem(group, "rebalance", "decode")
    assert said.startswith(("decode-0: done", "decode-0: declined: nothing would move")), said
    status = tandem(group, "status", "--experts")
    assert "decode-0" in status
    assert "done" in status
    workers = [json.loads(line) for line in tandem(group, "status", "--json").splitlines()]
    [report] = [worker["report"]["experts"] for worker in workers if worker["report"] and worker["report"]["experts"]]
    assert report["num_slots"] == 20
    assert report["total_moved"] > 0
    assert 0 < report["balancedness"] <= 1
    assert group.metric("tandem_expert_bytes_total") > 0


def test_rebalance_goes_on_when_the_controller_dies(group: Served) -> None:
    """While a worker stands still, so that it cannot be over."""
    worker, controller = group.worker("decode-0"), group.controller()
    worker.suspend()
    try:
        command = [TANDEM, "rebalance", "decode"]
        rebalance = subprocess.Popen(
            command, env=os.environ | {"XDG_CACHE_HOME": str(group.home)}, stdout=subprocess.PIPE, text=True
        )
        time.sleep(2)
        assert rebalance.poll() is None
        controller.kill()
    finally:
        worker.resume()
    said, _ = rebalance.communicate(timeout=TIMEOUT_S)
    assert rebalance.returncode == 0, said
    assert said.startswith(("decode-0: done", "decode-0: declined: nothing would move")), said


@pytest.mark.parametrize("after_s", [0.0, 0.05])
@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_killed_while_experts_move(number: int, after_s: float, group: Served, golden: Golden) -> None:
    """The group forms again where it was, all ranks in the same way, and moves experts again."""
    requests = [body(100 + 50 * number + int(1000 * after_s) + index, max_tokens=250) for index in range(12)]
    victims = [group.worker(f"decode-{index}") for index in range(2)]
    with Load(group.url, requests) as load:
        until_one_begins(group, load)
        time.sleep(after_s)
        victims[number].kill()
        check(load.answers(), golden(requests))
    wait_for(lambda: not victims[1 - number].is_running(), 30, "the other ends too")
    more = [body(1000 + index, max_tokens=100) for index in range(12)]
    with Load(group.url, more) as load:
        check(load.answers(), golden(more))
    assert num_done(group) > 0, "the new group has moved experts"
    [begun] = {*begun_where(group, "decode-0")}
    assert begun_where(group, "decode-1") == [begun]
    first, _ = first_placement(6, 16, 2, ExpertsConfig(redundant=4), 1)
    assert begun != f"{zlib.crc32(first.physical_to_logical.tobytes()):08x}"


def test_a_worker_that_stands_still_while_experts_move(group: Served, golden: Golden) -> None:
    requests = [body(500 + index, max_tokens=250) for index in range(12)]
    workers = [group.worker(f"decode-{index}") for index in range(2)]
    with Load(group.url, requests) as load:
        until_one_begins(group, load)
        workers[1].send_signal(signal.SIGSTOP)
        time.sleep(6)
        workers[1].send_signal(signal.SIGCONT)
        check(load.answers(), golden(requests))
    assert all(worker.is_running() for worker in workers)
    before = num_done(group)
    more = [body(1500 + index, max_tokens=100) for index in range(12)]
    with Load(group.url, more) as load:
        check(load.answers(), golden(more))
    assert num_done(group) > before
