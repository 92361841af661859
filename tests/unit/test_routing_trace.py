"""Routing policies, on made-up conversations over workers that only count."""

from __future__ import annotations

import pytest
from tandem.bench.conversations import Conversations
from tandem.bench.routing_trace import ORACLE, Cluster, compare
from tandem.kv_transfer.offload.trace import TRACE_BLOCK_TOKENS, Trace


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster(4, 4000.0),
        Cluster(4, 4000.0, num_gateways=3),
        Cluster(4, 4000.0, capacity_tokens=100_000),
    ],
    ids=["one gateway", "three gateways", "small caches"],
)
def test_kv_aware_finds_what_an_oracle_finds(cluster: Cluster) -> None:
    trace = Trace(list(Conversations(250).requests()), TRACE_BLOCK_TOKENS)
    figures = compare(trace, cluster, ["kv_aware", "round_robin"])["policies"]
    assert figures["kv_aware"]["of_oracle"] >= 0.9
    assert figures["kv_aware"]["hit_tokens"] >= 1.3 * figures["round_robin"]["hit_tokens"]
    assert figures["kv_aware"]["most_computed_to_mean"] < 1.6
    assert figures["kv_aware"]["ttft_s"]["mean"] < figures["round_robin"]["ttft_s"]["mean"]
    for run in figures.values():
        assert run["ttft_s"]["count"] == 250
        assert run["of_limit"] <= 1
    assert figures[ORACLE]["of_limit"] > figures["round_robin"]["of_limit"]
