"""Copy plans against copying element by element."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tandem.kernels import copy_runs
from tandem.kv_transfer.layout import KVLayout, coalesce, group_layers, layer_groups, plan_copies
from tandem.kv_transfer.transports.base import check_runs
from tandem.kv_transfer.transports.pieces import split_runs

layouts = st.builds(
    KVLayout,
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 5).map(lambda n: 2 * n),
    block_tokens=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "fp8_e4m3"]),
)


@given(layouts, st.data())
def test_a_plan_moves_what_an_index_by_index_copy_moves(layout: KVLayout, data: st.DataObject) -> None:
    num_blocks = 6
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6, unique_by=lambda p: p[1]))
    first = data.draw(st.integers(0, layout.num_layers - 1))
    count = data.draw(st.integers(1, layout.num_layers - first))
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, num_blocks * layout.block_bytes, dtype=np.uint8)
    target = rng.integers(0, 255, num_blocks * layout.block_bytes, dtype=np.uint8)
    expected = target.copy()
    itemsize = layout.block_bytes // int(np.prod(layout.shape(1)))
    shape = (*layout.shape(num_blocks), itemsize)
    for s, t in pairs:
        for layer in range(first, first + count):
            expected.reshape(shape)[t, layer] = source.reshape(shape)[s, layer]
    blocks = np.array(pairs, np.int64).reshape(-1, 2)
    runs = plan_copies(layout, first, count, blocks[:, 0], blocks[:, 1])
    assert check_runs(runs, len(source), len(target)) == ""
    for copy in (copy_runs.reference, copy_runs.native):
        moved = target.copy()
        copy(source, moved, *runs)
        np.testing.assert_array_equal(moved, expected)
    assert runs.num_bytes == len(pairs) * count * layout.layer_bytes


def test_neighbours_are_joined() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=2, dtype="float32")
    blocks = np.arange(10)
    assert len(plan_copies(layout, 0, 2, blocks, blocks + 3).sizes) == 1
    assert len(plan_copies(layout, 0, 1, blocks, blocks + 3).sizes) == 10
    assert len(plan_copies(layout, 0, 2, blocks[::-1], blocks).sizes) == 10


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
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=1, dtype="float32")
    good = plan_copies(layout, 0, 1, zero, zero)
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
