"""Workers whose KV outlives their own memory: the same tokens, whatever the tiers do, and no block lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.offloading import (
    MAX_LEN,
    POOLS,
    SIZE,
    Slow,
    block_bytes,
    check,
    config_of,
    prompt_of,
    random_load,
    real,
    until_ready,
    value,
)
from support.pair import Node, Pair
from support.tiers import end
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.decode.stream import StreamState
from tandem.engine.load_cost import LoadCost
from tandem.engine.offloader import Offloader
from tandem.kv_transfer.offload.build import start_host_tier
from tandem.kv_transfer.offload.stack import Write
from tandem.prefill.job import JobState


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    make_checkpoint("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[tuple[int, int], list[int]]:
    """Undisturbed outputs of prompts, by number and length."""
    pair = Pair(config_of(folder, 400, POOLS["together"]))
    which = [(number, num_tokens) for number in range(12) for num_tokens in (20, 60, 90)]
    outputs = pair.generate([prompt_of(*one) for one in which], max_tokens=12)
    pair.close()
    return dict(zip(which, outputs, strict=True))


# ---- real tiers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiers(folder: Path, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """A node's memory for 20 blocks, and a disk for all."""
    size = block_bytes(folder)
    tiers = [
        {"kind": "host", "capacity": 20 * (size + 256), "policy": "lru"},
        {"kind": "disk", "capacity": 400 * (size + 8192), "policy": "lru", "path": str(tmp_path / "disk")},
    ]
    config = Config.model_validate({"offload": {"tiers": tiers}})
    keeper = start_host_tier(config.offload, size, tmp_path)
    assert keeper is not None
    yield tiers
    end(keeper)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pools", POOLS)
def test_what_the_pool_lost_comes_back(
    folder: Path,
    tmp_path: Path,
    tiers: list[dict[str, Any]],
    golden: dict[tuple[int, int], list[int]],
    pools: str,
    overlap: bool,
) -> None:
    pair = Pair(config_of(folder, 20, POOLS[pools], tiers), overlap, tiers_of=real(tmp_path))
    until_ready(pair)
    which = [(number, 90) for number in range(6)]
    for turn in range(2):
        for one in which:
            assert pair.generate([prompt_of(*one)], max_tokens=12) == [golden[one]], (turn, one)
    check(pair)
    for node in pair.nodes.values():
        assert value(node, "tandem_offload_loads_total", outcome="loaded") >= 4, node.peer
        assert value(node, "tandem_offload_tokens_total") >= 4 * 40
        assert value(node, "tandem_offload_blocks_total", tier="disk-1", event="loaded") > 0
    assert value(pair.decode, "tandem_offload_blocks_total", tier="host-0", event="stored") > 0
    pair.close()


def test_the_next_life_finds_what_the_last_one_stored(
    folder: Path, tmp_path: Path, tiers: list[dict[str, Any]], golden: dict[tuple[int, int], list[int]]
) -> None:
    config = config_of(folder, 60, POOLS["together"], tiers)
    for life in range(2):
        pair = Pair(config, tiers_of=real(tmp_path))
        until_ready(pair)
        assert pair.generate([prompt_of(3, 90)], max_tokens=12) == [golden[3, 90]]
        assert value(pair.decode, "tandem_offload_tokens_total") == (88 if life else 0)
        check(pair)
        pair.close()


def test_tenants_do_not_share(folder: Path, tmp_path: Path, tiers: list[dict[str, Any]]) -> None:
    pair = Pair(config_of(folder, 20, POOLS["together"], tiers), tiers_of=real(tmp_path))
    until_ready(pair)
    for salt in ("a", "b"):
        pair.generate([prompt_of(1, 90)], max_tokens=2, salt=salt)
        for other in range(4):
            pair.generate([prompt_of(5 + other, 90)], max_tokens=2, salt=f"{salt}{other}")
    assert value(pair.decode, "tandem_offload_tokens_total") == 0
    check(pair)
    pair.close()


