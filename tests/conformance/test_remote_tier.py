"""Other nodes' host tiers across processes: deaths at the far end, nodes that are slow, strangers, and turns."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from support.gateway import wait_for
from support.patience import stretched
from support.remote import OtherNode, ServerProcess, ServerThread
from support.tiers import BLOCK_BYTES, Engine, content_of, end, keys_of, ready
from tandem.core.clock import SystemClock
from tandem.core.log import logger
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.kv_transfer.offload.base import LoadJob, Lookup
from tandem.kv_transfer.offload.host import HostTier
from tandem.kv_transfer.offload.keeper import start_keeper
from tandem.kv_transfer.offload.pool import pool_bytes
from tandem.kv_transfer.offload.remote import RemoteTier
from tandem.kv_transfer.offload.remote_server import MAX_READERS
from tandem.kv_transfer.offload.remote_wire import Ask, Forget, Grant, News, Release, Request, answers, encode

SLOTS = 64
KEYS = make_cluster_keys()


class Node:
    """A node with a host tier, and an engine that fills it."""

    def __init__(self, folder: Path, block_bytes: int = BLOCK_BYTES) -> None:
        folder.mkdir()
        self.path = folder / "host.socket"
        self.block_bytes = block_bytes
        self.keeper = self.start()
        self.news = threading.Event()
        self.engine = Engine(HostTier(self.path, block_bytes, SystemClock(), 20.0, self.news.set), self.news)

    def start(self) -> subprocess.Popen[bytes]:
        self.keeper = start_keeper(self.path, pool_bytes(SLOTS, self.block_bytes), self.block_bytes, "lru")
        return self.keeper

    def fill(self, *numbers: int) -> None:
        ready(self.engine.tier)
        assert all(self.engine.store(keys_of(*numbers)).good)

    def kill(self) -> None:
        self.keeper.kill()
        self.keeper.wait()
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()

    def close(self) -> None:
        self.engine.tier.close()
        if self.keeper.poll() is None:
            end(self.keeper)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node")
    yield node
    node.close()


@pytest.fixture
def elsewhere() -> Iterator[OtherNode]:
    other = OtherNode({}, KEYS)
    yield other
    other.close()


Told = Callable[[], str]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    """Warnings of remote tiers so far."""
    # Other tests may have configured the log.
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "tandem"):
        yield lambda: "\n".join(m for record in caplog.records if (m := record.getMessage()).startswith("remote: "))


def reader(other: OtherNode, timeout_s: float = 5.0) -> Engine:
    news = threading.Event()
    return Engine(other.tier(news.set, timeout_s), news)


def found(engine: Engine, *numbers: int) -> bool:
    engine.tier.poll()
    return engine.tier.lookup(keys_of(*numbers)) == [Lookup.HIT] * len(numbers)


def load_until(engine: Engine, stop: threading.Event) -> int:
    """Loads without a pause, each of which `Engine.load` checks; how many found all."""
    whole = 0
    while not stop.is_set():
        whole += all(engine.load(keys_of(*range(40))).good)
    return whole


@pytest.mark.parametrize("who", ["keeper", "server"])
def test_a_kill_amid_loads(node: Node, elsewhere: OtherNode, who: str, told: Told) -> None:
    server = ServerThread(node.path, KEYS) if who == "keeper" else ServerProcess(node.path, KEYS)
    elsewhere.servers.follow({"node": server.endpoint})
    node.fill(*range(40))
    engine = reader(elsewhere)
    wait_for(lambda: found(engine, *range(40)), 10, "the news")
    stop, counts = threading.Event(), []
    thread = threading.Thread(target=lambda: counts.append(load_until(engine, stop)))
    thread.start()
    wait_for(lambda: engine.tier.stats().loaded > 200, 10, "loads")
    if isinstance(server, ServerThread):
        node.kill()
    else:
        server.kill()
    wait_for(lambda: engine.tier.stats().away, 10, "the end")
    if isinstance(server, ServerThread):
        node.start()
        wait_for(lambda: node.engine.tier.stats().away, 10, "the keeper's end")
        node.fill(*range(40))
    else:
        server.close()
        server = ServerProcess(node.path, KEYS, server.port)
    loaded = engine.tier.stats().loaded
    wait_for(lambda: engine.tier.stats().loaded > loaded + 200, 30, "loads again")
    stop.set()
    thread.join()
    assert counts[0] > 10
    assert len(told().splitlines()) <= 4, told()
    server.close()


def test_a_node_that_stands_still_holds_nobody_else(tmp_path: Path, node: Node, elsewhere: OtherNode) -> None:
    other = Node(tmp_path / "other")
    servers = [ServerProcess(node.path, KEYS), ServerThread(other.path, KEYS)]
    elsewhere.servers.follow({"node": servers[0].endpoint, "other": servers[1].endpoint})
    node.fill(1, 2)
    other.fill(3, 4)
    engine = reader(elsewhere, timeout_s=2.0)
    wait_for(lambda: found(engine, 1, 2, 3, 4), 10, "the news")
    assert isinstance(servers[0], ServerProcess)
    os.kill(servers[0].process.pid, signal.SIGSTOP)
    try:
        start_s = time.monotonic()
        stuck = engine.tier.submit_load(LoadJob(keys_of(1, 2), engine.memory, [50, 51]))
        while time.monotonic() < start_s + 0.5:
            number = engine.tier.submit_load(LoadJob(keys_of(3, 4), engine.memory, [0, 1]))
            results = engine.wait(number)
            assert results[number].good == (True, True)
            assert stuck not in results
        result = engine.wait(stuck)[stuck]
        assert result.good == (False, False)
        assert "longer than 2 s" in result.error
        assert time.monotonic() - start_s < stretched(10)
        wait_for(lambda: engine.tier.lookup(keys_of(1, 2, 3)) == [0, 0, 2], 5, "its end")
        assert engine.load(keys_of(3, 4)).good == (True, True)
        assert engine.tier.stats().failures["slow"] >= 2
    finally:
        os.kill(servers[0].process.pid, signal.SIGCONT)
    wait_for(lambda: found(engine, 1, 2), 15, "its return")
    assert engine.load(keys_of(1, 2, 3)).good == (True,) * 3
    # Who has left is asked for nothing.
    elsewhere.servers.follow({"other": servers[1].endpoint})
    wait_for(lambda: engine.tier.lookup(keys_of(1, 3)) == [0, 2], 5, "that it is gone")
    for server in servers:
        server.close()
    other.close()


def test_blocks_that_change_hands_are_missing_or_right(node: Node, elsewhere: OtherNode) -> None:
    """The copy of the index is as stale as it can be: nobody waits for news."""
    server = ServerThread(node.path, KEYS)
    elsewhere.servers.follow({"node": server.endpoint})
    engine = reader(elsewhere)
    rng = np.random.default_rng(5)
    ready(node.engine.tier)
    tried = good = 0
    deadline_s = time.monotonic() + 20
    while (tried < 1000 or good < 100) and time.monotonic() < deadline_s:
        wanted = keys_of(*rng.choice(120, 8, replace=False).tolist())
        for block, key in enumerate(wanted, 8):
            node.engine.memory.array[block] = content_of(key)
        store = node.engine.submit_store(keys_of(*rng.choice(120, 8, replace=False).tolist()))
        result = engine.load(wanted)
        tried, good = tried + 8, good + sum(result.good)
        node.engine.wait(store)
    assert good >= 100
    assert engine.tier.stats().away == ""
    server.close()


def test_strangers_learn_nothing(node: Node, elsewhere: OtherNode) -> None:
    server = ServerThread(node.path, KEYS)
    node.fill(1)
    stranger = OtherNode({"node": server.endpoint})
    theirs = reader(stranger, timeout_s=0.5)
    elsewhere.servers.follow({"node": server.endpoint})
    ours = reader(elsewhere)
    wait_for(lambda: found(ours, 1), 10, "the news")
    # Twice a stranger's patience, in which we go on.
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        assert ours.load(keys_of(1)).good == (True,)
        assert theirs.tier.lookup(keys_of(1)) == [Lookup.MISS]
    assert theirs.tier.stats().num_slots == 0
    stranger.close()
    server.close()


def test_other_blocks_and_nonsense_are_refused(tmp_path: Path, elsewhere: OtherNode, told: Told) -> None:
    other = Node(tmp_path / "other", block_bytes=BLOCK_BYTES + 8)
    server = ServerThread(other.path, KEYS, BLOCK_BYTES + 8)
    elsewhere.servers.follow({"other": server.endpoint})
    engine = reader(elsewhere)
    wait_for(lambda: f"blocks of {BLOCK_BYTES + 8} bytes, ours have {BLOCK_BYTES}" in told(), 10, "a warning")
    assert engine.tier.stats().num_slots == 0
    assert engine.tier.stats().away
    context = SecureContext(KEYS)
    socket = context.connect("noise", server.endpoint)
    rng = np.random.default_rng(1)
    good = [encode(message) for message in (Ask("x", 3), Request(1, "x", keys_of(1)), Forget(1, keys_of(1), None))]
    good += [encode(Release(1, "x", slots)) for slots in (b"123", b"\xff" * 8, bytes(16))]
    for number in range(3000):
        frame = bytearray(good[number % len(good)])
        frame[int(rng.integers(len(frame)))] = int(rng.integers(256))
        socket.send(bytes(frame[: int(rng.integers(len(frame) + 1))] if number % 2 else frame))
    socket.send(encode(Ask("", 0)))
    socket.setsockopt(zmq.RCVTIMEO, 10_000)
    while not isinstance(answers.decode(socket.recv()), News):
        pass
    socket.close()
    context.close()
    server.close()
    other.close()


def test_so_many_read_at_a_time_and_no_more(node: Node) -> None:
    server = ServerThread(node.path, KEYS)
    context = SecureContext(KEYS)
    sockets = [context.connect(f"reader-{number}", server.endpoint) for number in range(MAX_READERS + 2)]
    for socket in sockets:
        socket.setsockopt(zmq.RCVTIMEO, 10_000)

    def epoch_of(socket: zmq.Socket[bytes]) -> str:
        while True:
            socket.send(encode(Ask("", 0)))
            news = answers.decode(socket.recv())
            if isinstance(news, News) and news.epoch:
                return news.epoch

    epoch = epoch_of(sockets[0])
    for number, socket in enumerate(sockets):
        socket.send(encode(Request(number, epoch, [])))
        if number < MAX_READERS:
            assert answers.decode(socket.recv()) == Grant(number)
    assert not any(socket.poll(50) for socket in sockets)
    sockets[0].send(encode(Release(0, epoch, b"")))
    assert answers.decode(sockets[MAX_READERS].recv()) == Grant(MAX_READERS)
    assert not sockets[MAX_READERS + 1].poll(50)
    for socket in sockets:
        socket.close()
    context.close()
    server.close()


def test_what_is_removed_is_gone_at_its_node(node: Node, elsewhere: OtherNode) -> None:
    server = ServerThread(node.path, KEYS)
    elsewhere.servers.follow({"node": server.endpoint})
    node.fill(1, 2, 3)
    engine = reader(elsewhere)
    wait_for(lambda: found(engine, 1, 2, 3), 10, "the news")
    engine.tier.remove(keys_of(1))
    assert engine.tier.lookup(keys_of(1, 2)) == [Lookup.MISS, Lookup.HIT]
    assert engine.load(keys_of(1, 2)).good == (False, True)
    wait_for(lambda: node.engine.tier.lookup(keys_of(1, 2)) == [0, 2], 5, "the removal")
    node.fill(1)
    wait_for(lambda: found(engine, 1, 2, 3), 5, "that it is back")
    tier = engine.tier
    assert isinstance(tier, RemoteTier)
    tier.clear()
    wait_for(lambda: node.engine.tier.lookup(keys_of(1, 2, 3)) == [0, 0, 0], 5, "the removal")
    assert node.engine.tier.stats().failures == {}
    server.close()
