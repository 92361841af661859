"""`tandem tune`: replays against counts by hand and a slow model, the timing model, sweeps, traces, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.bench.conversations import Conversations
from tandem.bench.workload import read_trace as read_jobs
from tandem.cluster.cli.app import app
from tandem.core.config import ConfigSource, OffloadConfig, load_config
from tandem.core.errors import ConfigError
from tandem.kv_transfer.offload.policies import POLICIES
from tandem.kv_transfer.offload.record import HEADER_BYTES
from tandem.kv_transfer.offload.replay import WORKERS, Model, Outcome, Replay, TierOutcome, plan_slots
from tandem.kv_transfer.offload.simulated import Cost
from tandem.kv_transfer.offload.sweep import Judged, best, expand, pareto
from tandem.kv_transfer.offload.trace import Trace, TraceRequest, read_trace, write_trace
from typer.testing import CliRunner

AT_ONCE = Cost(0.0, math.inf, math.inf)
SLOW = Cost(0.001, 2e6, 1e6)
TOKEN_BYTES = 10
BLOCK_BYTES = 512 * TOKEN_BYTES
SLOT_BYTES = HEADER_BYTES + BLOCK_BYTES
NO_LIMIT = "100TiB"


def model(cost: Cost = AT_ONCE, workers: int = 1, **changes: Any) -> Model:
    links = dict.fromkeys(("host", "disk", "s3"), cost)
    return Model(TOKEN_BYTES, 512, links, workers, 10_000.0)._replace(**changes)


def offload(*tiers: dict[str, Any], **keys: Any) -> OffloadConfig:
    return OffloadConfig.model_validate({"tiers": tiers, **keys})


def host(capacity: str | int = NO_LIMIT, **keys: Any) -> dict[str, Any]:
    return {"kind": "host", "capacity": capacity, "timeout_s": 600, **keys}


def store_of(num_slots: int, **keys: Any) -> dict[str, Any]:
    """A tier with room for exactly so many blocks."""
    return {"kind": "s3", "bucket": "b", "capacity": num_slots * SLOT_BYTES, "timeout_s": 600, **keys}


def trace_of(*prompts: Sequence[int], every_s: float = 1000.0, short: int = 0) -> Trace:
    return Trace(
        [
            TraceRequest(1e3 * every_s * number, 512 * len(ids) - short, 1, tuple(ids))
            for number, ids in enumerate(prompts)
        ],
        512,
    )


def made_up(num_requests: int = 400, seed: int = 1) -> Trace:
    return Trace(list(Conversations(num_requests, seed, input_tokens=1500).requests()), 512)


def by_hand(trace: Trace) -> int:
    seen: set[int] = set()
    tokens = 0
    for request in trace.requests:
        for number, block in enumerate(request.hash_ids):
            if block not in seen:
                break
            tokens += min(512, request.input_length - 512 * number)
        seen |= set(request.hash_ids)
    return tokens


# ---- what hits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("cost", "workers"), [(AT_ONCE, 1), (SLOW, 3)])
def test_without_limit_everything_that_came_before_hits(policy: str, cost: Cost, workers: int) -> None:
    trace = made_up()
    outcome = Replay(trace, offload(host(policy=policy)), model(cost, workers)).run()
    assert outcome.hit_tokens == by_hand(trace) == trace.without_limit()[0]
    assert outcome.hit_blocks == trace.without_limit()[1]
    assert 0.4 < outcome.hit_tokens / outcome.prompt_tokens < 0.8, "the trace is one worth caching"
    [tier] = outcome.tiers.values()
    distinct = len({block for request in trace.requests for block in request.hash_ids})
    assert tier.stored_bytes == distinct * BLOCK_BYTES, "nothing is stored twice"
    assert tier.loaded_bytes == outcome.hit_blocks * BLOCK_BYTES
    assert (tier.evicted, tier.refused, tier.failures) == (0, 0, {})


@pytest.mark.parametrize(
    "tiers",
    [
        [store_of(80), host(write="write_back")],
        [host(write="write_back")],
        [store_of(80, policy="lru"), host()],
    ],
    ids=["moved down", "given up by the workers", "both take all"],
)
@pytest.mark.parametrize("cache_blocks", [0, 30])
def test_a_last_tier_without_limit_has_what_the_others_lose(tiers: list[dict[str, Any]], cache_blocks: int) -> None:
    trace = made_up(200)
    config = offload(*tiers, moving="1GiB")
    outcome = Replay(trace, config, model(worker_cache_bytes=cache_blocks * BLOCK_BYTES)).run()
    assert outcome.hit_tokens == by_hand(trace)
    assert sum(tier.hit_tokens for tier in outcome.tiers.values()) == outcome.hit_tokens
    assert (WORKERS in outcome.tiers) == bool(cache_blocks)
    assert not outcome.tiers[f"{tiers[0]['kind']}-0"].refused, "what finds no room is not given up, and so not moved"
    assert all(tier.hit_tokens > 0 for tier in outcome.tiers.values())
    assert bool(outcome.moved_down) == (len(tiers) == 2 and tiers[1].get("write") == "write_back")


def slow_lru(prompts: Sequence[Sequence[int]], capacity: int) -> int:
    """Hits of a list, the least recently used first: a prompt's beginning counts as used last, and of what is new only
    the beginning finds room, for which nothing of the prompt itself goes."""
    order: list[int] = []
    hits = 0
    for ids in prompts:
        hits += next((n for n, block in enumerate(ids) if block not in order), len(ids))
        own, others = [block for block in ids if block in order], [block for block in order if block not in ids]
        for block in ids:
            if block in order:
                continue
            if len(own) + len(others) == capacity:
                if not others:
                    break
                others.pop(0)
            own.append(block)
        order = others + [block for block in reversed(ids) if block in own]
    return hits


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True), min_size=1, max_size=30),
    st.integers(1, 10),
)
def test_hits_are_those_of_a_slow_model(prompts: list[list[int]], capacity: int) -> None:
    outcome = Replay(trace_of(*prompts), offload(store_of(capacity, policy="lru")), model()).run()
    assert outcome.hit_blocks == slow_lru(prompts, capacity)
    assert outcome.hit_tokens == 512 * outcome.hit_blocks


@pytest.mark.parametrize("policy", POLICIES)
def test_more_room_is_no_worse_by_much_and_never_better_than_without_limit(policy: str) -> None:
    trace = made_up(300)
    most = by_hand(trace)
    hits = [
        Replay(trace, offload(store_of(room, policy=policy)), model(SLOW, 2)).run().hit_tokens
        for room in (50, 200, 800)
    ]
    assert hits[0] < hits[1] < hits[2] <= most
    assert hits[2] > 0.5 * most


def test_what_a_link_cannot_carry_in_time_is_lost_and_counted() -> None:
    trace = made_up(100)
    config = offload({**host(), "timeout_s": 0.5})
    outcome = Replay(trace, config, model(Cost(0.0, 1e9, 3e4))).run()
    assert outcome.tiers["host-0"].failures["slow"] > 0
    assert 0 < outcome.hit_tokens < by_hand(trace)


# ---- when first tokens come -----------------------------------------------------------------------------------------


def test_times_are_those_of_the_model() -> None:
    cost = Cost(0.5, BLOCK_BYTES / 2.0, BLOCK_BYTES / 1.0)
    trace = trace_of([1, 2], [1, 2], [1, 2, 3])
    outcome = Replay(trace, offload(host()), model(cost, overhead_s=0.25)).run()
    load_s = 2 * 2.0 + 0.5
    expected = [0.25 + 1024 / 1e4, 0.25 + load_s + 1 / 1e4, 0.25 + load_s + 512 / 1e4]
    assert outcome.ttft_s == pytest.approx(expected)


def test_requests_queue_for_workers() -> None:
    prompts = [[n] for n in range(4)]
    one, two = (
        Replay(trace_of(*prompts, every_s=0.0), offload(host()), model(workers=workers)).run() for workers in (1, 2)
    )
    step_s = 512 / 1e4
    assert one.ttft_s == pytest.approx([step_s, 2 * step_s, 3 * step_s, 4 * step_s])
    assert two.ttft_s == pytest.approx([step_s, step_s, 2 * step_s, 2 * step_s])
    assert one.busy == pytest.approx(1.0)


def test_what_is_just_being_computed_is_waited_for() -> None:
    outcome = Replay(trace_of([1, 2], [1, 2], [7], every_s=0.0), offload(host()), model(workers=2)).run()
    assert outcome.hit_blocks == 2
    assert outcome.ttft_s == pytest.approx([0.1024, 0.1025, 0.0512]), "whoever waits holds no worker"


def test_a_faster_replay_is_busier() -> None:
    trace = made_up(100)
    slow, fast = (Replay(trace, offload(host()), model(speed=speed)).run() for speed in (1.0, 10.0))
    assert fast.busy > slow.busy
    assert np.median(fast.ttft_s) > np.median(slow.ttft_s)


def test_only_differences_of_timestamps_count() -> None:
    trace = made_up(60)
    later = [TraceRequest(r.timestamp + 1.7e12, r.input_length, 1, r.hash_ids) for r in trace.requests]
    first, second = (
        Replay(Trace(requests, 512), offload(host()), model(SLOW)).run() for requests in (trace.requests, later)
    )
    assert first.busy == pytest.approx(second.busy)
    assert first.ttft_s == pytest.approx(second.ttft_s)


def test_a_replay_repeats_itself() -> None:
    trace, config = made_up(150), offload(store_of(60, policy="tinylfu"), store_of(200, prefix="x", write="write_back"))
    first, second = (Replay(trace, config, model(SLOW, 2)).run() for _ in range(2))
    assert first.tiers == second.tiers
    assert (first.ttft_s == second.ttft_s).all()


# ---- traces ---------------------------------------------------------------------------------------------------------


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    requests = list(Conversations(50, 3).requests())
    assert requests == list(Conversations(50, 3).requests()) != list(Conversations(50, 4).requests())
    assert write_trace(tmp_path / "t.jsonl", requests) == 50
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.requests == requests
    jobs = read_jobs(tmp_path / "t.jsonl", 20, 2.0, 1000, 1 << 20)
    assert [len(job.prompt) for job in jobs] == [request.input_length for request in requests[:20]]
    assert jobs[-1].at_s == requests[19].timestamp / 2e3


GOOD = {"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "truncated"),
        (json.dumps({**GOOD, "input_length": "long"}), "input_length"),
        (json.dumps({**GOOD, "input_length": 0}), "input_length"),
        (json.dumps({**GOOD, "hash_ids": [1]}), "`hash_ids` has 1 ids, and `input_length` 600 is 2 blocks"),
        (json.dumps({**GOOD, "hash_ids": [1, 1]}), "`hash_ids` has an id twice"),
        (json.dumps({**GOOD, "hash_ids": [1, -1]}), "hash_ids"),
        (json.dumps({**GOOD, "timestamp": 4}), "`timestamp` 4 is before"),
        (json.dumps({**GOOD, "timestamp": None}), "timestamp"),
        (json.dumps({**GOOD, "turn": 1}), "unknown field `turn`"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "output_length"}), "output_length"),
    ],
)
def test_a_bad_line_names_its_number_and_field(line: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert error.value.message.startswith(f"{path}:3: ")
    assert told in error.value.message


def test_no_trace(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing", "."):
        with pytest.raises(ConfigError):
            read_trace(tmp_path / name)


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_lists_where_the_schema_wants_one_value_are_alternatives() -> None:
    disk = {"kind": "disk", "path": ["/a", "/b"], "capacity": "1TiB"}
    tree = {"offload": {"tiers": [{**host(["1GiB", "4GiB"]), "policy": ["lru", "arc"]}, disk], "moving": [1, 2, 3]}}
    found = expand(tree)
    assert len(found) == 12
    assert {tuple(alternative.choices) for alternative in found} == {
        ("tiers.0.capacity", "tiers.0.policy", "moving"),
    }
    assert len({tuple(alternative.choices.values()) for alternative in found}) == 12
    for alternative in found:
        config = ConfigSource().check(alternative.tree).offload
        assert config.tiers[1].path == ("/a", "/b"), "a list where the schema has one is one value"
        assert config.tiers[0].policy == alternative.choices["tiers.0.policy"]
        assert config.moving == alternative.choices["moving"]


def test_lists_of_lists_are_alternatives_of_whole_lists() -> None:
    disk = {"kind": "disk", "path": [["/a"], ["/a", "/b"]], "capacity": "1TiB"}
    found = expand({"offload": {"tiers": [[host()], [host(), disk]]}})
    assert [dict(alternative.choices) for alternative in found] == [
        {"tiers": "host"},
        {"tiers": "host + disk", "tiers.1.path": "/a"},
        {"tiers": "host + disk", "tiers.1.path": "/a + /b"},
    ]


def test_without_lists_there_is_one() -> None:
    tree = {"kv": {"block_tokens": 32}, "offload": {"tiers": [host()]}}
    assert expand(tree) == [(tree, {})]
    assert expand({})[0].choices == {}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"tiers": [{"kind": "host", "capacity": []}]}, "offload.tiers.0.capacity: an empty list"),
        ({"tiers": [{"kind": "host", "capacity": list(range(1, 40)), "timeout_s": list(range(1, 40))}]}, "more than"),
        ({"tiers": [{"kind": "host", "capacity": 1, "sizes": [1, 2]}]}, "unknown key offload.tiers.0.sizes"),
        ({"tiers": [{"kind": "host", "capacity": 1, "policy": ["lru", "best"]}]}, "offload.tiers.0.policy"),
        ({"tiers": [{"kind": "host", "capacity": ["1GiB", "two"]}]}, "offload.tiers.0.capacity"),
        ({"tiers": 3}, "offload.tiers"),
        (3, "offload"),
    ],
)
def test_what_the_schema_refuses_a_sweep_refuses(section: Any, told: str) -> None:
    source = ConfigSource()
    with pytest.raises(ConfigError, match=told):
        [source.check(alternative.tree) for alternative in expand({"offload": section})]


def test_a_tier_without_room_is_refused_by_its_key() -> None:
    assert plan_slots(offload(store_of(7)), model(), 512) == [7]
    with pytest.raises(ConfigError, match=r"offload\.tiers\.1\.capacity"):
        plan_slots(offload(host(), {**store_of(1), "capacity": 100}), model(), 512)
    with pytest.raises(ConfigError, match="there are none"):
        plan_slots(offload(), model(), 512)


def test_a_remote_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload\.tiers\.1\.kind: remote: .* one node") as error:
        plan_slots(offload(host(), {"kind": "remote"}), model(), 512)
    assert "host capacity of all nodes together" in str(error.value.fix)


def judged(cost: float, ttft_s: float) -> Judged:
    nothing: dict[str, TierOutcome] = {}
    return Judged({}, cost, Outcome(1, 0, 1, 0, nothing, 0, np.full(3, ttft_s), 0.0), 0.0)


def test_the_front_and_the_best() -> None:
    entries = [judged(5, 1.0), judged(1, 3.0), judged(2, 4.0), judged(3, 1.005), judged(9, 1.0), judged(1, 3.5)]
    assert pareto(entries) == [1, 3, 0]
    assert best(entries) == 3, "what is sooner by half a percent is not worth more"
    assert best(entries, 2.5) == 1
    with pytest.raises(ConfigError, match="the cheapest costs 1") as error:
        best(entries, 0.5)
    assert error.value.fix


# ---- the command ----------------------------------------------------------------------------------------------------

YAML = """
kv: {block_tokens: 32}
offload:
  moving: 1GiB
  tiers:
    - {kind: host, capacity: [8MiB, 64MiB], policy: [lru, s3fifo]}
    - {kind: disk, path: /nowhere/kv, capacity: 1GiB, write: write_back}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "my.yaml").write_text(YAML)
    write_trace(tmp_path / "t.jsonl", made_up(120).requests)
    return str(tmp_path / "my.yaml"), str(tmp_path / "t.jsonl")


