"""Floors, gaps and rows of `tandem bench engine`; the baseline of `tandem bench serve`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from support.served import TANDEM
from tandem.bench.floor import Ceilings, decode_s, measure, prefill_s
from tandem.bench.kernels import MODELS
from tandem.bench.serve import Load, TransformersArm
from tandem.bench.step_profile import _union, profile_steps
from tandem.bench.summary import Slo
from tandem.bench.workload import Job
from tandem.core.config import Config
from tandem.engine.models.spec import parse_spec

H100 = Ceilings(bytes_per_s=3.02e12, flops=774e12)
DENSE = parse_spec(MODELS["qwen3-8b"], {})
MIXTURE = parse_spec(MODELS["qwen3-30b-a3b"], {})


@pytest.mark.parametrize(
    ("batch", "context", "dense_ms", "mixture_ms"),
    [(1, 1024, 5.1, 2.0), (8, 1024, 5.4, 8.8), (32, 1024, 6.7, 18.7), (128, 1024, 11.8, 24.5), (256, 512, 12.2, 24.8)],
)
def test_decode_floors(batch: int, context: int, dense_ms: float, mixture_ms: float) -> None:
    """As others have computed them for this card, at the middle of 128 steps."""
    assert decode_s(DENSE, batch, context + 64, 2, H100) * 1e3 == pytest.approx(dense_ms, rel=0.05)
    assert decode_s(MIXTURE, batch, context + 64, 2, H100) * 1e3 == pytest.approx(mixture_ms, rel=0.06)


@pytest.mark.parametrize(
    ("batch", "context", "dense", "mixture"),
    [(1, 8192, 47e3, 84e3), (8, 4096, 51e3, 102e3), (32, 1024, 54e3, 121e3)],
)
def test_prefill_floors(batch: int, context: int, dense: float, mixture: float) -> None:
    for spec, want in ((DENSE, dense), (MIXTURE, mixture)):
        assert batch * context / prefill_s(spec, batch, context, H100) == pytest.approx(want, rel=0.1)
    assert prefill_s(DENSE, 1, 512, H100.of(4)) * 4 == pytest.approx(prefill_s(DENSE, 1, 512, H100))


def test_a_window_bounds_what_is_read() -> None:
    spec = parse_spec(
        MODELS["qwen3-8b"] | {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}, {}
    )
    assert decode_s(spec, 64, 4096, 2, H100) == decode_s(spec, 64, 256, 2, H100)
    assert prefill_s(spec, 1, 4096, H100) < prefill_s(DENSE, 1, 4096, H100)


def test_ceilings_of_this_machine() -> None:
    found = measure(torch.device("cpu"), torch.float32)
    assert found.bytes_per_s > 1e8
    assert found.flops > 1e8


def test_gaps() -> None:
    assert _union([]) == (0.0, 0.0, [])
    assert _union([(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (8.0, 8.5), (10.0, 11.0)]) == (8.0, 11.0, [2.0, 1.0])


def test_a_profile_names_what_ran(tmp_path: Path) -> None:
    a = torch.randn(64, 64)

    def run() -> None:
        for _ in range(3):
            a @ a

    found = profile_steps(run, 3, torch.device("cpu"), tmp_path / "trace.json.gz")
    assert {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}["aten::mm"] == 1
    assert 0 < found["busy_ms"] <= found["span_ms"]
    assert (tmp_path / "trace.json.gz").stat().st_size > 100


def test_rows_that_do_not_fit_say_so(tmp_path: Path) -> None:
    settings = ["model.max_model_len=256", "pools={colocated: {threads: 1}}", "kv.capacity=64MiB"]
    command = [TANDEM, "bench", "engine", "--out", str(tmp_path), *(part for s in settings for part in ("--set", s))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    header, started, ceilings, *rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert header["bench"] == "engine"
    assert started["process_to_first_token_s"] > 0
    assert ceilings["copy_gb_per_s"] > 0
    assert [row["kind"] for row in rows].count("decode") == 5
    assert all("the model has 256" in row["skipped"] for row in rows)
    [written] = tmp_path.glob("engine-*.jsonl")
    assert len(written.read_text().splitlines()) == 3 + len(rows)


def test_the_transformers_baseline_runs() -> None:
    arm = TransformersArm(Config(), threads=1)
    try:
        jobs = [Job(0.0, [1, 2, 3 + index], 4) for index in range(2)]
        found = arm.run(Load(jobs, 2, Slo(1.0, 1.0)), lambda *_: None)
        assert found["output_tokens_per_s"] > 0
    finally:
        arm.close()
