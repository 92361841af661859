"""The s3 tier against moto's server in a process of its own: away for a while, objects deleted and changed under it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gateway import wait_for
from support.patience import stretched
from support.s3 import S3Server, allow
from support.tiers import BLOCK_BYTES, Engine, keys_of, ready
from tandem.core.clock import SystemClock
from tandem.core.errors import ConfigError
from tandem.kv_transfer.offload import prefix_claim
from tandem.kv_transfer.offload.base import Lookup
from tandem.kv_transfer.offload.objects import open_objects
from tandem.kv_transfer.offload.record import HEADER_BYTES

pytest.importorskip("boto3")
pytest.importorskip("moto.server")

SLOTS = 8
CAPACITY = SLOTS * (HEADER_BYTES + BLOCK_BYTES)


class Store:
    """A server, and engines that use it."""

    def __init__(self) -> None:
        self.server = S3Server()
        self.news = threading.Event()
        self.engines: list[Engine] = []

    def open(self, timeout_s: float = 10.0, wait: bool = True, cluster: str = "", worker: str = "w0") -> Engine:
        tier = open_objects(
            S3Server.BUCKET, f"tandem/{worker}", self.server.endpoint, CAPACITY, BLOCK_BYTES, "lru", SystemClock(),
            timeout_s, self.news.set, cluster=cluster,
        )  # fmt: skip
        self.engines.append(Engine(tier, self.news))
        if wait:
            ready(tier)
        return self.engines[-1]

    def close(self) -> None:
        self.server.go_on()
        for engine in self.engines:
            engine.tier.close()
        self.server.close()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    allow(monkeypatch)
    store = Store()
    yield store
    store.close()


def test_blocks_come_back_also_after_a_restart_and_within_the_bound(store: Store) -> None:
    engine = store.open()
    keys = keys_of(*range(20))
    for start in range(0, 20, 4):
        assert engine.store(keys[start : start + 4]).good == (True,) * 4
        assert len(store.server.names()) <= SLOTS
    hits = [key for key, state in zip(keys, engine.tier.lookup(keys), strict=True) if state is Lookup.HIT]
    assert len(hits) == SLOTS
    assert engine.load(hits).good == (True,) * SLOTS
    engine.tier.close()
    engine = store.open()
    assert engine.load(hits).good == (True,) * SLOTS
    engine.tier.clear()
    deadline_s = time.monotonic() + stretched(10)
    while store.server.names():
        engine.tier.poll()
        assert time.monotonic() < deadline_s


def test_a_store_that_is_away(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """It stops answering in the middle of things. Misses and one warning; then it serves again by itself."""
    engine = store.open(timeout_s=0.5)
    keys = keys_of(*range(4))
    engine.store(keys)
    with caplog.at_level(logging.WARNING, "tandem"):
        store.server.stop()
        start_s = time.monotonic()
        assert engine.load(keys).good == (False,) * 4
        assert engine.store(keys_of(9)).good == (False,)
        assert time.monotonic() - start_s < stretched(5)
        assert engine.tier.lookup(keys) == [Lookup.MISS] * 4
        end_s = time.monotonic() + 4
        while time.monotonic() < end_s:
            engine.load(keys)
            engine.store(keys_of(10))
            time.sleep(0.1)
        store.server.go_on()
        deadline_s = time.monotonic() + stretched(20)
        while engine.load(keys).good != (True,) * 4:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    causes = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == len(causes) <= 2
    assert engine.store(keys_of(11)).good == (True,)


def test_a_store_that_comes_late(store: Store) -> None:
    store.server.stop()
    engine = store.open(timeout_s=0.5, wait=False)
    assert engine.store(keys_of(1)).good == (False,)
    store.server.go_on()
    ready(engine.tier)
    assert engine.store(keys_of(1)).good == (True,)


def test_objects_that_are_deleted_or_changed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    engine = store.open()
    keys = keys_of(*range(4))
    engine.store(keys)
    names = {name[-64:]: name for name in store.server.names()}
    deleted, changed, cut = (names[key.hex()] for key in keys[:3])
    store.server.client.delete_object(Bucket=S3Server.BUCKET, Key=deleted)
    body = bytearray(store.server.get(changed))
    body[HEADER_BYTES + 7] ^= 1
    store.server.put(changed, bytes(body))
    store.server.put(cut, bytes(body[:100]))
    with caplog.at_level(logging.WARNING, "tandem"):
        assert engine.load(keys).good == (False, False, False, True)
    assert engine.tier.stats().failures == {"deleted": 1, "checksum": 1, "truncated": 1}
    assert engine.store(keys).good == (True,) * 4
    assert engine.load(keys).good == (True,) * 4


def test_what_a_dead_process_left_is_cleared_away(store: Store) -> None:
    engine = store.open()
    engine.store(keys_of(1))
    [name] = store.server.names()
    body = store.server.get(name)
    folder, _, last = name.rpartition("/")
    older = f"{folder}/{0:016x}-{keys_of(2)[0].hex()}"
    store.server.put(older, body)
    store.server.put(f"tandem/w0/{SLOTS}/{last}", body)
    engine.tier.close()
    engine = store.open()
    assert store.server.names() == [name]
    assert engine.load(keys_of(1)).good == (True,)


CLAIM = "tandem/cluster"
BEAT_S, LEASE_S = 0.1, 0.6


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims are renewed, and run out, sooner."""
    monkeypatch.setattr(prefix_claim, "BEAT_S", BEAT_S)
    monkeypatch.setattr(prefix_claim, "LEASE_S", LEASE_S)
    monkeypatch.setattr(prefix_claim, "_LOOK_S", BEAT_S / 2)


