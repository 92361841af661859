"""One suite for every tier: what `kv_transfer.offload.base.Tier` promises."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.gateway import wait_for
from support.remote import Elsewhere, OtherNode, ServerThread
from support.s3 import S3Server, allow
from support.tiers import BLOCK_BYTES, LAYOUT, Engine, content_of, end, keys_of, ready
from tandem.core.clock import SystemClock
from tandem.core.wire import make_cluster_keys
from tandem.kv_transfer.offload.base import HostBlocks, LoadJob, Lookup, Spill, StoreJob, Tier
from tandem.kv_transfer.offload.disk import open_disk, slot_bytes
from tandem.kv_transfer.offload.host import HostTier
from tandem.kv_transfer.offload.keeper import start_keeper
from tandem.kv_transfer.offload.keys import key_space, tenant_tag
from tandem.kv_transfer.offload.objects import open_objects
from tandem.kv_transfer.offload.policies import POLICIES
from tandem.kv_transfer.offload.pool import pool_bytes
from tandem.kv_transfer.offload.record import HEADER_BYTES
from tandem.kv_transfer.offload.simulated import Cost, SimulatedTier

SLOTS = 8
TIMEOUT_S = 30.0


class Kit:
    """Makes tiers of one kind with `SLOTS` slots, and cleans up after them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.news = threading.Event()
        self._folder = folder
        self._socket = folder / "host.socket"
        self._closers: list[Callable[[], None]] = []

    def make(self, policy: str = "lru") -> Tier:
        tier = self._make(policy)
        self._closers.append(tier.close)
        ready(tier)
        return tier

    def engine(self, policy: str = "lru") -> Engine:
        return Engine(self.make(policy), self.news)

    def another(self, engine: Engine) -> Engine:
        """A second user of what is kept: the same tier where it has only one."""
        if self.name != "host":
            return Engine(engine.tier, self.news)
        tier = HostTier(self._socket, BLOCK_BYTES, SystemClock(), TIMEOUT_S, self.news.set)
        self._closers.append(tier.close)
        ready(tier)
        return Engine(tier, self.news)

    def _make(self, policy: str) -> Tier:
        match self.name:
            case "simulated":
                cost = Cost(latency_s=0.001, load_bytes_per_s=1e9, store_bytes_per_s=1e9)
                return SimulatedTier("simulated", SLOTS, BLOCK_BYTES, policy, cost, SystemClock(), TIMEOUT_S)
            case "host":
                keeper = start_keeper(self._socket, pool_bytes(SLOTS, BLOCK_BYTES), BLOCK_BYTES, policy)
                self._closers.append(lambda: end(keeper))
                return HostTier(self._socket, BLOCK_BYTES, SystemClock(), TIMEOUT_S, self.news.set)
            case "remote":
                keeper = start_keeper(self._socket, pool_bytes(SLOTS, BLOCK_BYTES), BLOCK_BYTES, policy)
                self._closers.append(lambda: end(keeper))
                server = ServerThread(self._socket, make_cluster_keys())
                self._closers.append(server.close)
                node = OtherNode({"that node": server.endpoint}, server.keys)
                self._closers.append(node.close)
                home = HostTier(self._socket, BLOCK_BYTES, SystemClock(), TIMEOUT_S, self.news.set)
                return Elsewhere(home, node.tier(self.news.set, TIMEOUT_S))
            case "s3":
                # Each test has a part of the bucket for itself.
                prefix, capacity = self._folder.name, SLOTS * (HEADER_BYTES + BLOCK_BYTES)
                return open_objects(
                    S3Server.BUCKET, prefix, s3_server().endpoint, capacity, BLOCK_BYTES, policy, SystemClock(), TIMEOUT_S,
                    self.news.set,
                )  # fmt: skip
            case _:
                capacity = SLOTS * slot_bytes(BLOCK_BYTES) + 4096
                paths = [self._folder / "disk"]
                return open_disk(paths, capacity, BLOCK_BYTES, policy, SystemClock(), TIMEOUT_S, self.news.set)

    def close(self) -> None:
        for closer in reversed(self._closers):
            closer()


@functools.cache
def s3_server() -> S3Server:
    """One for all tests of this file; `last_of_all` ends it."""
    pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    return S3Server()


@pytest.fixture(scope="module", autouse=True)
def last_of_all() -> Iterator[None]:
    yield
    if s3_server.cache_info().currsize:
        s3_server().close()


