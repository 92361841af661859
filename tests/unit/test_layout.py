"""Lists of byte ranges, and groups of layers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tandem.kernels import copy_runs
from tandem.kv_transfer.layout import Runs, coalesce, group_layers, layer_groups
from tandem.kv_transfer.transports.base import check_runs
from tandem.kv_transfer.transports.pieces import split_runs

ranges = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 40)), max_size=12)


@given(ranges, st.integers(1, 64))
def test_joining_and_cutting_change_nothing(pieces: list[tuple[int, int]], frame: int) -> None:
    sizes = np.array([size for _, size in pieces], np.int64)
    sources = np.array([source for source, _ in pieces], np.int64)
    targets = np.cumsum(sizes) - sizes
    order = np.random.default_rng(1).permutation(len(pieces))
    runs = coalesce(sources[order], targets[order], sizes[order])
    memory = np.arange(600, dtype=np.uint64).view(np.uint8)[:600].copy()
    expected = np.concatenate([memory[s : s + n] for s, n in pieces] or [np.empty(0, np.uint8)])
    joined = np.zeros(len(expected), np.uint8)
    copy_runs.native(memory, joined, *runs)
    np.testing.assert_array_equal(joined, expected)
    cut = np.zeros(len(expected), np.uint8)
    for part in split_runs(runs, frame):
        assert part.num_bytes <= frame
        copy_runs.native(memory, cut, *part)
    np.testing.assert_array_equal(cut, expected)


def test_bad_runs_are_refused_whatever_their_values() -> None:
    huge = np.array([2**63 - 1], np.int64)
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    good = Runs(zero, zero, 16 * one)
    assert check_runs(good, 16, 16) == ""
    for bad in (
        good._replace(source_offsets=huge),
        good._replace(target_offsets=huge),
        good._replace(sizes=huge),
        good._replace(source_offsets=huge, sizes=huge),
        good._replace(sizes=zero),
        good._replace(sizes=-one),
        good._replace(source_offsets=-one),
        good._replace(target_offsets=-one),
        good._replace(source_offsets=one),
    ):
        assert check_runs(bad, 16, 16) != ""


@given(st.integers(1, 100), st.integers(1, 20))
def test_layer_groups_cover_all_layers(num_layers: int, num_groups: int) -> None:
    starts = layer_groups(num_layers, num_groups)
    sizes = np.diff([*starts, num_layers])
    assert starts[0] == 0
    assert sizes.sum() == num_layers
    assert sizes.max() - sizes.min() <= 1
    assert sizes.min() >= 1


@given(st.lists(st.sampled_from([0, 128, 4096]), min_size=1, max_size=40))
def test_kv_groups_hold_each_layer_once_and_see_equally_far(windows: list[int]) -> None:
    groups = group_layers(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    for group in groups:
        assert list(group.layers) == sorted(group.layers)
        assert {windows[layer] for layer in group.layers} == {group.window}
    if len(set(windows)) == 1:
        assert len(groups) == 1
