"""Pools so small that every block is soon another's: late readers, late writers, and streams that lose their blocks.

Reused blocks hold NaN until they are written: a use of what they held would show in the tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.footprint import Footprint
from support.gateway import wait_for
from support.load import Body, Load, Tokens, ask_all, body, check
from support.processes import Processes

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]

BLOCK_BYTES = 6 * 2 * 2 * 16 * 32 * 4
"""Of the demo model: layers, K and V, heads, tokens, dimensions, bytes."""

CONFIG: dict[str, dict[str, Any]] = {
    "model": {"max_model_len": 512}, "routing": {"local_prefill": "never"},
    "pools": {"prefill": {"max_batched_tokens": 64}, "decode": {"max_running": 24, "max_batched_tokens": 128}},
    "kv": {"poison_freed": True, "lease_s": 1.0, "capacity": 80 * BLOCK_BYTES},
}  # fmt: skip


def late(share: float, delay_s: float, **kv: object) -> dict[str, dict[str, object]]:
    return {"kv": {"inject_faults": {"share": share, "kind": "delay", "delay_s": delay_s}, **kv}}


STALLS = {"decode-0": late(1.0, 0.3), "decode-1": late(1.0, 0.3, on_load_failure="fail")}
WORKERS = {"prefill-0": {}, **STALLS, "decode-2": {}, "decode-3": late(0.1, 5.0), "decode-4": late(0.3, 0.2)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("tiny"), CONFIG, WORKERS) as cluster:
        yield cluster


def footprint_of(cluster: Processes, *workers: str) -> Footprint:
    ask_all(cluster.url, [body(0, max_tokens=2)])
    return Footprint(cluster, [cluster.all[name].system for name in workers])


@pytest.mark.parametrize("reader", list(STALLS))
def test_a_reader_that_stalls_past_its_lease(
    cluster: Processes, golden: Golden, seeds: Iterator[int], reader: str
) -> None:
    """Its blocks are reused, more than once, while it stands still in the middle of its reads."""
    for seed in seeds:
        cluster.serve("prefill-0", reader)
        footprint = footprint_of(cluster, "prefill-0", reader)
        failed = cluster.metric("tandem_kv_load_failures_total", worker=reader)
        errors = 0
        for attempt in range(5):  # on a busy machine all reads may be over before it stands still
            errors += _stall(cluster, golden, reader, seed * 1000 + 100 * attempt)
            if cluster.metric("tandem_kv_load_failures_total", worker=reader) > failed:
                break
        assert cluster.metric("tandem_kv_load_failures_total", worker=reader) > failed
        assert errors > 0 or reader == "decode-0"
        footprint.check()


def _stall(cluster: Processes, golden: Golden, reader: str, seed: int) -> int:
    """Of how many requests the reader tells an error when it goes on."""
    requests = [body(seed + i, stream=True) for i in range(8)]
    wanted = golden(requests)
    fill = [body(seed + 500 + i, max_tokens=2) for i in range(30)]
    wanted_fill = golden(fill)
    expired = cluster.metric("tandem_lease_events_total", event="expired")
    granted = cluster.metric("tandem_lease_events_total", event="granted")
    with Load(cluster.url, requests) as load:
        cluster.wait_metric("tandem_lease_events_total", granted + 4, event="granted")
        cluster.all[reader].system.suspend()
        try:
            cluster.announce("prefill-0", reader, "decode-2", leaving=(reader,))
            wait_for(
                lambda: cluster.metric("tandem_lease_events_total", event="expired") > expired, 20, "leases to expire"
            )
            check(ask_all(cluster.url, fill), wanted_fill)
        finally:
            cluster.all[reader].system.resume()
        errors = check(load.answers(), wanted, errors=reader == "decode-1")
    cluster.serve("prefill-0", reader)
    return errors


def test_late_writers_write_into_nobody_elses_blocks(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    """Clients leave while reads are five seconds late, which cannot be called off; the pool is refilled meanwhile."""
    for seed in seeds:
        rng = random.Random(seed)
        cluster.serve("prefill-0", "decode-3")
        footprint = footprint_of(cluster, "prefill-0", "decode-3")
        requests = [body(seed * 1000 + i, max_tokens=100) for i in range(36)]
        leave = [rng.choice([None, 0.3, 1.0]) for _ in requests]
        before = cluster.metric("tandem_handoffs_total", worker="decode-3", outcome="aborted")
        answers = ask_all(cluster.url, requests, 24, leave.__getitem__)
        check(answers, golden(requests))
        assert cluster.metric("tandem_handoffs_total", worker="decode-3", outcome="aborted") > before
        footprint.check()


def test_preemption_in_the_middle_of_transfers(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    """Several outputs each, more than the pool holds: streams lose their blocks while others' are on the way."""
    for seed in seeds:
        rng = random.Random(seed)
        cluster.serve("prefill-0", "decode-4")
        footprint = footprint_of(cluster, "prefill-0", "decode-4")
        requests = [body(seed * 1000 + i, max_tokens=rng.choice([60, 150]), n=rng.choice([1, 2, 4])) for i in range(28)]
        before = cluster.metric("tandem_preemptions_total", worker="decode-4")
        handoffs, started = cluster.metric("tandem_handoffs_total", worker="decode-4"), 0
        answers = ask_all(cluster.url, requests, 12)
        check(answers, golden(requests))
        assert cluster.metric("tandem_preemptions_total", worker="decode-4") >= before + 10
        for request, answer in zip(requests, answers, strict=True):
            stages = cluster.stages(answer.request_id)
            counts = Counter(stages)
            # Nothing is fetched twice but what was given up in between, or what an output that found no block for its
            # copy of the last one begins with.
            assert counts["decode.handoff"] <= request["n"] + counts["decode.preempted"], stages
            started += counts["decode.handoff"]
        # Each was ended once. One whose first token is the output's last needs no KV.
        assert cluster.metric("tandem_handoffs_total", worker="decode-4") - handoffs == started
        footprint.check()
