"""A network that is cut for ten seconds: requests end cleanly or go on, and afterwards all is as before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.footprint import Footprint
from support.gateway import Gateway, free_port, wait_for
from support.load import Body, Load, Tokens, ask_all, body, check
from support.netns import Network
from support.processes import Processes
from support.ray_nodes import RayNodes

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]
CUT_S = 10.0

FAR = ("prefill-0", "decode-1")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, network: Network) -> Iterator[Processes]:
    config = {
        "kv": {"capacity": "48MiB", "transport": "zmq", "poison_freed": True}, "routing": {"local_prefill": "never"},
        "pools": {"prefill": {"max_batched_tokens": 64}, "decode": {}},
    }  # fmt: skip
    workers: dict[str, dict[str, dict[str, object]]] = {"prefill-0": {}, "decode-0": {}, "decode-1": {}}
    with Processes(
        tmp_path_factory.mktemp("network"), config, workers, network.near,
        dict.fromkeys(FAR, (network.path, network.far)),
    ) as cluster:  # fmt: skip
        yield cluster


def all_take_part(cluster: Processes) -> bool:
    """Prefill computes for both decode workers, and they decode."""

    def work() -> list[float]:
        moved = [cluster.metric("tandem_transfer_bytes_total", worker=f"decode-{i}") for i in range(2)]
        return [cluster.metric("tandem_prompt_tokens_total", worker="prefill-0"), *moved]

    before = work()
    assert all(answer.good for answer in ask_all(cluster.url, [body(i, max_tokens=2) for i in range(12)]))
    return all(after > earlier for after, earlier in zip(work(), before, strict=True))


def test_a_cut_of_ten_seconds(network: Network, cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    """Behind it are the only prefill worker and one of two decode workers."""
    for seed in seeds:
        cluster.serve()
        wait_for(lambda: all_take_part(cluster), 60, "all to take part")
        footprint = Footprint(cluster, [process.system for process in cluster.workers()])
        alive = {name: process.system for name, process in cluster.all.items()}
        requests = [body(seed * 1000 + i, max_tokens=100) for i in range(100)]
        wanted = golden(requests)
        with Load(cluster.url, requests, at_once=16) as load:
            before = cluster.metric("tandem_output_tokens_total")
            wait_for(lambda before=before: cluster.metric("tandem_output_tokens_total") > before + 200, 30, "tokens")
            network.cut()
            try:
                time.sleep(CUT_S)
            finally:
                network.restore()
            check(load.answers(), wanted)
        wait_for(lambda: all_take_part(cluster), 60, "all to take part again")
        check(ask_all(cluster.url, requests[:20]), wanted[:20])
        assert alive == {name: process.system for name, process in cluster.all.items()}
        assert all(process.alive for process in cluster.all.values())
        footprint.check()


@pytest.mark.soak
def test_ray_has_a_node_on_each_side(network: Network, golden: Golden, tmp_path: Path) -> None:
    """The same under Ray, which has ideas of its own of who is alive."""
    with RayNodes(tmp_path, network) as nodes:
        port = free_port()
        nodes.tandem(
            "up", "--set", f"gateway.port={port}", "--set", f"gateway.host={network.near}",
            "--set", "routing.local_prefill=never", "--set", "kv.transport=zmq", "--set", "kv.capacity=48MiB",
            "--set", "pools.prefill={max_batched_tokens: 64}",
        )  # fmt: skip
        gateway = Gateway(port, network.near)
        gateway.wait_routable()
        requests = [body(i, max_tokens=100) for i in range(60)]
        wanted = golden(requests)
        with Load(gateway.url, requests, at_once=8) as load:
            wait_for(lambda: gateway.metric("tandem_output_tokens_total") > 200, 30, "tokens")
            network.cut()
            try:
                time.sleep(CUT_S)
            finally:
                network.restore()
            check(load.answers(), wanted, errors=True)
        gateway.wait_routable()
        check(ask_all(gateway.url, requests), wanted)
        gateway.wait_idle(30)
        assert nodes.restarts() == {"prefill-0": 0, "decode-0": 0, "gateway-0": 0}
        gateway.client.close()
        nodes.tandem("down")
