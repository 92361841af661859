"""What the benchmarks of KV between GPUs do without a GPU: whole handoffs between two processes, plans, and the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tandem.bench.kv_copies import CASES, percentiles, scattered
from tandem.bench.kv_gpu import table
from tandem.bench.kv_handoff import handoff_records

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo-model"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranges_lie_apart_and_inside(case: tuple[str, int, str, str]) -> None:
    total, room = 4 << 20, 8 << 20
    runs = scattered(case, total, room, np.random.default_rng(0))  # type: ignore[arg-type]
    landed = case[1] * {"bfloat16": 2, "fp8_e4m3": 1, "float16": 2, "": 1}[case[3]]
    landed //= {"bfloat16": 2, "fp8_e4m3": 1, "": 1}[case[2]]
    for offsets, size in ((np.sort(runs.source_offsets), case[1]), (runs.target_offsets, landed)):
        assert (np.diff(offsets) >= size).all()
        assert offsets[0] >= 0
        assert offsets[-1] + size <= room
    assert len(runs.sizes) * max(case[1], landed) == total


def test_handoffs_are_measured() -> None:
    found = list(handoff_records(DEMO, [], [30, 100], 2, 2))
    assert [record["tokens"] for record in found] == [30, 100]
    for record in found:
        assert record["bytes"] > 0
        assert record["prefill_ms"]["p50"] > 0
        assert record["first_token_ms"]["n"] == 2
    lines = table(found)
    assert len(lines) == 2
    assert lines[1].startswith("handoff of   100 tokens, 2 groups: first token ")


def test_the_table_has_a_line_a_record() -> None:
    figures = percentiles([1.0, 2.0, 3.0])
    assert figures == {"p50": 2.0, "p90": 2.8, "p99": 2.98, "n": 3}
    copy = {
        "bench": "kv-copy", "case": "4 KiB", "plain_gb_per_s": 390.0, "kernel_gb_per_s": 330.0, "pull_gb_per_s": 320.0,
        "best_gb_per_s": 340.0, "best_plan": "16 x 16 warps x 64 KiB", "correct": False,
    }  # fmt: skip
    decode = {
        "bench": "kv-decode", "batch": 64, "context": 1024, "programs": 16, "alone_ms": figures,
        "while_pulling_ms": figures, "slower": 0.01, "pulled_gb_per_s": 300.0,
    }  # fmt: skip
    latency = {"bench": "kv-pull-latency", "bytes": 65536, "us": figures}
    lines = table([copy, latency, decode, {"bench": "kv-handoff", "skipped": "two workers need two GPUs"}])
    assert "WRONG BYTES" in lines[0]
    assert lines[1:] == [
        "read of     64 KiB: 2 us, p99 3",
        "decode 64 x 1024, 16 programs: alone 2.00 ms (p99 2.98), while 300 GB/s arrive 2.00 ms (p99 2.98): +1.0%",
        "kv-handoff: skipped: two workers need two GPUs",
    ]
