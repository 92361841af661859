"""The benchmark of placements on a few loads, and the picture of a recorded one."""

from __future__ import annotations

from pathlib import Path

from tandem.bench.eplb import CASES, Case, records
from tandem.bench.expert_serving import Shape, serving_records, shape_of
from tandem.cluster.cli.app import app
from tandem.eplb.placement import Topology
from typer.testing import CliRunner


def test_a_row_for_each_case() -> None:
    cases = [case for case in CASES if case.num_logical == 64] + [Case(4, 64, Topology(96, 16, 2, 8))]
    header, *rows = records(40, 1, 0, cases)
    assert header["machine"]["versions"]["numba"]
    assert [(row["kind"], row["case"]) for row in rows] == [
        ("solve", cases[0].name),
        *(("evenness", name) for name in (cases[0].name, cases[1].name, "all")),
        *(("moves", case.name) for case in cases),
    ]
    for row in rows:
        if row["kind"] == "solve":
            assert row["greedy"]["balancedness"] <= row["ours"]["balancedness"] <= row["bound"]
            assert 0 < row["ours"]["cpu_p50_ms"] <= row["ours"]["cpu_p99_ms"]
        if row["kind"] == "moves":
            assert row["enough"]
            assert row["as_even_as_greedy"]["balancedness"] >= row["greedy"]["balancedness"] - 1e-4
    [every] = [row for row in rows if row["case"] == "all"]
    assert every["below_greedy"] == 0
    assert every["enough"]


def test_a_recorded_load_is_drawn(tmp_path: Path) -> None:
    load, picture = tmp_path / "load.jsonl", tmp_path / "load.png"
    made = CliRunner().invoke(app, ["experts", "synth", str(load), "--layers", "3", "--experts", "16"])
    assert made.exit_code == 0, made.output
    command = ["experts", "plot", str(load), "--ranks", "4", "--output", str(picture)]
    drawn = CliRunner().invoke(app, [*command, "--slots", "24"])
    assert drawn.exit_code == 0, drawn.output
    assert "less full" in drawn.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, [*command, "--slots", "25"])
    assert "num_physical is 25, which num_ranks = 4 does not divide" in str(wrong.exception)


def test_ranks_that_serve() -> None:
    """Two processes; what they find depends on the machine, that they agree does not."""
    shape = Shape(num_layers=2, num_experts=8, num_redundant=2, hidden=32, inner=32, num_tokens=8)
    [record] = serving_records(shape, 1, 10, 0)
    assert record["balancedness"][1] > record["balancedness"][0]
    assert record["moving_steps"] >= 2
    assert min(record["tokens_per_s"]) > 0
    assert set(record["moving_itl_ms"]) == {"p50", "p99", "max"}
    assert shape_of("cpu", 3).num_redundant == 5
