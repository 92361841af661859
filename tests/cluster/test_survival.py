"""A cluster of three hosts loses a link, a gateway, Ray's head, a host and at last its controller, in this order; and what
clients get is what they would have got. The tests go on with what the ones before have left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from support.gateway import Gateway, wait_for
from support.hosts import Hosts, RayHosts
from support.load import Body, Load, Tokens, ask_all, body, check

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
NUM_BODIES = 48
ARGUMENTS = [
    "--set", "pools={prefill: {replicas: 2, max_batched_tokens: 64, threads: 1}, decode: {replicas: 2, threads: 1}}",
    "--set", "model.max_model_len=1024", "--set", "kv.capacity=16MiB", "--set", "routing.local_prefill=never",
]  # fmt: skip
SETTLED_S = 120.0
"""A machine with two busy cores brings a worker back in such a time."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    hosts = Hosts(3)
    try:
        with RayHosts(tmp_path_factory.mktemp("cluster"), hosts, cpus=4) as cluster:
            up(cluster)
            yield cluster
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def gateway(cluster: RayHosts) -> Iterator[Gateway]:
    gateway = Gateway(8000, cluster.hosts[1].address)
    gateway.wait_routable()
    yield gateway
    gateway.client.close()


@pytest.fixture(scope="module")
def golden(gateway: Gateway) -> list[Tokens]:
    answers = ask_all(gateway.url, bodies(), at_once=4)
    assert all(answer.good for answer in answers)
    return [answer.tokens for answer in answers]


def bodies(count: int = NUM_BODIES) -> list[Body]:
    """The same prompts, and in no prefix cache yet."""
    return [body(index, max_tokens=12 + index % 24) for index in range(count)]


def right(gateway: Gateway, golden: list[Tokens], count: int = NUM_BODIES) -> bool:
    """Ask all, or the first; every answer is right."""
    return check(ask_all(gateway.url, bodies(count), at_once=6), golden[:count]) == 0


def up(cluster: RayHosts) -> None:
    done = cluster.tandem("up", "--set", f"gateway.host={cluster.hosts[1].address}", *ARGUMENTS)
    assert done.returncode == 0, done.stdout + done.stderr


def under_load(gateway: Gateway, golden: list[Tokens], disturb: Callable[[], None], times: int = 4) -> None:
    """Disturb while requests are under way, and go on until the disturbance is over: every answer is right."""
    with Load(gateway.url, [b for _ in range(times) for b in bodies()], at_once=6) as load:
        wait_for(lambda: gateway.metric("tandem_requests_in_flight") > 2, 30, "requests in flight")
        disturb()
        answers = load.answers()
    assert check(answers, golden * times) == 0
    assert right(gateway, golden)


def all_ready(cluster: RayHosts) -> dict[str, tuple[str, int]]:
    """Of each worker its node and how often it was started again, when all are ready."""

    def rows() -> dict[str, tuple[str, int]] | None:
        status = cluster.status()
        ready = all(row["phase"] == "ready" for row in status.values())
        return {name: (row["node"], row["restarts"]) for name, row in status.items()} if ready else None

    found: dict[str, tuple[str, int]] = wait_for(rows, SETTLED_S, "all workers ready")
    return found


def test_each_role_is_on_both_hosts(cluster: RayHosts, gateway: Gateway) -> None:
    rows = all_ready(cluster)
    for role in ("prefill", "decode"):
        assert {rows[f"{role}-{number}"][0] for number in (0, 1)} == {host.address for host in cluster.hosts[1:]}
    assert rows["gateway-0"] == (cluster.hosts[1].address, 0)
    assert sorted(cluster.left()["groups"]) == sorted(f"tandem-{worker}" for worker in WORKERS)


