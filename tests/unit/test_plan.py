"""Copy plans between unequal caches, against copying one element after another."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tandem.kernels import convert_runs, copy_runs
from tandem.kernels.convert_runs import DTYPES
from tandem.kv_transfer.layout import DTYPE_BYTES, KVLayout, Runs
from tandem.kv_transfer.plan import Side, cover_heads, merge, plan_copies
from tandem.kv_transfer.transports.base import check_runs

NUM_BLOCKS = 40
DTYPE_NAMES = sorted(DTYPES)


class Case:
    """Two caches of one model, and what is to be copied."""

    def __init__(self, draw: st.DrawFn) -> None:
        total_heads = draw(st.integers(1, 4))
        self.num_parts = draw(st.integers(1, 2))
        self.sides = []
        first_token = draw(st.integers(0, 12))
        self.tokens = range(first_token, first_token + draw(st.integers(0, 14)))
        num_places, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)) * 2
        equal = draw(st.booleans())
        block_tokens = draw(st.integers(1, 6))
        dtype = draw(st.sampled_from(DTYPE_NAMES))
        for _ in range(2):
            first = 0 if equal else draw(st.integers(0, total_heads - 1))
            count = total_heads if equal else draw(st.integers(1, total_heads - first))
            if not equal and draw(st.booleans()):
                block_tokens = draw(st.integers(1, 6))
            if not equal:
                dtype = draw(st.sampled_from(DTYPE_NAMES))
            layout = KVLayout(num_places, count, head_dim, block_tokens, dtype, self.num_parts)
            before = draw(st.integers(0, self.tokens.start // block_tokens)) * block_tokens
            needed = -(-self.tokens.stop // block_tokens) - before // block_tokens
            blocks = np.array(draw(st.permutations(range(NUM_BLOCKS)))[: needed + draw(st.integers(0, 2))], np.int64)
            self.sides.append(Side(layout, first, before, blocks))
        self.source, self.target = self.sides
        first = max(side.first_head for side in self.sides)
        last = min(side.first_head + side.layout.num_kv_heads for side in self.sides)
        self.heads = range(first, max(first, last))
        place = draw(st.integers(0, num_places - 1))
        self.places = range(place, place + draw(st.integers(1, num_places - place)))

    def plan(self) -> Runs:
        return plan_copies(self.source, self.target, self.heads, self.places, self.tokens)

    def slowly(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy element by element."""
        for place in self.places:
            for kind in range(self.num_parts):
                for head in self.heads:
                    for token in self.tokens:
                        for dim in range(self.source.layout.head_dim):
                            at = [
                                (
                                    int(side.blocks[(token - side.first_token) // side.layout.block_tokens]),
                                    place, kind, head - side.first_head, token % side.layout.block_tokens, dim,
                                )
                                for side in self.sides
                            ]  # fmt: skip
                            value = source[at[0]].reshape(1)
                            target[at[1]] = convert_runs.convert(value, target.dtype)[0]


cases = st.composite(Case)()


def cache(side: Side, seed: int) -> torch.Tensor:
    """Finite numbers of a side's dtype, some beyond what fp8 can hold."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(side.layout.shape(NUM_BLOCKS), generator=generator) * 300
    return convert_runs.convert(values, DTYPES[side.layout.dtype])


def memory(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy().reshape(-1)


@given(cases)
def test_a_plan_moves_what_an_element_by_element_copy_moves(case: Case) -> None:
    source, target = cache(case.source, 0), cache(case.target, 1)
    expected = target.clone()
    case.slowly(source, expected)
    runs = case.plan()
    ours, theirs = case.source.layout, case.target.layout
    ratio = DTYPE_BYTES[theirs.dtype], DTYPE_BYTES[ours.dtype]
    at_target = runs._replace(sizes=runs.sizes * ratio[0] // ratio[1])
    assert check_runs(at_target, 1 << 40, len(memory(target))) == ""
    assert check_runs(runs, len(memory(source)), 1 << 40) == ""
    assert (np.diff(runs.target_offsets) > 0).all()
    elements = len(case.places) * case.num_parts * len(case.heads) * len(case.tokens) * ours.head_dim
    assert runs.num_bytes == elements * DTYPE_BYTES[ours.dtype]
    for convert in (convert_runs.reference, convert_runs.native):
        moved = target.clone()
        convert(memory(source), memory(moved), *runs, ours.dtype, theirs.dtype)
        np.testing.assert_array_equal(memory(moved), memory(expected))
    if ours.dtype == theirs.dtype:
        for copy in (copy_runs.reference, copy_runs.native):
            moved = target.clone()
            copy(memory(source), memory(moved), *runs)
            np.testing.assert_array_equal(memory(moved), memory(expected))


@given(cases, st.data())
def test_parts_of_a_copy_are_the_copy(case: Case, data: st.DataObject) -> None:
    """Cutting tokens, heads or places in two, and merging the plans, changes nothing."""
    cut: dict[str, Any] = {}
    for name in ("tokens", "heads", "places"):
        whole: range = getattr(case, name)
        middle = data.draw(st.integers(whole.start, whole.stop))
        cut[name] = (range(whole.start, middle), range(middle, whole.stop))
    ours, theirs = case.source.layout.dtype, case.target.layout.dtype
    parts = [
        plan_copies(case.source, case.target, heads, places, tokens)
        for heads in cut["heads"]
        for places in cut["places"]
        for tokens in cut["tokens"]
    ]
    source, target = cache(case.source, 0), cache(case.target, 1)
    moved = [memory(target.clone()) for _ in range(2)]
    for runs, where in ((case.plan(), moved[0]), (merge(parts, (DTYPE_BYTES[ours], DTYPE_BYTES[theirs])), moved[1])):
        convert_runs.native(memory(source), where, *runs, ours, theirs)
    np.testing.assert_array_equal(*moved)


def side(layout: KVLayout, blocks: np.ndarray, first_token: int = 0, first_head: int = 0) -> Side:
    return Side(layout, first_head, first_token, blocks.astype(np.int64))


LAYOUT = KVLayout(num_layers=2, num_kv_heads=4, head_dim=4, block_tokens=2, dtype="float32")


def num_runs(source: Side, target: Side, *, places: range = range(2), heads: range = range(4), tokens: int = 20) -> int:
    return len(plan_copies(source, target, heads, places, range(tokens)).sizes)


def test_equal_ends_need_few_runs() -> None:
    blocks = np.arange(10)
    here = side(LAYOUT, blocks)
    assert num_runs(here, side(LAYOUT, blocks + 3)) == 1
    assert num_runs(here, side(LAYOUT, blocks + 3), places=range(1)) == 10
    assert num_runs(side(LAYOUT, blocks[::-1]), here) == 10
    # Another dtype changes how many bytes a run has, not how many runs there are.
    assert num_runs(here, side(msgspec.structs.replace(LAYOUT, dtype="fp8_e4m3"), blocks + 3)) == 1
    # Other heads: one run for each layer's keys and one for its values.
    half = msgspec.structs.replace(LAYOUT, num_kv_heads=2)
    assert num_runs(here, side(half, blocks, first_head=2), heads=range(2, 4)) == 10 * 2 * 2


def test_what_an_end_lacks_is_an_error_not_a_wrong_range() -> None:
    good = side(LAYOUT, np.arange(4))
    for bad, what in (
        (side(LAYOUT, np.array([0, -1, 2, 3])), "no block for token 2"),
        (side(LAYOUT, np.arange(3)), "3 blocks"),
        (side(LAYOUT, np.arange(4), first_token=2), "from token 2"),
        (side(LAYOUT, np.arange(4), first_head=1), "head"),
        (side(msgspec.structs.replace(LAYOUT, num_layers=1), np.arange(4)), "places"),
    ):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=what):
                plan_copies(*pair, range(4), range(2), range(8))


@given(st.integers(1, 16), st.integers(1, 32), st.integers(1, 32), st.integers(0, 31))
def test_every_head_is_read_from_one_rank(num_heads: int, ours: int, theirs: int, rank: int) -> None:
    """Heads are dealt out evenly; where there are fewer than ranks, several ranks hold one."""

    def heads_of(rank: int, ranks: int) -> range:
        if ranks >= num_heads:
            return range(rank * num_heads // ranks, rank * num_heads // ranks + 1)
        return range(num_heads * rank // ranks, num_heads * (rank + 1) // ranks)

    wanted = heads_of(rank % ours, ours)
    offered = [heads_of(r, theirs) for r in range(theirs)]
    cover = cover_heads(wanted, offered, rank)
    assert [head for _, heads in cover for head in heads] == list(wanted)
    for peer_rank, heads in cover:
        assert set(heads) <= set(offered[peer_rank])
    assert len({peer_rank for peer_rank, _ in cover}) == len(cover)


def test_readers_of_the_same_head_spread_over_its_holders() -> None:
    offered = [range(0, 1), range(0, 1), range(1, 2), range(1, 2)]
    assert [cover_heads(range(0, 1), offered, rank) for rank in range(3)] == [
        [(0, range(0, 1))], [(1, range(0, 1))], [(0, range(0, 1))],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no rank holds head 2"):
        cover_heads(range(0, 3), offered)


@pytest.mark.parametrize("source", DTYPE_NAMES)
@pytest.mark.parametrize("target", DTYPE_NAMES)
def test_conversion_rounds_saturates_and_keeps_nan(source: str, target: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 447.0, 500.0, -6e4, 0.1, 2**-9, float("nan")])
    stored = convert_runs.convert(values, DTYPES[source])
    moved = np.zeros(len(values) * DTYPES[target].itemsize, np.uint8)
    zero, size = np.zeros(1, np.int64), np.array([stored.nbytes], np.int64)
    convert_runs.native(memory(stored), moved, zero, zero, size, source, target)
    got = torch.from_numpy(moved).view(DTYPES[target]).float()
    want = stored.float()
    if target == "fp8_e4m3" != source:
        want = want.clamp(-448, 448)
    assert got[-1].isnan()
    torch.testing.assert_close(got[:-1], want[:-1], rtol=0.07, atol=2**-10)