def blocks_in(store: Store) -> set[str]:
    return set(store.server.names()) - {CLAIM}


@pytest.mark.usefixtures("quick")
def test_another_cluster_is_refused(store: Store) -> None:
    """Its blocks would be counted by nobody, and it would delete ours. Workers of one cluster share the prefix."""
    engine = store.open(cluster="one")
    keys = keys_of(*range(4))
    engine.store(keys)
    before = blocks_in(store)
    for worker in ("w0", "w7"):
        with pytest.raises(ConfigError, match="prefix: s3://kv-blocks/tandem is in use by another cluster") as refused:
            store.open(cluster="two", worker=worker)
        assert "a prefix of its own" in refused.value.fix
    start_s = time.monotonic()
    other = store.open(cluster="one", worker="w1")
    assert time.monotonic() - start_s < LEASE_S, "there is nothing to wait for"
    assert other.store(keys).good == (True,) * 4
    assert before < blocks_in(store)
    time.sleep(2 * LEASE_S)
    assert engine.load(keys).good == other.load(keys).good == (True,) * 4


@pytest.mark.usefixtures("quick")
def test_a_prefix_that_nobody_uses_any_more(store: Store) -> None:
    """What was closed is free at once, also for another cluster; what died, when its claim has run out."""
    keys = keys_of(*range(4))
    engine = store.open(cluster="one")
    engine.store(keys)
    engine.tier.close()
    assert CLAIM not in store.server.names()
    engine = store.open(cluster="two")
    assert engine.load(keys).good == (True,) * 4, "what is there is kept"
    engine.tier.close()
    store.server.put(CLAIM, b"dead\n0")
    start_s = time.monotonic()
    engine = store.open(cluster="two")
    assert time.monotonic() - start_s >= LEASE_S
    assert engine.load(keys).good == (True,) * 4


@pytest.mark.usefixtures("quick")
def test_a_prefix_that_another_cluster_took(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it is touched, and one warning; when the other has gone, what is there then is found."""
    keys = keys_of(*range(4))
    engine = store.open(cluster="one")
    engine.store(keys)
    before = blocks_in(store)
    with caplog.at_level(logging.WARNING, "tandem"):
        store.server.put(CLAIM, b"two\n0")
        wait_for(lambda: engine.load(keys).good == (False,) * 4, 10, "a tier that notices")
        for beat in range(10):
            store.server.put(CLAIM, b"two\n%d" % beat)
            assert engine.store(keys_of(100 + beat)).good == (False,)
            engine.tier.remove(keys)
            time.sleep(BEAT_S)
        assert blocks_in(store) == before
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == len(set(messages)) <= 2
    gone = next(name for name in before if name.endswith(keys[0].hex()))
    store.server.client.delete_object(Bucket=S3Server.BUCKET, Key=gone)
    store.server.client.delete_object(Bucket=S3Server.BUCKET, Key=CLAIM)
    wait_for(lambda: engine.tier.poll() is not None and not engine.tier.stats().away, 20, "a tier that is back")
    # On a busy machine its claim may run out once more.
    wait_for(lambda: engine.load(keys).good == (False, True, True, True), 20, "what is there")


@pytest.mark.usefixtures("quick")
def test_clusters_that_come_at_the_same_moment(store: Store) -> None:
    """Soon at most one of them uses the prefix."""

    def open_(cluster: str) -> Engine | None:
        try:
            return store.open(cluster=cluster, wait=False)
        except ConfigError:
            return None

    with ThreadPoolExecutor(4) as starts:
        engines = [engine for engine in starts.map(open_, ["one", "two", "three", "four"]) if engine is not None]
    time.sleep(4 * BEAT_S)
    key = keys_of(1)
    assert sum(engine.store(key).good == (True,) for engine in engines) <= 1


@pytest.mark.usefixtures("quick")
def test_a_store_that_was_away_for_long(store: Store) -> None:
    """The claim has run out meanwhile: what is there is looked through again before it is used."""
    engine = store.open(cluster="one", timeout_s=0.3)
    keys = keys_of(*range(4))
    engine.store(keys)
    store.server.stop()
    time.sleep(2 * LEASE_S)
    assert engine.load(keys).good == (False,) * 4
    store.server.go_on()
    wait_for(lambda: engine.tier.poll() is not None and not engine.tier.stats().away, 20, "a tier that is back")
    wait_for(lambda: engine.load(keys).good == (True,) * 4, 20, "its blocks")