def test_a_slow_link(cluster: RayHosts, gateway: Gateway, golden: list[Tokens]) -> None:
    """4 Mbit/s to one host; a prompt's KV takes a second."""
    cluster.hosts[2].slow("4mbit")
    try:
        assert right(gateway, golden, 16)
    finally:
        cluster.hosts[2].full_speed()
    assert {restarts for _, restarts in all_ready(cluster).values()} == {0}


def test_a_link_that_is_cut_and_healed(cluster: RayHosts, gateway: Gateway, golden: list[Tokens]) -> None:
    def disturb() -> None:
        cluster.hosts[2].cut()
        time.sleep(10)
        cluster.hosts[2].restore()

    under_load(gateway, golden, disturb)
    assert {restarts for _, restarts in all_ready(cluster).values()} == {0}, "Ray waits longer than that"
    far = [name for name, (node, _) in all_ready(cluster).items() if node == cluster.hosts[2].address]
    before = {name: gateway.metric("tandem_step_seconds_count", worker=name) for name in far}

    def take_part() -> bool:
        assert right(gateway, golden)
        return all(gateway.metric("tandem_step_seconds_count", worker=name) > before[name] for name in far)

    wait_for(take_part, 60, "workers behind the link take part again")


def test_a_killed_gateway(cluster: RayHosts, gateway: Gateway, golden: list[Tokens]) -> None:
    cluster.hosts[1].process("gateway-0#").kill()
    wait_for(lambda: gateway_is(gateway, False), 30, "the end of the gateway")
    wait_for(lambda: gateway_is(gateway, True), SETTLED_S, "another gateway")
    assert right(gateway, golden)
    rows = all_ready(cluster)
    assert rows["gateway-0"][1] == 1
    assert {rows[worker][1] for worker in WORKERS} == {0}


def gateway_is(gateway: Gateway, there: bool) -> bool:
    try:
        return (gateway.client.get("/readyz").status_code == 200) == there
    except httpx.HTTPError:
        return not there


def test_rays_head_dies_and_comes_back(cluster: RayHosts, gateway: Gateway, golden: list[Tokens]) -> None:
    """Nobody needs it for a request. A worker that dies meanwhile is started again when it is back."""
    before = all_ready(cluster)
    under_load(gateway, golden, cluster.hosts[0].kill)
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        assert right(gateway, golden, 8)
    cluster.hosts[2].process("prefill-").kill()
    assert right(gateway, golden), "what is left serves"
    cluster.start_head()
    after = wait_for(lambda: (rows := all_ready(cluster)) != before and rows, SETTLED_S, "a new life")
    assert sum(restarts for _, restarts in after.values()) == 1 + sum(restarts for _, restarts in before.values())
    assert right(gateway, golden)


def test_a_killed_host(cluster: RayHosts, gateway: Gateway, golden: list[Tokens]) -> None:
    """What it had comes to the one that is left, where there is room."""
    under_load(gateway, golden, cluster.hosts[2].kill)

    def moved() -> bool:
        return {node for node, _ in all_ready(cluster).values()} == {cluster.hosts[1].address}

    wait_for(moved, SETTLED_S, "all workers on the host that is left")
    assert right(gateway, golden)
    assert sorted(cluster.left()["groups"]) == sorted(f"tandem-{worker}" for worker in WORKERS)


def test_a_killed_controller(cluster: RayHosts, gateway: Gateway) -> None:
    """Its next life takes over; whoever ends the keeper ends all, which leaves room for another."""
    before, controller = all_ready(cluster), cluster.hosts[1].process("controller.log")
    controller.kill()
    controller.wait(30)
    assert all_ready(cluster) == before
    os.kill(cluster.hosts[1].process("keeper.log").pid, signal.SIGKILL)
    nothing: dict[str, list[str]] = {"groups": [], "named": []}
    wait_for(lambda: cluster.left() == nothing, 60, "the end of all actors and placement groups")
    assert gateway_is(gateway, False)
    up(cluster)
    gateway.wait_routable()
    down = cluster.tandem("down")
    assert down.returncode == 0, down.stderr
    assert cluster.left() == nothing
