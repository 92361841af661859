"""Loads of experts: windows, files, and where a rank's tokens go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.core.errors import ConfigError, PlacementError
from tandem.eplb.dispatch_map import dispatch_map
from tandem.eplb.load_file import RecordedLoad, read_load, warm_up_placement, write_load
from tandem.eplb.placement import Placement, Topology, initial_placement, plan
from tandem.eplb.window import LoadWindow, to_logical


def test_a_window_is_the_last_steps_whatever_moved_meanwhile() -> None:
    rng, topology = np.random.default_rng(0), Topology(12, 4)
    window, seen = LoadWindow(3, 2, 8), []
    for step in range(7):
        placement = plan(rng.random((2, 8)), topology)
        counts = rng.integers(0, 100, (2, 12) if step % 2 else (4, 2, 12))
        window.add(counts, placement)
        by_hand = np.zeros((2, 8))
        for layer, slot in np.ndindex(2, 12):
            by_hand[layer, placement.physical_to_logical[layer, slot]] += counts.reshape(-1, 2, 12)[
                :, layer, slot
            ].sum()
        seen.append(by_hand)
        assert np.array_equal(window.load(), sum(seen[-3:]))
        assert (window.num_entries, window.full) == (min(step + 1, 3), step >= 2)
    window.clear()
    assert not window.load().any()
    with pytest.raises(PlacementError, match=r"\(2, 11\)"):
        window.add(np.ones((2, 11), dtype=int), placement)
    with pytest.raises(PlacementError, match="experts"):
        window.add(np.ones((2, 12), dtype=int), initial_placement(2, 9, topology))
    # Sums of 32-bit counters are wider than those.
    many = np.full((4, 2, 12), 2**31 - 1, dtype=np.int32)
    assert to_logical(many, placement).sum() == 4 * 24 * (2**31 - 1)


def test_a_load_that_is_written_is_read(tmp_path: Path) -> None:
    path, rng = tmp_path / "load.jsonl", np.random.default_rng(0)
    tokens = rng.integers(0, 1 << 40, (3, 2, 8))
    write_load(path, RecordedLoad("some/model", np.array([10, 20, 30]), tokens))
    read = read_load(path)
    assert (read.model, read.steps.tolist()) == ("some/model", [10, 20, 30])
    assert np.array_equal(read.tokens, tokens)
    assert np.array_equal(read.load(slice(1, None)), tokens[1] + tokens[2])
    topology = Topology(12, 4)
    warm = warm_up_placement(path, 2, 8, topology)
    assert np.array_equal(warm.physical_to_logical, plan(tokens.sum(0), topology).physical_to_logical)
    with pytest.raises(ConfigError, match="2 layers with 8 experts each, expected 2 with 9"):
        warm_up_placement(path, 2, 9, topology)


HEAD = '{"num_layers":1,"num_logical":2,"format":"tandem-expert-load-1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: "),
        (HEAD, "no load in it"),
        (HEAD.replace("load-1", "load-2"), ":1: .*load-2"),
        (HEAD.replace('"num_layers":1', '"num_layers":1000000'), r":1: .*num_layers"),
        (HEAD + '{"steps":1,"tokens":[[1,2]]}\n{"steps":1,"tokens":[[1]]}\n', ":3: `tokens` is not of 1 layers with 2"),
        (HEAD + '{"steps":1,"tokens":[[1,-2]]}\n', r":2: .*tokens"),
        (HEAD + '{"steps":1,"tokens":[[1,1e400]]}\n', ":2: "),
        (HEAD + '{"steps":0,"tokens":[[1,2]]}\n', r":2: .*steps"),
        (HEAD + '{"steps":1,"tokens":[[1,2]],"more":1}\n', ":2: .*more"),
        (HEAD + "\x80\n", ":2: "),
    ],
)
def test_what_is_no_load_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        read_load(path)


def test_a_load_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_load(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_load(tmp_path / "no" / "folder", RecordedLoad("", np.ones(1), np.ones((1, 1, 1), dtype=int)))


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.integers(1, 3), per_node=st.integers(1, 4), size=st.integers(1, 4), spare=st.integers(0, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_go_to_the_nearest_replicas(nodes: int, per_node: int, size: int, spare: int, seed: int) -> None:
    ranks = nodes * per_node
    num_logical = max(1, ranks * size - spare)
    topology = Topology(ranks * size, ranks, nodes)
    placement = plan(np.random.default_rng(seed).gamma(0.3, 1.0, (2, num_logical)), topology, policy="global")
    maps = [dispatch_map(placement, topology, rank) for rank in range(ranks)]
    for rank, layer, expert in np.ndindex(ranks, 2, num_logical):
        count = maps[rank].num_choices[layer, expert]
        chosen = maps[rank].choices[layer, expert]
        assert (chosen[:count] >= 0).all()
        assert (chosen[count:] == -1).all()
        replicas = np.flatnonzero(placement.physical_to_logical[layer] == expert)
        local = replicas[replicas // size == rank]
        near = replicas[replicas // size // per_node == rank // per_node]
        if len(local):
            assert chosen[:count].tolist() == local.tolist()
        elif len(near):
            assert chosen[:count].tolist() == near.tolist()
        else:
            assert count
            assert set(chosen[:count]) <= set(replicas)
    if nodes == 1:
        shares = sum(entry.shares(topology.num_physical) for entry in maps) / ranks
        counts = np.take_along_axis(placement.replica_count, placement.physical_to_logical, -1)
        assert shares == pytest.approx(1 / counts)


def test_far_nodes_go_where_least_goes() -> None:
    """Expert 0 is twice in node 0 and once in node 1: node 2 takes those that have half as much each, node 3 all."""
    topology = Topology(8, 8, 4)
    placement = Placement.from_physical(np.array([[0, 0, 0, 1, 2, 3, 4, 5]]), 6)
    assert [dispatch_map(placement, topology, rank).choices[0, 0].tolist() for rank in (0, 3, 4, 5, 6)] == [
        [0, -1, -1], [2, -1, -1], [0, 1, -1], [0, 1, -1], [0, 1, 2],
    ]  # fmt: skip
    with pytest.raises(PlacementError, match="no rank 8"):
        dispatch_map(placement, topology, 8)


def test_tokens_take_turns() -> None:
    placement = Placement.from_physical(np.array([[0, 1, 0, 2]]), 3)
    mapped = dispatch_map(placement, Topology(4, 4), 1)
    experts = np.array([[0, 1], [0, 2], [2, 0], [1, 0]])
    assert mapped.pick(0, experts, np.arange(4)).tolist() == [[0, 1], [2, 3], [3, 0], [1, 2]]
