"""The benchmarks of goodput and of a host tier on a GPU, where there is none: they run, and they count right."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from tandem.bench import goodput, offload_gpu
from tandem.bench.goodput import Tracked, Workload
from tandem.cluster.router import Placement

DEMO = str(Path(__file__).resolve().parents[2] / "deploy" / "demo-model")
LIMITS = argparse.Namespace(ttft_s=1.0, itl_ms=[50.0, 25.0])


def tracked(due_s: float, *token_times_s: float) -> Tracked:
    made = Tracked(due_s, Placement("decode-0#1", ""), 10)
    made.token_times_s = list(token_times_s)
    return made


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_workloads_are_read() -> None:
    assert Workload.parse("2000/1000:4,7.5:16") == Workload(2000, 1000, (4.0, 7.5), 16.0)
    for text in ("", "2000:4:16", "2000/1000:x:16"):
        with pytest.raises(argparse.ArgumentTypeError):
            Workload.parse(text)


def test_arrivals_depend_on_the_seed_alone() -> None:
    workload = Workload(10, 10, (5.0, 50.0), 20.0)
    found = goodput.arrivals(workload, 3)
    assert found == goodput.arrivals(workload, 3) != goodput.arrivals(workload, 4)
    assert [abs(len(times) - rate * 20) < 5 * (rate * 20) ** 0.5 for times, rate in zip(found, (5, 50), strict=True)]
    assert all(times == sorted(times) and times[-1] < 20 for times in found)


def test_who_is_good() -> None:
    steady = tracked(0.0, 0.5, 0.52, 0.54)
    late = tracked(0.0, 1.5, 1.51)
    slow = tracked(0.0, 0.5, 0.54, 0.58)
    uneven = tracked(0.0, *(0.5 + 0.001 * n for n in range(50)), 0.75)  # 50 gaps, of which one is long
    never = tracked(0.5)
    found = goodput.judge([steady, late, slow, uneven, never], 2.0, 3.0, LIMITS)
    assert found["good_share"] == {"50ms": 0.6, "50ms strict": 0.4, "25ms": 0.4, "25ms strict": 0.2}
    assert (found["ttft_share"], found["without_first_token"]) == (0.6, 1)
    assert found["ttft_ms"]["n"] == 5
    # What comes after the window does not count, but for who has nothing else.
    assert goodput.judge([tracked(0.0, 0.5, 0.6, 9.0)], 2.0, 10.0, LIMITS)["request_itl_ms"]["p50"] == 100.0
    assert goodput.judge([tracked(1.9, 2.5, 2.6)], 2.0, 3.0, LIMITS)["request_itl_ms"]["p50"] == 100.0


def test_goodput_is_the_highest_rate_with_enough_good_ones() -> None:
    rows = [
        {"workload": "2/1", "arrangement": name, "rate": rate, "good_share": {"50ms": share}, "output_tokens_per_s": rate}
        for name, rate, share in (
            ("separate", 2.0, 1.0), ("separate", 3.0, 0.9), ("separate", 4.0, 0.5), ("colocated", 2.0, 0.95),
            ("colocated", 3.0, 0.89),
        )
    ]  # fmt: skip
    (summary,) = goodput.goodputs(rows)
    assert summary["requests_per_s"] == {"separate": 3.0, "colocated": 2.0}
    assert summary["separate_to_colocated"] == 1.5


def test_goodput_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", DEMO, "--gpus", "--arrangements", "separate", "--max-running", "8", "--ttft-s", "60"]
    goodput.main([*arguments, "--itl-ms", "60000", "--workloads", "60/8:5,10:2", "40/4:5:2"])
    found = printed(capsys)
    assert not [record for record in found if "error" in record]
    rows = [record for record in found if "good_share" in record]
    assert [(row["workload"], row["rate"]) for row in rows] == [("60/8", 5), ("60/8", 10), ("40/4", 5)]
    assert all(row["judged"] and row["good_share"]["60000ms"] == 1 for row in rows)
    assert any(row["transferred_bytes"] for row in rows)


def test_what_a_tier_costs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    offload_gpu.main(
        ["--cpu", "--model", DEMO, "--capacity", "32MiB", "--kv-capacity", "32MiB", "--batched-tokens", "256"]
        + ["--batch", "2", "--context", "40", "--steps", "8", "--rounds", "1", "--prompt", "400", "--hits", "1"]
        + ["--requests", "3", "--miss-input", "40", "--miss-output", "4", "--pairs", "1"]
    )
    found = printed(capsys)
    assert not [record for record in found if "error" in record]
    by_company = {record["company"]: record for record in found if record.get("bench") == "offload-decode"}
    assert by_company["alone"]["load_gb_per_s"] == by_company["alone"]["store_gb_per_s"] == 0
    assert all(record["bad_blocks"] == 0 for record in by_company.values())
    (hit,) = [record for record in found if record.get("bench") == "offload-hit"]
    assert len(hit["loaded_tokens"]) == 1  # none of them on a machine that is too busy
    assert hit["same_first_tokens"] == 1
    (misses,) = [record for record in found if record.get("bench") == "offload-misses"]
    assert misses["stored_blocks"] > 0