@pytest.fixture(params=["simulated", "disk", "host", "remote", "s3"])
def kit(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    allow(monkeypatch)
    kit = Kit(request.param, tmp_path)
    yield kit
    kit.close()


def test_what_was_stored_comes_back(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(1, 2, 3)
    assert engine.tier.lookup(keys) == [Lookup.MISS] * 3
    stored = engine.store(keys)
    assert stored.good == (True,) * 3
    assert stored.error == ""
    assert engine.tier.lookup(keys) == [Lookup.HIT] * 3
    assert engine.load(keys[::-1]).good == (True,) * 3
    assert engine.load(keys[1:2]).good == (True,)


def test_only_what_was_stored_is_found(kit: Kit) -> None:
    engine = kit.engine()
    [key] = keys_of(1)
    engine.store([key])
    for place in range(len(key)):
        other = key[:place] + bytes([key[place] ^ 1]) + key[place + 1 :]
        assert engine.tier.lookup([other]) == [Lookup.MISS]
    strangers = keys_of(2, 3)
    assert engine.load([strangers[0], key, strangers[1]]).good == (False, True, False)


def test_tenants_and_groups_never_meet(kit: Kit) -> None:
    engine = kit.engine()
    spaces = [
        key_space("", LAYOUT),
        key_space("a", LAYOUT),
        key_space("", LAYOUT, group=1),
    ]
    engine.store(keys_of(1, space=spaces[0]))
    for space in spaces[1:]:
        assert engine.tier.lookup(keys_of(1, space=space)) == [Lookup.MISS]
        assert engine.load(keys_of(1, space=space)).good == (False,)
    engine.store(keys_of(1, space=spaces[1]))
    engine.tier.clear(tenant_tag("a"))
    assert engine.tier.lookup(keys_of(1, space=spaces[1])) == [Lookup.MISS]
    assert engine.tier.lookup(keys_of(1, space=spaces[0])) == [Lookup.HIT]
    engine.tier.clear()
    assert engine.tier.lookup(keys_of(1, space=spaces[0])) == [Lookup.MISS]


def test_capacity_is_hard_and_a_prefix_keeps_its_beginning(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(*range(20))
    result = engine.store(keys)
    found = [answer is Lookup.HIT for answer in engine.tier.lookup(keys)]
    assert sum(found) <= SLOTS
    assert list(result.good) == found == [True] * SLOTS + [False] * 12
    for start in range(0, 20, 4):
        engine.store(keys[start : start + 4])
        assert engine.tier.stats().num_used <= SLOTS
        assert sum(answer is Lookup.HIT for answer in engine.tier.lookup(keys)) <= SLOTS
    # Four blocks more: of the eight that were there, the last of each prefix go.
    engine.tier.clear()
    while engine.tier.stats().num_used:
        engine.tier.poll()
    first, second = keys[:4], keys[4:8]
    engine.store(first)
    engine.store(second)
    engine.store(keys[8:10])
    assert engine.tier.lookup(first) == [Lookup.HIT, Lookup.HIT, Lookup.MISS, Lookup.MISS]


def test_the_policy_says_what_goes(kit: Kit) -> None:
    engine = kit.engine("lru")
    keys = keys_of(*range(SLOTS))
    for key in keys:
        engine.store([key])
    engine.tier.touch([keys[0]])
    engine.load([keys[2]])
    more = keys_of(100, 101)
    for key in more:
        engine.store([key])
    gone = [number for number, answer in enumerate(engine.tier.lookup(keys)) if answer is Lookup.MISS]
    assert gone == [1, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves(kit: Kit, policy: str) -> None:
    engine = kit.engine(policy)
    rng = np.random.default_rng(0)
    for _ in range(40):
        keys = keys_of(*rng.choice(16, 3, replace=False).tolist())
        hits = [answer is Lookup.HIT for answer in engine.tier.lookup(keys)]
        assert list(engine.load(keys).good) == hits
        engine.store(keys)
        assert engine.tier.stats().num_used <= SLOTS


def test_what_comes_and_goes_is_told(kit: Kit) -> None:
    if kit.name == "remote":
        pytest.skip("what other nodes do with a host tier, that node's processes do not tell")
    engine = kit.engine()
    keys = keys_of(*range(12))
    engine.store(keys[:3])
    held = set(engine.tier.watch())
    assert held == set(keys[:3])
    rng = np.random.default_rng(0)
    for _ in range(20):
        some = [keys[n] for n in rng.choice(12, 3, replace=False)]
        if rng.random() < 0.2:
            engine.tier.remove(some)
        else:
            engine.store(some)
    engine.tier.clear(tenant_tag("nobody's"))
    engine.store(keys[:1])  # what was asked before it is done
    for change in engine.tier.changes():
        (held.add if change.found else held.discard)(change.key)
    found = [key for key, answer in zip(keys, engine.tier.lookup(keys), strict=True) if answer is Lookup.HIT]
    assert held == set(found)
    engine.tier.clear()
    wait_for(lambda: not engine.tier.poll() and not engine.tier.stats().num_used, 10, "an empty tier")
    assert {change.key for change in engine.tier.changes()} == set(found)


def test_pins_and_priorities(kit: Kit) -> None:
    engine = kit.engine()
    pinned, important = keys_of(1), keys_of(2)
    engine.store(pinned)
    engine.store(important, priority=1)
    engine.tier.pin(pinned)
    engine.store(keys_of(*range(10, 26)))
    assert engine.tier.lookup(pinned + important) == [Lookup.HIT] * 2
    assert engine.load(pinned).good == (True,)
    engine.tier.unpin(pinned)
    engine.store(keys_of(*range(30, 46)))
    assert engine.tier.lookup(pinned + important) == [Lookup.MISS, Lookup.HIT]


def test_nothing_goes_when_all_is_pinned(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(*range(SLOTS))
    engine.store(keys)
    engine.tier.pin(keys)
    assert engine.store(keys_of(50)).good == (False,)
    assert engine.tier.lookup(keys) == [Lookup.HIT] * SLOTS
    engine.tier.unpin(keys)
    assert engine.store(keys_of(50)).good == (True,)


def test_removed_is_gone_also_while_it_is_pinned(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(1, 2)
    engine.store(keys)
    engine.tier.pin(keys)
    engine.tier.remove(keys)
    assert engine.tier.lookup(keys) == [Lookup.MISS] * 2
    assert engine.store(keys).good == (True, True)
    assert engine.load(keys).good == (True, True)


def test_what_is_pushed_out_is_handed_on(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(*range(SLOTS))
    for key in keys:
        engine.store([key])
    spill = Spill(3, HostBlocks(np.zeros(3 * BLOCK_BYTES, np.uint8), BLOCK_BYTES))
    result = engine.store(keys_of(50, 51), spill=spill)
    assert sorted(spilled.key for spilled in result.spilled) == sorted(keys[:2])
    assert isinstance(spill.memory, HostBlocks)
    for key, place in result.spilled:
        np.testing.assert_array_equal(spill.memory.array[place], content_of(key))
        spill.give(place)
    # With fewer places than blocks that go, the rest is dropped.
    result = engine.store(keys_of(52, 53, 54, 55), spill=spill)
    assert result.good == (True,) * 4
    assert len(result.spilled) == 3
    assert spill.num_free == 0


def test_many_jobs_at_a_time(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(*range(SLOTS))
    stores = [engine.submit_store([key], first=number) for number, key in enumerate(keys)]
    results = engine.wait(*stores)
    assert all(results[number].good == (True,) for number in stores)
    engine.memory.array[:] = 0
    loads = [engine.tier.submit_load(LoadJob([key], engine.memory, [20 + n])) for n, key in enumerate(keys)]
    results = engine.wait(*loads)
    for number, key in enumerate(keys):
        assert results[loads[number]].good == (True,)
        np.testing.assert_array_equal(engine.memory.array[20 + number], content_of(key))


def test_two_engines(kit: Kit) -> None:
    first = kit.engine()
    second = kit.another(first)
    keys = keys_of(*range(4))
    first.store(keys)
    assert second.load(keys).good == (True,) * 4
    assert second.store(keys).good == (True,) * 4, "what is there already is good"
    assert first.tier.stats().num_used == 4


def test_a_slot_that_changes_hands_under_a_load_is_a_miss_or_right(kit: Kit) -> None:
    """Loads of keys that others push out all the while: `Engine.load` compares every byte of what is called good."""
    reader = kit.engine()
    writer = kit.another(reader)
    rng = np.random.default_rng(3)
    for _ in range(60):
        keys = keys_of(*rng.choice(40, 4, replace=False).tolist())
        for key, block in zip(keys, range(30, 34), strict=True):
            writer.memory.array[block] = content_of(key)
        wanted = keys_of(*rng.choice(40, 6, replace=False).tolist())
        reader.memory.array[:] = 0
        load = reader.tier.submit_load(LoadJob(wanted, reader.memory, range(6)))
        store = writer.tier.submit_store(StoreJob(keys, writer.memory, range(30, 34)))
        pending = {load, store} if reader.tier is writer.tier else {load}
        good = reader.wait(*pending)[load].good
        if reader.tier is not writer.tier:
            writer.wait(store)
        for block, key in enumerate(wanted):
            if good[block]:
                np.testing.assert_array_equal(reader.memory.array[block], content_of(key))


def test_an_empty_job_ends(kit: Kit) -> None:
    engine = kit.engine()
    assert engine.store([]).good == ()
    assert engine.load([]).good == ()


def test_close_with_jobs_in_flight(kit: Kit) -> None:
    engine = kit.engine()
    keys = keys_of(*range(SLOTS))
    numbers = {engine.submit_store([key], first=number) for number, key in enumerate(keys)}
    numbers.add(engine.tier.submit_load(LoadJob(keys[:2], engine.memory, [40, 41])))
    engine.tier.close()
    before = engine.memory.array.copy()
    assert {result.number for result in engine.tier.poll()} == numbers
    assert engine.tier.lookup(keys) == [Lookup.MISS] * SLOTS
    np.testing.assert_array_equal(engine.memory.array, before)
    engine.tier.close()
    number = engine.tier.submit_load(LoadJob(keys[:1], engine.memory, [0]))
    [result] = engine.tier.poll()
    assert (result.number, result.good) == (number, (False,))


def test_nothing_is_said_when_nothing_is_wrong(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    engine = kit.engine()
    with caplog.at_level(logging.WARNING, "tandem"):
        engine.store(keys_of(*range(12)))
        engine.load(keys_of(*range(12)))
    assert not caplog.records
    assert not engine.tier.stats().failures