def test_the_command_writes_lines_a_plot_and_a_file_to_serve_with(files: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ["tune", files[0], "--trace", files[1], "--kv-bytes-per-token", "64", "--workers", "4"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.stdout == (out / "tune.jsonl").read_text()
    assert len(lines) == 4
    for line in lines:
        assert 0 < line["hit_rate"] < 1
        assert set(line["hit_rate_by_tier"]) == {"host-0", "disk-1"}
        assert sum(line["hit_rate_by_tier"].values()) == pytest.approx(line["hit_rate"], abs=2e-6)
        assert line["bytes_moved"] > 0
        assert 0 < line["ttft_p50_s"] <= line["ttft_p90_s"]
    [chosen] = [line for line in lines if line["best"]]
    assert chosen["pareto"]
    tier = load_config(out / "best.yaml").offload.tiers[0]
    assert tier.policy == chosen["choices"]["tiers.0.policy"]
    assert load_config(out / "best.yaml").kv.block_tokens == 32
    assert (out / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_shows_a_table_and_the_best(files: tuple[str, str]) -> None:
    arguments = ["tune", files[0], "--trace", files[1], "--set", "kv.capacity=1MiB", "--budget", "0.2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    for text in ("0.capacity", "hit rate", "workers", "host-0", "TTFT p50", "best", "tiers:", "without limit"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--link", "tape=1:1:1"], "expected a kind of tier"),
        (["--link", "disk=1GB:1GB"], "expected KIND=LOAD:STORE:LATENCY_MS"),
        (["--link", "disk=0:1GB:1"], "expected KIND=LOAD:STORE:LATENCY_MS"),
        (["--price", "disk=cheap"], "expected KIND=PRICE"),
        (["--kv-bytes-per-token", "many"], "--kv-bytes-per-token: not a size"),
        (["--kv-bytes-per-token", "0"], "at least one"),
        (["--kv-bytes-per-token", "1GiB"], "holds no block"),
        (["--budget", "0"], "no configuration costs 0 or less"),
        (["--set", "offload.tier=1"], "did you mean offload.tiers"),
    ],
)
def test_the_command_refuses_before_it_begins(files: tuple[str, str], extra: list[str], told: str) -> None:
    arguments = ["tune", files[0], "--trace", "/nowhere/trace", *extra]
    with pytest.raises(ConfigError) as error:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert told in error.value.message


def test_tiers_are_replayed_without_torch() -> None:
    code = "import sys, tandem.kv_transfer.offload.sweep, tandem.cluster.cli.tune; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_made_up_trace(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    arguments = ["trace", "synth", str(path), "--requests", "60", "--seed", "7"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.stdout.startswith(f"{path}: 60 requests in ")
    first = path.read_bytes()
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert path.read_bytes() == first
    assert len(read_trace(path).requests) == 60
