"""Sums of KV: the same for the same elements, wherever they lie; others for others."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tandem.kernels import element_sums
from tandem.kernels.convert_runs import DTYPES, convert
from tandem.kv_transfer.checksums import Checksums, Held, unit_of
from tandem.kv_transfer.layout import KVLayout, group_layers

NUM_BLOCKS = 32
TOKENS = 24
HEADS = 2


def cache_of(kv: torch.Tensor, windows: list[int], block_tokens: int, dtype: str, seed: int) -> tuple[Checksums, list]:  # type: ignore[type-arg]
    """A cache that holds ``kv``, [layer, part, head, token, dim], in random blocks, and noise elsewhere; and tables."""
    groups = group_layers(windows)
    layout = KVLayout(max(len(g.layers) for g in groups), HEADS, kv.shape[-1], block_tokens, dtype, kv.shape[1])
    noise = np.random.default_rng(seed)
    memory = noise.integers(0, 60, 3 * NUM_BLOCKS * layout.block_bytes, np.uint8)
    blocks = torch.from_numpy(memory).view(DTYPES[dtype]).view(layout.shape(3 * NUM_BLOCKS))
    free = noise.permutation(3 * NUM_BLOCKS).tolist()
    tables = [[free.pop() for _ in range(-(-TOKENS // block_tokens))] for _ in groups]
    for group, table in zip(groups, tables, strict=True):
        for place, layer in enumerate(group.layers):
            for token in range(TOKENS):
                at = table[token // block_tokens], place, slice(None), slice(None), token % block_tokens
                blocks[at] = convert(kv[layer, :, :, token], DTYPES[dtype])
    return Checksums([Held(range(HEADS), memory)], layout, HEADS, groups), tables


def sums_of(checksums: Checksums, *where: object) -> np.ndarray:
    """[units], over all heads."""
    return checksums.total(checksums.start(*where, copies=False, behind_steps=False).result())  # type: ignore[arg-type]


@given(
    st.lists(st.sampled_from([0, 0, 7]), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sampled_from(sorted(DTYPES)),
    st.data(),
)
def test_sums_do_not_depend_on_where_elements_lie(
    windows: list[int], dim: int, dtype: str, data: st.DataObject
) -> None:
    num_parts = data.draw(st.integers(1, 2))
    kv = torch.randn(len(windows), num_parts, HEADS, TOKENS, dim, generator=torch.Generator().manual_seed(dim))
    kv = convert(kv, DTYPES[dtype]).float()
    sizes = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    dtypes = [dtype, data.draw(st.sampled_from(["float32", dtype]))]  # either holds these numbers exactly
    ends = [cache_of(kv, windows, size, name, i) for i, (size, name) in enumerate(zip(sizes, dtypes, strict=True))]
    unit = unit_of(*sizes)
    first = data.draw(st.integers(0, TOKENS - 1))
    tokens = range(data.draw(st.integers(first, TOKENS - 1)), TOKENS)
    layer = data.draw(st.integers(0, len(windows) - 1))
    layers = range(layer, data.draw(st.integers(layer + 1, len(windows))))
    firsts = [max(first, group.first_needed(TOKENS)) for group in group_layers(windows)]
    got = [sums_of(sums, tables, layers, tokens, firsts, unit, dtype) for sums, tables in ends]
    np.testing.assert_array_equal(got[0], got[1])
    assert len(got[0]) == -(-TOKENS // unit) - tokens.start // unit
    # In parts, they add up.
    middle = data.draw(st.integers(tokens.start, TOKENS))
    whole = np.zeros_like(got[0])
    for part in (range(tokens.start, middle), range(middle, TOKENS)):
        if len(part):
            some = sums_of(*ends[1], layers, part, firsts, unit, dtype)
            start = part.start // unit - tokens.start // unit
            whole[start : start + len(some)] += some
    np.testing.assert_array_equal(whole, got[0])


@pytest.mark.parametrize("row_bytes", [8, 16, 24, 12, 10, 2, 5])
@pytest.mark.parametrize(("block_tokens", "unit"), [(4, 4), (3, 6), (4, 6)])
def test_compiled_sums_are_the_reference(row_bytes: int, block_tokens: int, unit: int) -> None:
    places, planes = 3, np.array([1, 2, 5, 6])
    rng = np.random.default_rng(row_bytes)
    cache = rng.integers(0, 256, 8 * places * len(planes) * block_tokens * row_bytes, np.uint8)
    blocks = rng.permutation(8)[:4].astype(np.int64)
    positions = np.arange(4) * block_tokens + 6 // block_tokens * block_tokens
    starts = np.maximum(positions, 7)
    stops = np.minimum(positions + block_tokens, positions[-1] + 1)
    layers = np.array([5, 9], np.int64)
    got = []
    for version in (element_sums.reference, element_sums.native):
        sums = np.full(8, 3, np.uint64)
        version(cache, sums, blocks, starts, stops, layers, 1, places, planes, 9, block_tokens, row_bytes, unit, 1)
        got.append(sums)
    np.testing.assert_array_equal(got[0], got[1])
    assert (got[0] != 3).sum() >= 2


@given(st.integers(0, 2**32))
def test_a_change_anywhere_is_another_sum(seed: int) -> None:
    """A bit, two bits that are the same, two rows that changed places."""
    rng = np.random.default_rng(seed)
    layout = KVLayout(2, 2, 8, 4, "float16")
    memory = rng.integers(0, 256, 6 * layout.block_bytes, np.uint8)
    sums = Checksums([Held(range(2), memory)], layout, 2, group_layers([0, 0]))

    def value() -> list[int]:
        return sums_of(sums, [[4, 1, 3]], range(2), range(12), [0], 4, "float16").tolist()

    good = value()
    block = int(rng.integers(3))
    start = [4, 1, 3][block] * layout.block_bytes
    mine = memory[start : start + layout.block_bytes]
    at, other = rng.choice(layout.block_bytes, 2, replace=False)
    bit = np.uint8(1 << rng.integers(8))
    for places in ([at], [at, other]):
        mine[places] ^= bit
        assert [i for i in range(3) if value()[i] != good[i]] == [block]
        mine[places] ^= bit
    rows = mine.reshape(-1, 16)
    a, b = rng.choice(len(rows), 2, replace=False)
    rows[[a, b]] = rows[[b, a]]
    assert value() != good


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from([2, 4, 8]))
def test_ranks_sum_to_what_one_sums(seed: int, num_ranks: int, num_parts: int, block_tokens: int) -> None:
    """Ranks that hold some of the heads each, or the heads of others, too; and what differs in one of those is found."""
    rng, num_heads, num_blocks = np.random.default_rng(seed), 4, 6
    layout = KVLayout(3, num_heads, 4, block_tokens, "float16", num_parts)
    whole = rng.integers(0, 256, num_blocks * layout.block_bytes, np.uint8)
    by_head = whole.reshape(num_blocks, 3, num_parts, num_heads, -1)
    per_rank = max(num_heads // num_ranks, 1)
    firsts = [rank * num_heads // num_ranks // per_rank * per_rank for rank in range(num_ranks)]
    ranks = [
        Held(range(first, first + per_rank), by_head[:, :, :, first : first + per_rank].copy().reshape(-1))
        for first in firsts
    ]
    groups = group_layers([0, 0, 0])
    where = [[5, 0, 3]], range(1, 3), range(1, 3 * block_tokens - 1), [1], 2 * block_tokens, "float16"
    want = sums_of(Checksums([Held(range(num_heads), whole)], layout, num_heads, groups), *where)
    part = msgspec.structs.replace(layout, num_kv_heads=per_rank)
    sums = Checksums(ranks, part, num_heads, groups)
    np.testing.assert_array_equal(sums_of(sums, *where), want)
    found = sums.start(*where, copies=True, behind_steps=False).result()
    assert sums.right(found, want).all()
    assert not sums.right(found, want + np.uint64(1)).any()
    memory = ranks[-1].memory
    assert isinstance(memory, np.ndarray)
    memory[3 * part.block_bytes + part.layer_bytes] ^= 1
    found = sums.start(*where, copies=True, behind_steps=False).result()
    assert sums.right(found, want).tolist() == [True, False]
