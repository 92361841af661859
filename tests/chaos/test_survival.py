"""Requests outlive their workers on purpose and by accident: drains with KV, SIGTERM, rolling restarts, dead gateways.

One real cluster with two decode workers and two gateways for all tests; each but the last leaves it whole.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator

import pytest
from support.living import living
from support.load import Body, Load, Tokens, ask_all, body, check
from support.served import TANDEM, Served, wait_for

pytestmark = pytest.mark.chaos

SETTINGS = (
    "--set", "pools.decode={replicas: 2, cpus_per_replica: 0.4}", "--set", "pools.prefill={cpus_per_replica: 0.4}",
    "--set", "gateway.replicas=2", "--set", "kv.capacity=64MiB", "--set", "routing.local_prefill=never",
)  # fmt: skip
LONG = {"max_tokens": 400, "stream": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("survival"), *SETTINGS)
    try:
        served.wait_ready()
        served.wait_routable()
        yield served
        assert served.process.poll() is not None or served.stop() == 0, served.text()
    finally:
        served.kill()


def bodies() -> list[Body]:
    """Long ones: several outputs, log probabilities, penalties, a stop string that never comes."""
    kinds = [{}, {"n": 3}, {"logprobs": 2}, {"stop": ["\0\0\0"], "frequency_penalty": 0.5}]
    return [body(i, **LONG, **kinds[i % len(kinds)]) for i in range(8)]


@pytest.fixture(scope="module")
def wanted(served: Served) -> list[Tokens]:
    answers = ask_all(served.url, bodies(), at_once=8)
    assert all(answer.good for answer in answers), answers
    return [answer.tokens for answer in answers]


def tandem(served: Served, *arguments: str) -> str:
    """Run a command as the cluster's user."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(served.home)}
    done = subprocess.run(
        [TANDEM, *arguments], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Decoding(Load):
    """The long requests, of which a worker has begun some."""

    def __init__(self, served: Served, worker: str) -> None:
        def made() -> float:
            return served.metric("tandem_output_tokens_total", worker=worker)

        before = made()
        super().__init__(served.url, bodies(), at_once=8)
        wait_for(lambda: made() >= before + 40, 100, f"{worker} to decode")


def taken_over(served: Served, worker: str) -> int:
    """How many sequences other workers have taken over from a worker, in all its lives."""
    logs = served.home.glob(f"tandem/logs/*/{worker}#*.log")
    return sum(path.read_text().count("takes it over") for path in logs)


def test_a_drain_hands_over_what_runs(served: Served, wanted: list[Tokens]) -> None:
    with Decoding(served, "decode-1") as load:
        assert tandem(served, "drain", "decode-1", "--restart") == "decode-1 is ready again\n"
    check(load.answers(), wanted)
    assert taken_over(served, "decode-1") > 0
    served.wait_idle()


def test_a_worker_that_is_asked_to_end_hands_over_what_runs(served: Served, wanted: list[Tokens]) -> None:
    victim = served.worker("decode-0")
    with Decoding(served, "decode-0") as load:
        victim.terminate()
    check(load.answers(), wanted)
    assert taken_over(served, "decode-0") > 0
    wait_for(lambda: served.metric("tandem_members", role="decode") == 2, 120, "its next life")
    served.wait_idle()


def test_every_worker_is_restarted_and_no_request_fails(served: Served, wanted: list[Tokens]) -> None:
    """Of the one prefill worker, a second one lives meanwhile."""
    names = ("prefill-0", "decode-0", "decode-1", "gateway-0", "gateway-1")
    before = {name: served.worker(name).pid for name in names}
    over = threading.Event()
    short = [body(i) for i in range(16)]
    golden = [answer.tokens for answer in ask_all(served.url, short)]
    endless = itertools.takewhile(lambda _: not over.is_set(), itertools.cycle(short))
    with Load(served.url, endless, at_once=4) as load:
        try:
            told = tandem(served, "restart")
        finally:
            over.set()
    assert told == "".join(f"{name} is ready again\n" for name in before)
    answers = load.answers()
    assert len(answers) > len(short)
    check(answers, itertools.islice(itertools.cycle(golden), len(answers)))
    for name, pid in before.items():
        assert served.worker(name).pid != pid
    assert "prefill-1#1 is ready" in served.logs()
    wait_for(lambda: served.metric("tandem_members", role="prefill") == 1, 120, "the second prefill worker to leave")
    served.wait_idle()


def test_a_gateways_death_loses_its_own_connections_alone(served: Served, wanted: list[Tokens]) -> None:
    victim = served.worker("gateway-1")

    def connections() -> int:
        return sum(c.status == "ESTABLISHED" and c.laddr.port == served.port for c in victim.net_connections("tcp"))

    many = bodies() * 3
    with Load(served.url, many, at_once=len(many), broken=True) as load:
        wait_for(lambda: connections() >= 2, 30, "connections to it")
        lost = connections()
        victim.kill()
        victim.wait(30)  # connections that came to it meanwhile are lost with it
        check(ask_all(served.url, bodies()[:2]), wanted[:2])  # the other one takes new connections at once
    answers = load.answers()
    good = [(answer, want) for answer, want in zip(answers, wanted * 3, strict=True) if not answer.broken]
    check([answer for answer, _ in good], [want for _, want in good])
    assert 0 < len(answers) - len(good) <= lost + 2, "of those that were still to come, two may be its own too"
    wait_for(lambda: served.worker("gateway-1").pid != victim.pid, 120, "its next life")
    served.wait_idle(30)


def test_a_controller_that_dies_again_and_again_ends_the_cluster(served: Served) -> None:
    """It is started again after longer and longer pauses, and then no more: serve fails, and nothing is left."""
    processes = served.tree()

    def ended() -> bool:
        return served.process.poll() is not None

    for life in range(1, 10):
        served.controller().kill()
        wait_for(lambda: ended() or served.text().count("taken over") == life, 60, "its next life")  # noqa: B023
        if ended():
            break
    assert served.process.wait() == 1
    assert life in (5, 6)
    assert "the controller ended 5 times, each within 60 s: its process ended" in " ".join(served.text().split())
    wait_for(lambda: not living(processes), 5, "all processes to end")