def test_the_keeper_dies_and_the_disk_serves(
    folder: Path, tmp_path: Path, golden: dict[tuple[int, int], list[int]]
) -> None:
    size = block_bytes(folder)
    tiers = [
        {"kind": "host", "capacity": 60 * (size + 256)},
        {"kind": "disk", "capacity": 400 * (size + 8192), "path": str(tmp_path / "disk")},
    ]
    config = config_of(folder, 20, POOLS["together"], tiers)
    keeper = start_host_tier(config.offload, size, tmp_path)
    assert keeper is not None
    pair = Pair(config, tiers_of=real(tmp_path))
    until_ready(pair)
    for number in range(4):
        assert pair.generate([prompt_of(number, 90)], max_tokens=12) == [golden[number, 90]]
    keeper.kill()
    keeper.wait()
    for number in range(4):
        assert pair.generate([prompt_of(number, 90)], max_tokens=12) == [golden[number, 90]]
    assert value(pair.decode, "tandem_offload_blocks_total", tier="disk-1", event="loaded") > 0
    check(pair)
    pair.close()
    end(keeper)


# ---- by hand --------------------------------------------------------------------------------------------------------


def stored(folder: Path, pools: str, num_blocks: int = 20, **kwargs: Any) -> tuple[Pair, Slow]:
    """A pair whose tiers hold what its pools have lost: prompt 0."""
    slow = Slow(config_of(folder, num_blocks, POOLS[pools]), **kwargs)
    pair = slow.pair
    for number in range(4):
        pair.submit(prompt_of(number, 90), max_tokens=12)
        slow.run()
    return pair, slow


def fetching(pair: Pair) -> Node | None:
    """The worker that waits for its tiers."""
    for node in pair.nodes.values():
        for one in node.worker._scheduler:
            if one.state in (StreamState.FETCHING, JobState.FETCHING):
                return node
    return None


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("how", ["waits", "slow", "removed", "abort"])
def test_a_load(folder: Path, golden: dict[tuple[int, int], list[int]], pools: str, how: str) -> None:
    """That ends well, that takes longer than computing may, that finds nothing, that nobody waits for any more."""
    pair, slow = stored(folder, pools, latency_s=0.01 if how == "waits" else 1.0)
    if pools == "apart":  # the reader's tiers are of no help
        slow.tiers[pair.decode.peer].clear()
    ticket = pair.submit(prompt_of(0, 90), max_tokens=12)
    while (node := fetching(pair)) is None:
        assert pair.turn()
    busy = node.engine.pool.num_blocks - node.engine.pool.num_free
    assert 0 < busy <= 12
    if how == "removed":
        slow.tiers[node.peer]._content = {slot: content * 0 for slot, content in slow.tiers[node.peer]._content.items()}
        slow.tiers[node.peer]._jobs._timeout_s = 0
        for job in slow.tiers[node.peer]._jobs._open.values():
            job.deadline_s = 0.0
    if how == "abort":
        pair.abort(ticket)
        for _ in range(5):
            pair.turn()
        assert not list(node.worker._scheduler)
        assert node.engine.pool.num_blocks - node.engine.pool.num_free == busy, "blocks were freed under the copy"
    slow.run()
    check(pair)
    if how != "abort":
        assert pair.outputs[ticket].tokens[0] == golden[0, 90]
        outcome = {"waits": "loaded", "slow": "slow", "removed": "failed"}[how]
        assert value(node, "tandem_offload_loads_total", outcome=outcome) >= 1
    pair.close()


@pytest.mark.parametrize("pools", POOLS)
def test_a_reader_dies_while_tiers_load(folder: Path, pools: str) -> None:
    pair, slow = stored(folder, pools)
    pair.submit(prompt_of(0, 90), max_tokens=12)
    while (node := fetching(pair)) is None:
        assert pair.turn()
    node.worker.peer_lost(pair.decode.peer if node is not pair.decode else "gateway-0#1")
    if node is not pair.decode:
        pair.abort(pair._ticket)
    slow.run()
    check(pair)
    pair.close()


