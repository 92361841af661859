"""Placements of experts: how long they take to find, how even they are, what moves; greedy packing in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..eplb.balance import balancedness, least_fullest, num_moved, rank_loads
from ..eplb.placement import Placement, Topology, plan
from .eplb_greedy import greedy_plan
from .machine import describe
from .summary import percentile

_Floats = NDArray[np.float64]
_R = TypeVar("_R")
Kind = Literal["zipf", "spiky", "uniform"]

_KINDS: tuple[Kind, ...] = ("zipf", "spiky", "uniform")
_DRIFT = 0.2
_EPOCHS = 6


class Case(NamedTuple):
    """A model on ranks."""

    num_layers: int
    num_logical: int
    topology: Topology
    solve_ms: tuple[float, float] | None = None
    """What planning must take at most, and what it should."""

    @property
    def name(self) -> str:
        """ "58×256→288 on 8", and groups if there are nodes."""
        topology = self.topology
        nodes = f", {topology.num_groups} groups, {topology.num_nodes} nodes" if topology.num_nodes > 1 else ""
        return f"{self.num_layers}×{self.num_logical}→{topology.num_physical} on {topology.num_ranks}{nodes}"


CASES = (
    Case(58, 256, Topology(288, 8), (10, 4)),
    Case(58, 256, Topology(288, 144), (12, 6)),
    Case(48, 128, Topology(160, 8), (5, 2)),
    Case(26, 64, Topology(72, 8), (2, 1)),
    Case(58, 256, Topology(288, 32, 4, 8)),
    Case(58, 256, Topology(320, 64)),
)
"""DeepSeek-V3 on one host, on its decode unit of 18, and elsewhere; Qwen3-30B-A3B; DeepSeek-V2-Lite."""


def made_up(rng: np.random.Generator, kind: Kind, num_layers: int, num_logical: int, exponent: float = 0.0) -> _Floats:
    """[layers, logical] tokens.

    Args:
        rng: where chance comes from.
        kind: "zipf": by a power law, shuffled in each layer; "spiky": gamma, and a few experts with 5 to 30 % of the
            mean layer more; "uniform": Poisson.
        num_layers: layers.
        num_logical: experts.
        exponent: of the power law; 0 takes one of 0.4 … 1.2.
    """
    shape = (num_layers, num_logical)
    if kind == "uniform":
        return rng.poisson(rng.uniform(100, 10_000), shape).astype(np.float64)
    if kind == "spiky":
        load = rng.gamma(1.0, 1.0, shape)
        for layer in load:
            layer[rng.integers(num_logical, size=rng.integers(1, 5))] += rng.uniform(0.05, 0.3) * num_logical
        return np.round(1000 * load)
    ranks = np.arange(1, num_logical + 1) ** -(exponent or rng.uniform(0.4, 1.2))
    shuffled = rng.permuted(np.broadcast_to(ranks, shape), axis=-1)
    return np.round(1e5 * shuffled * rng.gamma(5.0, 0.2, shape))


def drifted(rng: np.random.Generator, load: _Floats, sigma: float) -> _Floats:
    """The load later: every expert's by another factor, log-normal."""
    return load * np.exp(rng.normal(0.0, sigma, load.shape))


