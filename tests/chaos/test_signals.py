"""SIGTERM and SIGSTOP of workers under a real `tandem serve`: what they have is handed over, what they cannot do moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from support.footprint import Footprint
from support.living import living
from support.load import Body, Load, Tokens, ask_all, body, check
from support.patience import stretched
from support.served import Served, wait_for

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("signals"), "--set", "routing.local_prefill=never", "--set", "kv.capacity=48MiB",
        "--set", "pools.prefill={replicas: 2, max_batched_tokens: 64}", "--set", "pools.decode={replicas: 2}",
    )  # fmt: skip
    try:
        served.wait_ready()
        served.wait_routable()
        yield served
        assert served.stop() == 0
    finally:
        served.kill()


def work_of(served: Served) -> dict[str, float]:
    """How many tokens each worker has computed."""
    names = {"prefill": "tandem_prompt_tokens_total", "decode": "tandem_output_tokens_total"}
    return {worker: served.metric(names[worker.partition("-")[0]], worker=worker) for worker in WORKERS}


def wait_busy(served: Served, worker: str) -> None:
    """Until it has computed some tokens more."""
    before = work_of(served)[worker]
    wait_for(lambda: work_of(served)[worker] > before + 100, 30, f"{worker} to have work")


def everyone_serves(served: Served) -> bool:
    """Both decode workers can read from both prefill workers: shown by where requests go."""
    before = work_of(served)
    assert all(answer.good for answer in ask_all(served.url, [body(i, max_tokens=2) for i in range(16)]))
    after = work_of(served)
    return all(after[worker] > before[worker] for worker in WORKERS)


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_sigterm_in_the_middle_of_transfers(served: Served, golden: Golden, worker: str) -> None:
    """It takes nothing new, hands over what it has, and comes back; the others live on, and nobody fails."""
    wait_for(lambda: everyone_serves(served), 60, "all workers to take part")
    victim = served.worker(worker)
    others = {name: served.worker(name).pid for name in (*WORKERS, "gateway-0") if name != worker}
    requests = [body(i, max_tokens=60) for i in range(120)]
    with Load(served.url, requests) as load:
        wait_busy(served, worker)
        failures = served.metric("tandem_kv_load_failures_total")
        victim.terminate()
        wait_for(lambda: not living([victim]), 30, "its end")
        lost = served.metric("tandem_kv_load_failures_total") - failures
        check(load.answers(), golden(requests))
    assert f"{worker}#1 was asked to end" in served.text()
    if worker == "prefill-0":
        log = [line for line in served.logs().splitlines() if "handoff failed" in line or "KV did not arrive" in line]
        assert lost == 0, "a transfer was cut off:\n" + "\n".join(log)
    assert served.worker(worker).pid != victim.pid
    assert others == {name: served.worker(name).pid for name in others}
    wait_for(lambda: everyone_serves(served), 60, "all workers to take part again")
    served.wait_idle(30)


def test_sigstop_and_sigcont(served: Served, golden: Golden) -> None:
    """Within heartbeats' time they get nothing new and their requests move; when they go on they take part again."""
    wait_for(lambda: everyone_serves(served), 60, "all workers to take part")
    pids = {name: served.worker(name).pid for name in (*WORKERS, "gateway-0")}
    footprint = Footprint(served, [served.worker(name) for name in WORKERS])
    victims = [served.worker(name) for name in ("prefill-0", "decode-0")]
    requests = [body(i, max_tokens=60) for i in range(120)]
    wanted = golden(requests)
    with Load(served.url, requests) as load:
        wait_busy(served, "decode-0")
        for victim in victims:
            victim.suspend()
        try:
            started_s = time.monotonic()
            # All are answered while the two stand still: by the others.
            check(load.answers(), wanted)
            assert time.monotonic() - started_s < stretched(60)
            # And what comes now is not even sent to them.
            later = ask_all(served.url, requests[:12])
            check(later, wanted[:12])
            for answer in later:
                stages = served.client.get(f"/debug/requests/{answer.request_id}").json()["stages"]
                assert [stage["detail"] for stage in stages if stage["stage"] == "gateway.sent"] == [
                    "to decode-1#1, prompt to prefill-1#1"
                ]
        finally:
            for victim in victims:
                victim.resume()
    wait_for(lambda: everyone_serves(served), 60, "all to take part again")
    footprint.check()
    assert pids == {name: served.worker(name).pid for name in pids}, "nobody was restarted"