def test_stores_that_never_end_hold_a_bounded_share(folder: Path, golden: dict[tuple[int, int], list[int]]) -> None:
    slow = Slow(config_of(folder, 32, POOLS["together"]), latency_s=1e6)
    pair = slow.pair
    for number in range(6):
        ticket = pair.submit(prompt_of(number, 90), max_tokens=12)
        for _ in range(60):
            pair.turn()
        assert pair.outputs[ticket].tokens[0] == golden[number, 90]
        assert 0 < pair.decode.engine.pool.num_blocks - pair.decode.engine.pool.num_free <= 8
    slow.run()
    check(pair)
    pair.close()


def test_blocks_that_fill_in_decode_are_stored_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few jobs, which lose none of them: not a sequence's last, and not those of a step that none follows soon."""
    slow = Slow(config_of(folder, 120, POOLS["together"]), latency_s=0.0)
    pair = slow.pair
    tier, jobs = slow.tiers[pair.decode.peer], []
    submit_store = tier.submit_store
    monkeypatch.setattr(tier, "submit_store", lambda job: jobs.append(len(job.keys)) or submit_store(job))
    tickets = [pair.submit(prompt_of(number, 20), max_tokens=45) for number in range(4)]
    while len(pair.outputs[tickets[0]].tokens.get(0, [])) < 24:
        pair.turn()
    assert 0 < sum(jobs) < 20
    pair.clock.advance(0.1)
    pair.turn()
    assert sum(jobs) == 20, "what is full is stored, although the worker is busy and there is room for more"
    slow.run()
    assert sum(jobs) == 32
    assert len(jobs) <= 4
    assert tier.stats().stored == 32
    check(pair)
    pair.close()


def test_equal_blocks_of_two_sequences_are_two_uses(folder: Path) -> None:
    slow = Slow(config_of(folder, 60, POOLS["together"]), latency_s=0.0, write=Write.SECOND_USE)
    pair = slow.pair
    for _ in range(2):
        pair.submit(prompt_of(0, 20), max_tokens=2)
    slow.run()
    assert slow.tiers[pair.decode.peer].stats().stored == 2
    check(pair)
    pair.close()


def test_second_use(folder: Path) -> None:
    """The prefix cache's own hits count: a prompt that comes twice is kept, one that comes once is not."""
    slow = Slow(config_of(folder, 60, POOLS["together"]), latency_s=0.0, write=Write.SECOND_USE)
    pair = slow.pair
    for number, stored in ((0, 0), (1, 0), (0, 11)):
        pair.submit(prompt_of(number, 90), max_tokens=2)
        slow.run()
        assert slow.tiers[pair.decode.peer].stats().stored == stored
    check(pair)
    pair.close()


