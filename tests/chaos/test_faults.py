"""One read in a hundred goes wrong: the undisturbed tokens or one clean error, at once, on idle and on busy engines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from support.footprint import Footprint
from support.load import Tokens, ask_all, body, check
from support.patience import stretched
from support.processes import Processes

pytestmark = pytest.mark.chaos

Golden = Callable[[list[dict[str, object]]], list[Tokens]]


def fails(decoder: str) -> bool:
    return bool(DECODERS[decoder]["kv"]["on_load_failure"] == "fail")


def faults(kind: str, policy: str = "recompute", share: float = 0.01) -> dict[str, dict[str, object]]:
    return {"kv": {"inject_faults": {"share": share, "kind": kind, "delay_s": 0.5}, "on_load_failure": policy}}


DECODERS = {
    "decode-0": faults("error"),
    "decode-1": faults("error", "fail"),
    "decode-2": faults("corrupt", share=0.03),
    "decode-3": faults("corrupt", "fail", share=0.03),
    "decode-4": faults("delay"),
    "decode-5": faults("error", "fail", share=1.0),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    # Small chunks: about twenty reads a prompt.
    config = {
        "kv": {"capacity": "24MiB", "poison_freed": True}, "routing": {"local_prefill": "never"},
        "pools": {"prefill": {"max_batched_tokens": 64}, "decode": {}},
    }  # fmt: skip
    with Processes(tmp_path_factory.mktemp("faults"), config, {"prefill-0": {}, **DECODERS}) as cluster:
        yield cluster


def test_it_is_said_loudly(cluster: Processes) -> None:
    for decoder in DECODERS:
        log = cluster.all[decoder].log.read_text()
        assert re.search(r"WARNING .*kv\.inject_faults: .* go wrong on purpose", log)
    assert "inject_faults" not in cluster.all["prefill-0"].log.read_text()


@pytest.mark.parametrize("decoder", list(DECODERS)[:5])
def test_busy(cluster: Processes, golden: Golden, seeds: Iterator[int], decoder: str) -> None:
    cluster.serve("prefill-0", decoder)
    ask_all(cluster.url, [body(0)])
    footprint = Footprint(cluster, [cluster.all[name].system for name in ("prefill-0", decoder)])
    before = cluster.metric("tandem_kv_load_failures_total", worker=decoder)
    for seed in seeds:
        requests = [body(seed * 1000 + i) for i in range(80)]
        errors = check(ask_all(cluster.url, requests), golden(requests), fails(decoder))
        failures = cluster.metric("tandem_kv_load_failures_total", worker=decoder) - before
        before += failures
        assert failures > 0 or decoder == "decode-4"
        assert errors == (failures if fails(decoder) else 0)
        footprint.check()


@pytest.mark.parametrize("decoder", list(DECODERS)[:4])
def test_idle(cluster: Processes, golden: Golden, decoder: str) -> None:
    """One request at a time: nobody's arrival wakes the engine for those that fail."""
    cluster.serve("prefill-0", decoder)

    def counters() -> list[float]:
        names = ("tandem_kv_load_failures_total", "tandem_prompt_tokens_total")
        return [cluster.metric(name, worker=decoder) for name in names] + [
            cluster.metric("tandem_prompt_tokens_total", worker="prefill-0")
        ]

    before = counters()
    requests = [body(i, max_tokens=8) for i in range(40)]
    answers = ask_all(cluster.url, requests, at_once=1, timeout_s=stretched(20))
    errors = check(answers, golden(requests), fails(decoder))
    failures, computed_again, computed = [after - b for after, b in zip(counters(), before, strict=True)]
    assert failures > 0
    assert errors == (failures if fails(decoder) else 0)
    prompts = sum(len(request["prompt"]) for request in requests)
    assert computed <= prompts, "prefill computes nothing twice, and stops where a prompt is given up"
    if fails(decoder):
        assert computed_again == 0
        return
    assert computed + computed_again >= prompts
    # Decode computes what did not arrive, and no more: whole chunks that were there are not computed again.
    told = 0
    hit = 0
    for request, answer in zip(requests, answers, strict=True):
        for stage in cluster.client.get(f"/debug/requests/{answer.request_id}").json()["stages"]:
            if stage["stage"] == "decode.prefill":
                told += int(stage["detail"].split()[0])
                hit += len(request["prompt"])
    assert told == computed_again
    assert 0 < computed_again < hit, "some of the hit prompts' chunks had arrived"


def test_decode_rejects_what_prefill_has_computed(cluster: Processes, golden: Golden) -> None:
    """Every transfer fails, and the policy is to fail: both sides are empty afterwards, and the next worker serves."""
    cluster.serve("prefill-0", "decode-5")
    requests = [body(i) for i in range(30)]
    before = cluster.metric("tandem_handoffs_total", worker="decode-5", outcome="failed")
    answers = ask_all(cluster.url, requests)
    # A prompt for which no prefill worker is in reach is computed where it is decoded.
    failed = cluster.metric("tandem_handoffs_total", worker="decode-5", outcome="failed") - before
    assert check(answers, golden(requests), errors=True) == failed > 0
    Footprint(cluster, [cluster.all[name].system for name in ("prefill-0", "decode-5")]).check()
    cluster.serve("prefill-0", "decode-0")
    check(ask_all(cluster.url, requests), golden(requests))
