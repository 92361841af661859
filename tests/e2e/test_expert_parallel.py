"""Prefill workers that share experts, and decode workers that do: they say what one says, and one's death costs nobody an answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.load import Answer, ask_all, body
from support.served import Served, wait_for

POOLS = "pools={prefill: {replicas: 2, threads: 1}, decode: {replicas: 2, threads: 1}}"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("experts"), "--set", POOLS, "--set", "experts.parallel=2")
    try:
        served.wait_ready()
        yield served
        assert served.stop() == 0, served.text()
    finally:
        served.kill()


def test_they_say_what_one_says(group: Served, served: Served) -> None:
    """Few requests, so that one of the two is idle now and then, and many."""
    for requests in ([body(1)], [body(index) for index in range(2, 14)]):
        answers = ask_all(group.url, requests)
        assert all(answer.good for answer in answers), [answer.error for answer in answers]
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in ask_all(served.url, requests)]


def test_a_death_takes_the_group_along_and_it_forms_again(group: Served, served: Served) -> None:
    requests = [body(index, max_tokens=300) for index in range(20, 28)]
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.extend(ask_all(group.url, requests)))
    before = [group.worker(f"decode-{index}") for index in range(2)]
    tokens = group.metric("tandem_output_tokens_total")
    asked_s = time.time()
    asking.start()
    wait_for(lambda: group.metric("tandem_output_tokens_total") > tokens + 100, 30, "tokens")
    os.kill(before[1].pid, signal.SIGKILL)
    wait_for(lambda: not before[0].is_running(), 30, "the other ends too")
    asking.join()
    assert all(answer.good for answer in answers), [answer.error for answer in answers]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in ask_all(served.url, requests)]
    assert {group.worker(f"decode-{index}").pid for index in range(2)}.isdisjoint(process.pid for process in before)
    assert group.worker("prefill-0").create_time() < asked_s, "prefill workers are another group"
