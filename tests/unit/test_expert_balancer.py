"""Ranks that count, plan and move experts: those of one process, each step of which is one boundary on all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from support.expert_threads import CPU, NUM_LAYERS, TENSORS, LocalExchange, fill, make_inproc
from support.patience import stretched
from tandem.core.clock import SystemClock
from tandem.core.config import load_config
from tandem.core.config_experts import BalanceConfig, ExpertsConfig
from tandem.core.errors import CapacityError, ConfigError, WorkerError
from tandem.core.metrics import ExpertMetrics
from tandem.engine.expert_balancer import Balancer, compare_placements, first_placement
from tandem.eplb.learned import Learned
from tandem.eplb.load_file import RecordedLoad, write_load
from tandem.eplb.maps import ExpertMaps
from tandem.eplb.placement import Placement, Topology, plan
from tandem.eplb.store import ExpertLayout, ExpertStore

NUM_EXPERTS = 6
SKEWED = np.array([5, 5, 90, 60, 5, 5])
"""Those that are not there twice at first."""


class Group:
    """Two ranks with four slots each; every step gives experts the tokens of `load`, evenly over their slots."""

    def __init__(self, **config: Any) -> None:
        shared: list[dict[str, Any]] = []
        self.kept: list[bytes] = []
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                shared.append({"parts": [b""] * 2, "barrier": threading.Barrier(2)})
            settings = BalanceConfig(**{"window_steps": 8, "exchange_steps": 1, "checksums": True} | config)
            experts = ExpertsConfig(redundant=2, balance=settings)
            placement, topology = first_placement(NUM_LAYERS, NUM_EXPERTS, 2, experts, 1)
            self.stores = [ExpertStore(ExpertLayout(TENSORS, NUM_LAYERS, 4), CPU) for _ in range(2)]
            self.maps = [ExpertMaps(placement, topology, rank, CPU) for rank in range(2)]
            self.loads = [torch.zeros(NUM_LAYERS, 4, dtype=torch.int64) for _ in range(2)]
            self.metrics = [ExpertMetrics(CollectorRegistry()) for _ in range(2)]
            for rank in range(2):
                for layer, tensors in enumerate(self.stores[rank].live):
                    for slot, expert in enumerate(self.maps[rank].held(layer)):
                        fill(tensors, slot, layer, expert)

            def make(rank: int) -> Balancer:
                exchanges = LocalExchange(rank, 2, shared[0]), LocalExchange(rank, 2, shared[1])
                return Balancer(
                    self.loads[rank], self.stores[rank], self.maps[rank], topology, exchanges, make_inproc, settings,
                    "tiny", self.metrics[rank], SystemClock(), keep=self.kept.append,
                )  # fmt: skip

            self.ranks = list(pool.map(make, range(2)))

    @property
    def placement(self) -> Placement:
        assert (
            self.maps[0].placement.physical_to_logical.tolist() == self.maps[1].placement.physical_to_logical.tolist()
        )
        return self.maps[0].placement

    def step(self, load: np.ndarray | None = None) -> None:
        """One boundary, and a step; empty without a load."""
        for rank in self.ranks:
            rank.boundary(load is not None)
        if load is not None:
            for rank, loads in enumerate(self.loads):
                slots = self.placement.physical_to_logical[:, 4 * rank : 4 * rank + 4]
                shares = load / self.placement.replica_count
                loads += torch.from_numpy(np.take_along_axis(shares, slots, 1).astype(np.int64))

    def until(self, condition: Callable[[], object], load: np.ndarray | None = None) -> None:
        deadline_s = time.monotonic() + stretched(60)
        while not condition():
            assert time.monotonic() < deadline_s, self.report()
            self.step(load)
            time.sleep(0.001)
        self.check()

    def report(self) -> Any:
        return self.ranks[0].report()

    def check(self) -> None:
        """Every slot holds what the maps say, to the bit."""
        for rank, store in enumerate(self.stores):
            right = ExpertStore(store.layout, CPU)
            for layer, tensors in enumerate(store.live):
                for slot, expert in enumerate(self.maps[rank].held(layer)):
                    fill(right.live[layer], slot, layer, expert)
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, right.live[layer][name]), f"rank {rank}, layer {layer}: {name}"
            right.close()

    def count(self, outcome: str) -> float:
        return self.metrics[1].registry.get_sample_value("tandem_expert_rebalances_total", {"outcome": outcome}) or 0

    def close(self) -> None:
        for rank, store in zip(self.ranks, self.stores, strict=True):
            rank.close()
            store.close()


@pytest.fixture
def group() -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(**config: Any) -> Group:
        made.append(Group(**config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_they_move_when_an_interval_is_over(group: Callable[..., Group]) -> None:
    ranks = group(when="interval", interval_steps=20)
    first = ranks.placement
    ranks.until(lambda: ranks.report().attempts.get("done"), SKEWED)
    report = ranks.report()
    assert ranks.placement.physical_to_logical.tolist() != first.physical_to_logical.tolist()
    assert report.moved > 0
    assert report.moved_bytes == report.total_bytes == report.moved * ranks.stores[0].layout.expert_bytes
    assert ranks.count("done") == 1
    ranks.until(lambda: ranks.report().window_steps > 0 and ranks.report().balancedness > 0.9, SKEWED)
    assert ranks.report().predicted > 0.9
    value = ranks.metrics[0].registry.get_sample_value("tandem_expert_balancedness", {"when": "now"})
    assert value == ranks.report().balancedness
    # As even as can be: the next intervals have nothing to move.
    ranks.until(lambda: ranks.report().attempts.get("declined"), SKEWED)
    assert ranks.report().detail == "nothing would move"


def test_what_does_not_pay_is_declined(group: Callable[..., Group]) -> None:
    ranks = group(when="gain", interval_steps=8, min_gain=0.9)
    ranks.until(lambda: ranks.report().attempts.get("declined"), SKEWED)
    assert "less full, less than 90.00%" in ranks.report().detail or "that moving costs" in ranks.report().detail
    assert ranks.report().moved == 0
    assert ranks.report().state == "watching"


def test_seconds_instead_of_steps(group: Callable[..., Group]) -> None:
    ranks = group(when="interval", interval_s=0.05)
    ranks.until(lambda: ranks.report().attempts.get("done"), SKEWED)


def test_it_is_demanded_and_goes_on_in_empty_steps(group: Callable[..., Group]) -> None:
    ranks = group(when="manual")
    assert ranks.ranks[1].report() is None
    with pytest.raises(CapacityError, match="the first worker"):
        ranks.ranks[1].demand()
    answer = ranks.ranks[0].demand()
    ranks.until(answer.done)
    assert answer.result() == "declined: no load has been counted yet"
    ranks.until(lambda: ranks.report().window_steps >= 8, SKEWED)
    assert ranks.report().attempts == {"declined": 1}
    answer = ranks.ranks[0].demand()
    ranks.until(answer.done)  # nobody has work
    assert answer.result().startswith("done: ")
    assert ranks.report().window_steps >= 4, "empty steps push nothing out of the window"
    answer = ranks.ranks[0].demand()
    ranks.until(answer.done)
    assert answer.result() == "declined: nothing would move"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_is_told_and_tried_again(rank: int, group: Callable[..., Group]) -> None:
    ranks = group(when="interval", interval_steps=16)
    stager = ranks.ranks[rank]._migrator._stager
    stage = stager.stage

    def struck(*arguments: Any) -> Any:
        stager.stage = stage  # type: ignore[method-assign]
        raise RuntimeError("as told")

    stager.stage = struck  # type: ignore[method-assign]
    first = ranks.placement
    ranks.until(lambda: ranks.report().attempts.get("exception"), SKEWED)
    assert ranks.placement.physical_to_logical.tolist() == first.physical_to_logical.tolist()
    assert f"rank {rank}, layer 0" in ranks.report().detail
    assert ranks.count("exception") == 1
    ranks.until(lambda: ranks.report().attempts.get("done"), SKEWED)


def test_a_planner_that_fails_is_told_and_tried_again(
    group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = group(when="interval", interval_steps=16)

    def struck(*arguments: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("as told")

    monkeypatch.setattr("tandem.engine.expert_planner.plan", struck)
    ranks.until(lambda: ranks.report().attempts.get("exception"), SKEWED)
    assert ranks.report().detail == "RuntimeError: as told"
    ranks.until(lambda: ranks.report().attempts.get("done"), SKEWED)


def test_loads_are_recorded_over_changes_of_the_placement(group: Callable[..., Group]) -> None:
    """All tokens of each expert, wherever it was; of the last look on, they are not told yet."""
    ranks = group(when="interval", interval_steps=10)
    load = np.array([8, 8, 96, 64, 8, 8])
    ranks.until(lambda: ranks.report().attempts.get("done") and ranks.ranks[0].entries(0).last >= 30, load)
    entries, last = [], 0
    while True:
        got = ranks.ranks[0].entries(last)
        if not got.entries:
            break
        entries += got.entries
        last = entries[-1].number
    assert (got.num_layers, got.num_experts, got.model) == (NUM_LAYERS, NUM_EXPERTS, "tiny")
    assert [entry.number for entry in entries] == list(range(1, last + 1))
    steps = sum(entry.steps for entry in entries)
    tokens = sum(np.frombuffer(entry.tokens, "<i8").reshape(NUM_LAYERS, -1) for entry in entries)
    assert tokens.tolist() == [(steps * load).tolist()] * NUM_LAYERS


def test_a_rank_that_is_gone_ends_the_attempt(group: Callable[..., Group]) -> None:
    ranks = group(when="manual")
    ranks.until(lambda: ranks.report().window_steps >= 8, SKEWED)
    answer = ranks.ranks[0].demand()
    ranks.until(lambda: ranks.ranks[0]._migrator.active)

    def go_on() -> None:
        for _ in range(100):
            ranks.ranks[0].boundary(True)

    with pytest.raises(WorkerError):
        go_on()
    ranks.ranks[0].close()
    assert answer.cancelled() or answer.result().startswith("peer_lost")
    ranks.check()


# ---- the first placement --------------------------------------------------------------------------------------------


def test_a_recorded_load_places_experts_before_they_are_filled(tmp_path: Path) -> None:
    path = tmp_path / "load"
    write_load(path, RecordedLoad("tiny", np.array([10]), np.tile(SKEWED, (1, NUM_LAYERS, 1))))
    config = ExpertsConfig(redundant=2, balance=BalanceConfig(load_file=str(path)))
    warm, topology = first_placement(NUM_LAYERS, NUM_EXPERTS, 2, config, 1)
    assert warm.replica_count[0].tolist() == [1, 1, 2, 2, 1, 1]
    other = first_placement(NUM_LAYERS, NUM_EXPERTS, 2, ExpertsConfig(redundant=2), 1)[0]
    with pytest.raises(ConfigError, match=r"experts\.balance\.load_file: .* of 2 layers with 6 experts each"):
        first_placement(NUM_LAYERS + 1, NUM_EXPERTS, 2, config, 1)
    shared = {"parts": [b""] * 2, "barrier": threading.Barrier(2)}
    rows = np.array(other.physical_to_logical)
    rows[0, :2] = rows[0, 1::-1]
    placements = other, Placement.from_physical(rows, NUM_EXPERTS)

    def compare(rank: int) -> str:
        try:
            compare_placements(LocalExchange(rank, 2, shared), placements[rank])
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        assert all("rank 1 places experts otherwise" in said for said in pool.map(compare, range(2)))
    assert topology.num_ranks == 2


def test_a_group_goes_on_where_the_one_before_was() -> None:
    config = ExpertsConfig(redundant=2)
    rng = np.random.default_rng(0)
    load = rng.integers(1, 1000, (NUM_LAYERS, NUM_EXPERTS)).astype(np.float64)
    initial, topology = first_placement(NUM_LAYERS, NUM_EXPERTS, 2, config, 1)
    committed = plan(SKEWED * np.ones((NUM_LAYERS, 1)), topology)
    learned = Learned.of(committed, topology, load).pack()

    def begun(layers: int, experts: int, ranks: int, config: ExpertsConfig, learned: bytes) -> list[list[int]]:
        rows: list[list[int]] = first_placement(layers, experts, ranks, config, 1, learned)[
            0
        ].physical_to_logical.tolist()
        return rows

    same = NUM_LAYERS, NUM_EXPERTS, 2
    assert begun(*same, config, learned) == committed.physical_to_logical.tolist()
    # Other slots, or other ranks: by the load.
    for slots, ranks in ((12, 2), (8, 4)):
        other = plan(load, Topology(slots, ranks)).physical_to_logical.tolist()
        assert begun(NUM_LAYERS, NUM_EXPERTS, ranks, ExpertsConfig(redundant=slots - NUM_EXPERTS), learned) == other
    # Where experts stay, or what was learned is of no use, as the first group did.
    first = initial.physical_to_logical.tolist()
    assert begun(*same, ExpertsConfig(redundant=2, balance=BalanceConfig(enabled=False)), learned) == first
    broken = msgspec.structs.replace(Learned.unpack(learned), slots=bytes(4 * 8 * NUM_LAYERS)).pack()
    short = msgspec.structs.replace(Learned.unpack(learned), slots=b"1234").pack()
    assert [begun(*same, config, bad) for bad in (b"", b"no", learned[:-1], broken, short)] == [first] * 5
    assert len(begun(NUM_LAYERS + 1, NUM_EXPERTS, 2, config, learned)) == NUM_LAYERS + 1


def test_what_moved_is_kept(group: Callable[..., Group]) -> None:
    ranks = group(when="interval", interval_steps=20)
    ranks.until(lambda: ranks.report().attempts.get("done") and ranks.report().state == "watching", SKEWED)
    learned = Learned.unpack(ranks.kept[-1])
    topology = Topology(8, 2)
    assert learned.placement(NUM_LAYERS, NUM_EXPERTS, topology).physical_to_logical.tolist() == (
        ranks.placement.physical_to_logical.tolist()
    )
    # Its load is what was counted: the experts that were asked for the most are there twice.
    assert learned.placement(NUM_LAYERS, NUM_EXPERTS, Topology(8, 4)).replica_count[:, 2:4].tolist() == [[2, 2]] * 2


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experts.balance.intervall_s=3", "unknown key experts.balance.intervall_s"),
        ("experts.balance.min_gain=1", "experts.balance.min_gain"),
        ("experts.balance.interval_steps=0", "experts.balance.interval_steps"),
        ("experts.balance={interval_steps: 5, interval_s: 5}", "interval_s: interval_steps is given too"),
        ("experts.balance.when=often", "experts.balance.when"),
        ("experts.balance.enabled=perhaps", "experts.balance.enabled"),
    ],
)
def test_impossible_values(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"experts\.balance") as caught:
        load_config(None, [override])
    assert said in str(caught.value)


def test_it_is_on_where_experts_are_redundant() -> None:
    for given, on in (("redundant=0", False), ("redundant=2", True), ("balance.enabled=true", True)):
        config = load_config(None, [f"experts.{given}"])
        assert config.experts.balanced is on
        assert type(config).model_validate_json(config.model_dump_json()) == config
    assert not load_config(None, ["experts={redundant: 2, balance: {enabled: false}}"]).experts.balanced
