"""What a node's supervisor makes of what it hears, and how a worker tells that it stands still."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tandem.cluster.heartbeat import Heartbeat
from tandem.cluster.supervisor.health import SILENT_AFTER_S, NodeHealth
from tandem.core.clock import ManualClock
from tandem.core.health import LocalRank, Vitals
from tandem.core.log import RateLimited, RequestLog, configure_logging, logger
from tandem.core.metrics import WorkerMetrics, merge, render


def rank(worker: str, phase: str = "ready", life: int = 1) -> LocalRank:
    return LocalRank(worker, f"{worker}#{life}", worker.rpartition("-")[0], 0, phase, life - 1)


def test_a_node_is_ready_when_every_rank_is() -> None:
    health = NodeHealth(ManualClock(), 60)
    assert health.not_ready() == health.not_started() == {}
    health.follow([rank("decode-0", "weights 40 %"), rank("decode-1")])
    assert health.not_ready() == health.not_started() == {"decode-0": "weights 40 %"}
    health.follow([rank("decode-0"), rank("decode-1")])
    assert health.not_ready() == health.not_started() == {}


def test_a_dead_rank_is_named_at_once_and_its_next_life_counts() -> None:
    health = NodeHealth(ManualClock(), 60)
    health.follow([rank("decode-0"), rank("decode-1")])
    health.lost("decode-0#1", "decode-0#1 is gone: SIGKILL")
    assert health.not_ready() == {"decode-0": "decode-0#1 is gone: SIGKILL"}
    health.follow([rank("decode-0", "restarts in 2 s"), rank("decode-1")])
    health.answered("decode-0#9", Vitals(0.0))  # of nobody that is known
    assert "decode-0" in health.not_ready()
    health.follow([rank("decode-0", "starting", life=2), rank("decode-1")])
    assert health.not_ready() == {"decode-0": "starting"}
    assert health.not_started() == {}  # it was, once
    health.follow([rank("decode-0", life=2), rank("decode-1")])
    assert health.not_ready() == {}


def test_readiness_includes_progress() -> None:
    clock = ManualClock()
    health = NodeHealth(clock, 60)
    health.follow([rank("decode-0"), rank("decode-1")])
    for _ in range(8):
        clock.advance(SILENT_AFTER_S - 1)
        health.answered("decode-1#1", Vitals(0.0))
        health.answered("decode-0#1", Vitals(clock.monotonic_s()))
    assert health.not_ready() == {"decode-0": "has work, and has taken no step for 112 s"}
    health.answered("decode-0#1", Vitals(0.0))
    assert health.not_ready() == {}


def test_a_silent_rank_is_not_ready() -> None:
    clock = ManualClock()
    health = NodeHealth(clock, 60)
    health.follow([rank("prefill-0"), rank("decode-0")])
    clock.advance(SILENT_AFTER_S)
    health.answered("decode-0#1", Vitals(0.0))
    assert health.not_ready() == {"prefill-0": "has not answered for 15 s"}


def test_who_was_asked_to_leave_is_no_problem() -> None:
    health = NodeHealth(ManualClock(), 60)
    health.follow([rank("decode-0", "leaving"), rank("decode-1", "drained"), rank("gateway-0")])
    assert health.not_ready() == health.not_started() == {}
    assert [found.rank.worker for found in health.judge()] == ["decode-0", "gateway-0"]


def test_a_heartbeat_counts_from_when_there_was_work_and_no_step() -> None:
    clock = ManualClock()
    heart = Heartbeat(clock)
    clock.advance(100)
    assert heart.stalled_s() == 0  # it has not begun
    heart.wakes()
    clock.advance(3)
    assert heart.stalled_s() == 3  # a turn that does not end
    heart.steps()
    assert heart.stalled_s() == 0
    clock.advance(2)
    heart.sleeps(has_work=True)
    clock.advance(2)
    heart.wakes()  # woken by a message, it could not step either
    heart.sleeps(has_work=True)
    assert heart.stalled_s() == 4
    heart.sleeps(has_work=False)
    clock.advance(50)
    assert heart.stalled_s() == 0
    heart.wakes()
    assert heart.stalled_s() == 0


def test_metrics_of_a_node_have_pool_worker_and_rank() -> None:
    texts, labels = {}, {}
    for number in range(2):
        metrics = WorkerMetrics(CollectorRegistry())
        metrics.running.set(number)
        texts[f"decode-{number}"] = render(metrics.registry)
        labels[f"decode-{number}"] = {"pool": "decode", "worker": f"decode-{number}", "rank": str(number)}
    merged = merge(texts, labels)
    assert 'tandem_sequences_running{pool="decode",rank="1",worker="decode-1"} 1.0' in merged
    assert merged.count("# TYPE tandem_sequences_running gauge") == 1


@pytest.mark.parametrize("style", ["json", "text"])
def test_one_cause_cannot_flood_the_log(tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.25
    before = list(logger.handlers)
    monkeypatch.setattr("time.time", lambda: now_s)
    monkeypatch.setattr("time.time_ns", lambda: int(now_s * 1e9))
    configure_logging("decode-0#1", "INFO", style, tmp_path / "log", max_per_s=3)
    try:
        rare, limited = RateLimited(0.0), RequestLog("cmpl-1")
        for turn in range(2):
            for number in range(10):
                limited.info("flood %d", number)
            logger.info("another cause")
            rare.warning("a", "one of %s", "a")
            rare.warning("b", "one of %s", "b")
            now_s += 1 + turn
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers = before
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("flood" in line for line in lines) == 6
    assert sum("another cause" in line for line in lines) == 2
    assert sum("one of" in line for line in lines) == 4
    if style == "json":
        told = [json.loads(line) for line in lines]
        assert [record.get("held_back", 0) for record in told if "flood" in record["message"]] == [0, 0, 0, 7, 0, 0]
        assert {record.get("request_id") for record in told if "flood" in record["message"]} == {"cmpl-1"}
    else:
        assert [line for line in lines if "(and 7 more like it)" in line] == [lines[6]]
