"""The transports' benchmark on a megabyte: what a row says, and that nothing is measured that did not arrive."""

from __future__ import annotations

import importlib.util

import pytest
from tandem.bench.kv import CASES, Case, Load, records

_NEEDS = {"nixl": "nixl_cu13", "ucx": "ucxx"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.ucx) if case.transport == "ucx" else case for case in CASES],
    ids=lambda case: f"{case.transport}-{case.security}",
)
def test_a_row_for_each_transport(case: Case) -> None:
    header, row = records([case], [16 << 10], 1 << 20, 2)
    assert header["machine"]["versions"]["python"]
    needs = _NEEDS.get(case.transport)
    if needs is not None and importlib.util.find_spec(needs) is None:
        assert "not installed" in row["skipped"]
        pytest.skip(row["skipped"])
    assert (row["transport"], row["security"], row["device"]) == (case.transport, case.security, "cpu")
    assert row["pulled_mib"] == 0.25
    assert row["enough"] == (row["ours"]["gb_per_s"] / row["bare"]["gb_per_s"] >= case.wanted)
    for side in ("ours", "bare"):
        assert 0 < row[side]["p10_ms"] <= row[side]["p50_ms"] <= row[side]["p90_ms"]


def test_a_load_moves_each_block_once() -> None:
    runs = Load(1 << 20, 16 << 10, 1).runs()
    assert runs.num_bytes == 1 << 18
    assert len(set(runs.target_offsets.tolist())) == len(runs.sizes)
