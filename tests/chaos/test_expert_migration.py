"""Experts move between real processes that serve meanwhile: no token may change, whatever goes wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.expert_ranks import Cluster
from support.gateway import wait_for
from support.patience import stretched

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(4, tmp_path_factory.mktemp("experts"))
    cluster.meet()
    yield cluster
    cluster.close()


def regroup(cluster: Cluster, **how: Any) -> None:
    cluster.tell("part")
    for rank in range(cluster.size):
        kind, why = cluster.answer(rank)
        assert kind == "", why
    cluster.meet(**how)


def test_a_hundred_rebalances_in_a_row(four: Cluster, soak_minutes: float) -> None:
    count = 500 if soak_minutes else 100
    four.serve(1, count, delays=True)
    results = four.served(timeout_s=300)
    assert [outcome[0] for outcome in results[0]["outcomes"]] == ["DONE"] * count


def test_two_ranks_over_the_network_that_agree_every_third_step(four: Cluster) -> None:
    regroup(four, every=3, size=2, over_zmq=True)
    four.serve(1000, 10)
    assert [outcome[0] for outcome in four.served()[0]["outcomes"]] == ["DONE"] * 10
    regroup(four)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(("raise", "staging"), "EXCEPTION"), (("corrupt", "staging"), "CORRUPTED")],
)
def test_what_goes_wrong_while_staging_ends_the_attempt_everywhere(
    four: Cluster, fault: tuple[str, str], reason: str
) -> None:
    four.serve(300, 2, fault=fault, at=2)
    results = four.served()
    first, second = results[0]["outcomes"]
    assert first[:2] == (reason, 2)
    assert first[3] == 0
    assert second[0] == "DONE"
    assert results[2]["details"][0]
    assert not results[1]["details"][0]


def test_a_rank_that_stands_still_ends_the_attempt_and_not_the_service(four: Cluster) -> None:
    regroup(four, stage_timeout_s=2)
    four.serve(400, 2, fault=("stop", "staging"), at=1)
    wait_until_stopped(four.processes[1].pid)
    time.sleep(3)  # longer than it has for staging
    os.kill(four.processes[1].pid, signal.SIGCONT)
    results = four.served()
    assert results[0]["outcomes"][0][:2] == ("TIMEOUT", 1)
    assert results[0]["outcomes"][1][0] == "DONE"
    regroup(four)


@pytest.mark.parametrize("where", ["staging", "handing over", "committing", "committed"])
def test_a_rank_that_is_killed_leaves_the_others_equal(four: Cluster, where: str) -> None:
    four.serve(500, 3, fault=("kill", where), at=3)
    kinds = [four.answer(rank)[0] for rank in range(4)]
    assert kinds == ["lost"] * 3 + ["dead"]
    four.start(3)
    regroup(four)
    four.serve(600, 2)
    assert [outcome[0] for outcome in four.served()[0]["outcomes"]] == ["DONE"] * 2


def test_a_rank_that_stands_still_for_longer_than_the_group_waits(four: Cluster) -> None:
    regroup(four, timeout_s=4)
    four.serve(700, 3, fault=("stop", "committed"), at=2)
    wait_until_stopped(four.processes[2].pid)
    begin_s = time.monotonic()
    assert [four.answer(rank)[0] for rank in (0, 1, 3)] == ["lost"] * 3
    assert time.monotonic() - begin_s < stretched(30)
    os.kill(four.processes[2].pid, signal.SIGCONT)
    assert four.answer(2)[0] == "lost"
    regroup(four)
    four.serve(800, 2)
    assert [outcome[0] for outcome in four.served()[0]["outcomes"]] == ["DONE"] * 2


def wait_until_stopped(pid: int) -> None:
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 30, "the rank to stand still")
