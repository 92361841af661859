"""A prompt that one node has computed is loaded by another, over a network, from the first node's host tier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.gateway import Gateway, free_port, wait_for
from support.netns import Network
from support.ray_nodes import RayNodes

pytestmark = pytest.mark.e2e

TIERS = "offload.tiers=[{kind: host, capacity: 64MiB}, {kind: remote}]"
WORKERS = ("colocated-0", "colocated-1")


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def loaded(gateway: Gateway, worker: str) -> float:
    return gateway.metric("tandem_offload_blocks_total", tier="remote-1", event="loaded", worker=worker)


def test_what_one_node_computed_another_loads(network: Network, tmp_path: Path) -> None:
    with RayNodes(tmp_path, network) as nodes:
        port = free_port()
        nodes.tandem(
            "up", "--set", f"gateway.port={port}", "--set", f"gateway.host={network.near}",
            "--set", "pools={colocated: {replicas: 2}}", "--set", "routing.policy=round_robin",
            "--set", "model.max_model_len=1024", "--set", "kv.capacity=16MiB", "--set", TIERS,
        )  # fmt: skip
        gateway = Gateway(port, network.near)
        gateway.wait_routable()
        rng = np.random.default_rng(3)

        def ask(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
            answer = gateway.client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            return tokens

        def moves() -> bool:
            # They take turns: what is computed by one is asked of the other next.
            prompt = rng.integers(5, 250, 900).tolist()
            first = ask(prompt)
            wait_for(lambda: sum(stored(gateway, worker) for worker in WORKERS) > before, 10, "the store")
            assert ask(prompt) == first
            return any(loaded(gateway, worker) > 0 for worker in WORKERS)

        before = 0.0
        wait_for(moves, 30, "a load from the other node")
        assert gateway.metric("tandem_offload_tokens_total") >= 16
        gateway.client.close()
        nodes.tandem("down")


def stored(gateway: Gateway, worker: str) -> float:
    return gateway.metric("tandem_offload_blocks_total", tier="host-0", event="stored", worker=worker)
