"""Ranges that a GPU copies and converts, against the reference: odd sizes and places, poisoned targets, any plan.

On a GPU the kernel runs as it is; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tandem.kernels import gather, on_gpu

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 is not a GPU's, and it rounds to float8 wrongly.
DTYPES = ["float32", "float16", *(["bfloat16", "fp8_e4m3"] if CUDA else [])]
SMALL = gather.Plan(programs=3, warps=4, tile_bytes=8 << 10)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def scatter(rng: np.random.Generator, sizes: np.ndarray, unit: int, factor: float = 1.0) -> tuple[np.ndarray, int]:
    """Places for ranges of these sizes times ``factor``, in any order, with gaps of whole units; and their end."""
    taken = (sizes * factor).astype(np.int64)
    order = rng.permutation(len(sizes))
    gaps = rng.integers(0, 4, len(sizes)) * unit
    ends = np.cumsum(taken[order] + gaps)
    offsets = np.empty_like(ends)
    offsets[order] = ends - taken[order]
    return offsets, int(ends[-1]) + 64


def check(
    source: torch.Tensor, target: torch.Tensor, runs: tuple[np.ndarray, ...], dtypes: tuple[str, str], plan: gather.Plan
) -> None:
    """The kernel's target is the reference's, where something is copied and where nothing is."""
    want, got = target.clone(), target.clone()
    gather.reference(source, want, *runs, *dtypes)
    rows = gather.lay_out(*runs, *dtypes)
    lists = torch.from_numpy(rows.lists).to(DEVICE)
    assert source.data_ptr() % 16 == got.data_ptr() % 16 == 0
    gather.fused(source.data_ptr(), got.data_ptr(), rows, lists, plan)
    differs = (got != want).nonzero()
    assert not len(differs), f"{len(differs)} bytes, the first at {int(differs[0])}"


def random_bytes(rng: np.random.Generator, size: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)).to(DEVICE)


@pytest.mark.parametrize("plan", [SMALL, gather.Plan()], ids=["small", "default"])
@pytest.mark.parametrize(
    ("unit", "counts"),
    [
        (4096, [1] * 7),  # rows of ranges that are a row each
        (4096, [16, 4, 64, 4, 16]),
        (512, [1, 3, 9, 2]),
        (16, [1, 700, 33, 5]),  # cut, with 16 bytes at a time
        (8, [1, 5, 1, 1300]),  # cut, byte by byte
        (1, [1, 4097, 4096, 3, 8191]),
        (1 << 20, [1]),  # one range for all programs
    ],
)
def test_bytes(rng: np.random.Generator, unit: int, counts: list[int], plan: gather.Plan) -> None:
    sizes = np.array(counts, np.int64) * unit
    taken, source_end = scatter(rng, sizes, unit)
    given, target_end = scatter(rng, sizes, unit)
    target = torch.full((target_end,), 7, dtype=torch.uint8, device=DEVICE)
    check(random_bytes(rng, source_end), target, (taken, given, sizes), ("", ""), plan)


def test_many_ranges_of_random_sizes(rng: np.random.Generator) -> None:
    for unit in (1, 8, 16, 48, 512, 640, 2048):
        sizes = rng.integers(1, max(2, 9000 // unit), 40) * unit
        taken, source_end = scatter(rng, sizes, unit)
        given, target_end = scatter(rng, sizes, unit)
        target = torch.full((target_end,), 7, dtype=torch.uint8, device=DEVICE)
        check(random_bytes(rng, source_end), target, (taken, given, sizes), ("", ""), SMALL)


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize(
    ("unit", "counts"), [(4096, [1, 4, 1]), (512, [3, 8, 1]), (48, [1, 3, 200]), (4, [1, 2000, 7])]
)
def test_conversions(
    rng: np.random.Generator, source_dtype: str, target_dtype: str, unit: int, counts: list[int]
) -> None:
    """Every pair of types; numbers beyond what the target holds, infinities and NaN among them."""
    if "fp8_e4m3" in (source_dtype, target_dtype) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    sizes = np.array(counts, np.int64) * unit
    before, after = gather.DTYPES[source_dtype].itemsize, gather.DTYPES[target_dtype].itemsize
    taken, source_end = scatter(rng, sizes, 16)
    given, target_end = scatter(rng, sizes, 16, after / before)
    wide = torch.from_numpy(rng.standard_normal(-(-source_end // 16) * 16 // before) * 10.0 ** rng.integers(-9, 6))
    source = wide.to(DEVICE).to(gather.DTYPES[source_dtype])
    if source_dtype != "fp8_e4m3":
        source[::97], source[5::97], source[11::97] = torch.inf, -torch.inf, torch.nan
    target = torch.full((-(-target_end // 16) * 16,), 7, dtype=torch.uint8, device=DEVICE)
    want, got = target.clone(), target.clone()
    runs = taken, given, sizes
    flat = source.view(torch.uint8)
    gather.reference(flat, want, *runs, source_dtype, target_dtype)
    rows = gather.lay_out(*runs, source_dtype, target_dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter computes with numpy, which says so
        gather.fused(flat.data_ptr(), got.data_ptr(), rows, torch.from_numpy(rows.lists).to(DEVICE), SMALL)
    # A NaN has many spellings: numbers are compared where something was copied, bytes elsewhere.
    for t, n in zip(given.tolist(), (sizes // before * after).tolist(), strict=True):
        ours, theirs = (x[t : t + n].clone().view(gather.DTYPES[target_dtype]).float() for x in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        if target_dtype == "fp8_e4m3":
            assert theirs.nan_to_num().abs().max() <= 448
        got[t : t + n] = want[t : t + n] = 0
    assert got.equal(want), "another place was written"


def test_nothing_to_copy() -> None:
    none = np.empty(0, np.int64)
    rows = gather.lay_out(none, none, none)
    gather.fused(0, 0, rows, torch.from_numpy(rows.lists).to(DEVICE))


def test_ranges_are_cut_into_equal_rows_where_that_takes_few_pieces() -> None:
    """4 KiB rows for what is made of them, 512 bytes for the rest; else pieces of at most 4 KiB that know their size."""
    sizes = np.array([16384, 65536], np.int64)
    rows = gather.lay_out(sizes * 0, np.array([0, 16384]), sizes)
    assert (rows.parts, rows.width, rows.source_dtype, rows.lists.shape) == (4, 512, "words", (2, 5))
    rows = gather.lay_out(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([1 << 30]))
    assert (rows.parts, rows.lists.shape) == (1 << 18, (2, 1))
    rows = gather.lay_out(np.array([0, 1 << 31]), np.array([0, 1 << 31]), np.array([1 << 30, 512]))
    assert (rows.parts, rows.lists.shape) == (1, (3, (1 << 18) + 1))
    assert rows.lists[2].sum() * 8 == (1 << 30) + 512
    rows = gather.lay_out(np.array([0]), np.array([0]), np.array([8192]), "bfloat16", "fp8_e4m3")
    assert (rows.parts, rows.width, rows.lists.shape) == (2, 2048, (2, 1))