def test_what_went_wrong_is_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are no numbers: no tier has what the prompt computed."""
    slow = Slow(config_of(folder, 40, {"colocated": {"max_batched_tokens": 32}}), latency_s=0.0)
    pair = slow.pair
    engine = pair.decode.engine
    collect = engine.collect

    def broken(step: Any) -> Any:
        return [o._replace(samples=None if o.samples is None else [None] * len(o.samples)) for o in collect(step)]

    monkeypatch.setattr(engine, "collect", broken)
    ticket = pair.submit(prompt_of(0, 90))
    slow.run()
    assert pair.outputs[ticket].refused is not None
    assert slow.tiers[pair.decode.peer].stats().stored > 0
    monkeypatch.undo()
    pair.submit(prompt_of(0, 90))
    pair.pump()
    assert all(stream.in_tiers is None for stream in pair.decode.worker._scheduler)
    slow.run()
    check(pair)
    pair.close()


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("pools", POOLS)
def test_random_loads(folder: Path, golden: dict[tuple[int, int], list[int]], pools: str, seed: int) -> None:
    """Tiny pools and tiers, jobs that end at any time, time out or not, aborts: equal tokens, and nothing leaks."""
    rng = random.Random(seed)
    config = config_of(folder, rng.choice((16, 20, 40)), POOLS[pools])
    times = rng.choice((0.0, 0.01, 0.1, 3.0)), rng.choice((0.05, 1e9))
    slow = Slow(
        config, *times, rng.choice((4, 12, 100)), rng.choice((Write.THROUGH, Write.SECOND_USE)), rng.random() < 0.5
    )
    random_load(slow, rng, lambda: (rng.randrange(6), rng.choice((20, 60, 90))), golden)


# ---- whether it is worth it -----------------------------------------------------------------------------------------


def test_cost_learns_latency_from_small_loads_and_rate_from_large_ones() -> None:
    cost = LoadCost(2, 1000, latency_s=1e-3, s_per_byte=1e-9)
    for _ in range(100):
        cost.loaded([0], 5e-3)
        cost.loaded([0] * 100_000, 5e-3 + 1e8 * 4e-9)
    assert cost.load_s([0]) == pytest.approx(5e-3, rel=0.1)
    assert cost.load_s([0] * 100_000) == pytest.approx(0.405, rel=0.1)
    assert cost.load_s([1]) == pytest.approx(1e-3, rel=0.1), "of another tier nothing was learned"
    assert cost.load_s([0, 1]) == cost.load_s([0]), "tiers load side by side"
    assert cost.load_s([]) == 0.0


def test_a_tier_that_was_slow_is_tried_again() -> None:
    cost = LoadCost(1, 1000)
    for _ in range(20):
        cost.loaded([0] * 10, 10.0)
    slow_s = cost.load_s([0] * 10)
    assert slow_s > 1.0
    for _ in range(300):
        cost.declined([0] * 10)
    assert cost.load_s([0] * 10) < 1e-3


def test_computing_sooner_is_computed(folder: Path, golden: dict[tuple[int, int], list[int]]) -> None:
    pair, slow = stored(folder, "together")
    node = pair.decode
    node.offloader._cost = LoadCost(1, node.engine.cache.layout.block_bytes, latency_s=10.0)
    ticket = pair.submit(prompt_of(0, 90), max_tokens=12)
    slow.run()
    assert pair.outputs[ticket].tokens[0] == golden[0, 90]
    assert value(node, "tandem_offload_loads_total", outcome="declined") == 1
    assert value(node, "tandem_offload_tokens_total") == 0
    check(pair)
    pair.close()


def test_no_tiers_cost_nothing(folder: Path) -> None:
    pair = Pair(config_of(folder, 40, POOLS["together"]))
    offloader: Offloader[Any] = pair.decode.offloader
    pair.generate([prompt_of(0, 90)])
    assert offloader.num_open == 0
    assert offloader.next_event_s() is None
    assert value(pair.decode, "tandem_offload_tokens_total") == 0
    pair.close()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("qwen3_moe", {"kv": {"block_tokens": SIZE, "prefix_cache": False}}, "kv.prefix_cache"),
    ],
)  # fmt: skip
def test_what_tiers_cannot_keep_is_refused(tmp_path: Path, family: str, change: dict[str, Any], key: str) -> None:
    make_checkpoint(family, tmp_path / "model")
    sections = {
        "model": {"path": str(tmp_path / "model"), "max_model_len": MAX_LEN},
        "pools": POOLS["together"],
        "kv": {"block_tokens": SIZE},
        "offload": {"tiers": [{"kind": "host", "capacity": "1MiB"}]},
    }
    with pytest.raises(ConfigError) as caught:
        Pair(Config.model_validate(sections | change), tiers_of=real(tmp_path))
    assert key in caught.value.message