def records(num_loads: int, repeats: int, seed: int, cases: Sequence[Case] = CASES) -> Iterator[dict[str, Any]]:
    """The header, a row on time for each case that has a limit, one on evenness for each case, and one on moves.

    Args:
        num_loads: random loads over all cases, for evenness.
        repeats: plans of each case, for times.
        seed: of all loads.
        cases: which.
    """
    yield {
        "bench": "eplb", "seed": seed, "loads": num_loads, "repeats": repeats, "drift_sigma": _DRIFT,
        "baseline": "greedy packing, layers at once in numpy", "machine": describe(),
    }  # fmt: skip
    for case in cases:
        if case.solve_ms is not None:
            yield _times(case, repeats, np.random.default_rng(seed))
    gaps = [_evenness(case, -(-num_loads // len(cases)), np.random.default_rng(seed + 1)) for case in cases]
    yield from gaps
    ours, greedy = (float(np.mean([row[side]["gap"] for row in gaps])) for side in ("ours", "greedy"))
    yield {
        "kind": "evenness", "case": "all", "loads": sum(row["loads"] for row in gaps),
        "below_greedy": sum(row["below_greedy"] for row in gaps),
        "gap_share_of_greedy": round(ours / greedy, 4), "must": 0.5, "aim": 0.25,
        "enough": ours <= 0.5 * greedy and not any(row["below_greedy"] for row in gaps),
    }  # fmt: skip
    for case in cases:
        yield _moves(case, np.random.default_rng(seed + 2))


def _times(case: Case, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """Both in turns, on loads that neither has seen; CPU time leaves out what other processes took."""
    topology = case.topology
    plan(made_up(rng, "zipf", 1, case.num_logical, 0.8), topology)  # compiles
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "greedy": []}
    even: dict[str, list[float]] = {"ours": [], "greedy": [], "bound": []}
    for _ in range(repeats):
        load = made_up(rng, "zipf", case.num_layers, case.num_logical, 0.8)
        placed = _timed(lambda load=load: plan(load, topology), times["ours"])  # type: ignore[misc]
        slots = _timed(lambda load=load: greedy_plan(load, topology), times["greedy"])  # type: ignore[misc]
        even["ours"].append(_even(load, placed, topology))
        even["greedy"].append(_even(load, Placement.from_physical(slots, case.num_logical), topology))
        even["bound"].append(load.sum() / topology.num_ranks / least_fullest(load, topology).sum())
    row: dict[str, Any] = {"kind": "solve", "case": case.name, "load": "zipf 0.8"}
    for side, taken in times.items():
        wall, cpu = zip(*taken, strict=True)
        row[side] = {
            **{f"p{p}_ms": round(1e3 * percentile(wall, p), 3) for p in (50, 90, 99)},
            **{f"cpu_p{p}_ms": round(1e3 * percentile(cpu, p), 3) for p in (50, 90, 99)},
            "balancedness": round(float(np.mean(even[side])), 6),
        }
    assert case.solve_ms is not None
    row["bound"] = round(float(np.mean(even["bound"])), 6)
    row["must_ms"], row["aim_ms"] = case.solve_ms
    row["enough"] = row["ours"]["cpu_p50_ms"] <= row["must_ms"]
    return row


def _timed(run: Callable[[], _R], times: list[tuple[float, float]]) -> _R:
    wall, cpu = time.perf_counter(), time.thread_time()
    result = run()
    times.append((time.perf_counter() - wall, time.thread_time() - cpu))
    return result


def _evenness(case: Case, num_loads: int, rng: np.random.Generator) -> dict[str, Any]:
    """Gaps to the bound, one layer a load; a load counts as below greedy if its balancedness is."""
    topology = case.topology
    found = []
    for number in range(num_loads):
        load = made_up(rng, _KINDS[number % len(_KINDS)], 1, case.num_logical)
        greedy = Placement.from_physical(greedy_plan(load, topology), case.num_logical)
        most = load.sum() / topology.num_ranks / least_fullest(load, topology).sum()
        found.append((_even(load, plan(load, topology), topology), _even(load, greedy, topology), most))
    ours, other, most = np.array(found).T
    row: dict[str, Any] = {"kind": "evenness", "case": case.name, "loads": num_loads}
    for side, values in (("ours", ours), ("greedy", other)):
        row[side] = {
            "gap": round(float((most - values).mean()), 7),
            "gap_max": round(float((most - values).max()), 6),
            "balancedness": round(float(values.mean()), 6),
        }
    row["bound"] = round(float(most.mean()), 6)
    row["below_greedy"] = int((ours < other - 1e-9).sum())
    return row


def _moves(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """What moves, epoch by epoch, if the placement is to be as even as greedy packing of the new load is."""
    topology = case.topology
    load = made_up(rng, "zipf", case.num_layers, case.num_logical, 0.8)
    current = plan(load, topology)
    found = []
    for _ in range(_EPOCHS):
        load = drifted(rng, load, _DRIFT)
        greedy = Placement.from_physical(greedy_plan(load, topology), case.num_logical)
        policy: Literal["global", "hierarchical"] = "hierarchical" if topology.num_nodes > 1 else "global"
        anew = plan(load, topology, current, policy)
        wanted = min(1.0, _even(load, greedy, topology) / _even(load, anew, topology))
        times: list[tuple[float, float]] = []
        moved = _timed(lambda load=load, wanted=wanted: plan(load, topology, current, wanted=wanted), times)  # type: ignore[misc] # noqa: B023
        usual = plan(load, topology, current)
        found.append([
            _even(load, current, topology), _even(load, greedy, topology), _even(load, moved, topology),
            _even(load, anew, topology), _even(load, usual, topology),
            *(num_moved(current, placement, topology)[0] for placement in (greedy, moved, anew, usual)),
            1e3 * times[0][1],
        ])  # fmt: skip
        current = moved
    means = np.mean(found, axis=0)
    before, even_greedy, even_moved, even_anew, even_usual = (round(float(value), 6) for value in means[:5])
    moved_greedy, moved_few, moved_anew, moved_usual = (float(value) for value in means[5:9])
    return {
        "kind": "moves", "case": case.name, "epochs": _EPOCHS, "before": before,
        "greedy": {"balancedness": even_greedy, "moved": round(moved_greedy, 1)},
        "as_even_as_greedy": {"balancedness": even_moved, "moved": round(moved_few, 1), "cpu_ms": round(means[9], 2)},
        "anew": {"balancedness": even_anew, "moved": round(moved_anew, 1)},
        "wanted_99": {"balancedness": even_usual, "moved": round(moved_usual, 1)},
        "moved_share_of_greedy": round(moved_few / moved_greedy, 4),
        "wanted_99_share_of_anew": round(moved_usual / moved_anew, 4),
        "must": 0.4, "aim": 0.2, "enough": moved_few <= 0.4 * moved_greedy,
    }  # fmt: skip


def _even(load: _Floats, placement: Placement, topology: Topology) -> float:
    return balancedness(rank_loads(load, placement, topology))
