"""What the benchmarks of KV between GPUs do without a GPU: whole handoffs between two processes, plans, and the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tandem.bench import kv_decode
from tandem.bench.kv_copies import CASES, percentiles, scattered
from tandem.bench.kv_gpu import table
from tandem.bench.kv_handoff import handoff_records
from tandem.kernels import on_gpu
from tandem.kv_transfer.transports import Region
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport

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


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's memory takes a GPU's part."""
    from support import gpu_memory, host_as_gpu

    if not on_gpu.AVAILABLE:
        pytest.skip("Triton is not installed")
    gpu_memory.prepare()
    monkeypatch.setattr(kv_decode, "CopyQueue", host_as_gpu.CopyQueue)
    yield
    gpu_memory.undo()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host takes a GPU's part")
def test_every_way_to_copy_takes_turns_with_steps(on_the_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import host_as_gpu
    from support.gpu_memory import SeenBuffer

    loads = [kv_decode.Load("paced", 64 << 10, 2), kv_decode.Load("full", 128 << 10, 2)]
    decoding = kv_decode.Decoding(DEMO, 2, 16, 80, loads, torch.device("cpu"), "4MiB")
    decoding.engine.cache.blocks = host_as_gpu.adopt(decoding.engine.cache.blocks)  # type: ignore[arg-type]
    transport = CudaIpcTransport(lambda: None, 0, 1)
    source = SeenBuffer(1 << 20)
    transport.register(Region("blocks", source))
    owner = SimpleNamespace(num_bytes=1 << 20, descriptor=transport.descriptor())
    tried = kv_decode.ways([2])[:2]
    found = list(kv_decode.sweep_records(owner, decoding, tried, loads, 2))  # type: ignore[arg-type]
    decoding.close()
    transport.close()
    assert [(record["way"], record["load"]) for record in found] == [
        (way.name, load.name) for way in tried for load in loads
    ]
    for record in found:
        assert record["idle_gb_per_s"] > 0
        assert record["pulled_gb_per_s"] >= 0, "none may end while a few steps of a small model are computed"
        assert record["alone_ms"]["n"] == record["while_pulling_ms"]["n"] == 2 * 12
    lines = table(found)
    assert len(lines) == len(found) + 3
    assert lines[-1] == "none reaches 340 GB/s when idle"


def test_a_slower_copy_does_not_look_cheaper() -> None:
    """Two ways that cost steps as much for each byte, one of them moves half as many; and the choice among all."""

    def record(way: str, slower: float, rate: float, idle: float) -> dict[str, Any]:
        told = {"bench": "kv-sweep", "way": way, "load": "full", "idle_gb_per_s": idle, "slower": slower}
        alone, beside = ({"p50": ms, "p99": ms} for ms in (8.0, 8.0 * (1 + slower)))
        return told | {"alone_ms": alone, "while_pulling_ms": beside, "pulled_gb_per_s": rate}

    fast, half = record("fast", 0.10, 200.0, 350.0), record("half", 0.05, 100.0 * 1.1 / 1.05, 350.0)
    assert kv_decode.lost_per_gb(fast) == pytest.approx(kv_decode.lost_per_gb(half))
    gentle = record("gentle", 0.02, 200.0, 100.0)
    assert table([fast, gentle])[-2:] == [
        "beside steps, full: least is lost to gentle (+2.0%)",
        "of those that reach 340 GB/s when idle: fast (+10.0%)",
    ]
    assert kv_decode.lost_per_gb(record("none", 0.0, 0.0, 0.0)) == float("inf")


def test_the_ways_have_names_of_their_own() -> None:
    found = kv_decode.ways([4, 16])
    assert len({way.name for way in found}) == len({way.plans for way in found}) == len(found)
    assert {way.plans.priority for way in found} == {-1, 0}
    assert any(way.plans.engines_from for way in found)
