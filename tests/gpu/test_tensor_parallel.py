"""Ranks on GPUs of one host: sums through peers' memory and NCCL, and models that they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import adding, sharded
from support.ranks import run_ranks

GPUS = torch.cuda.device_count()
SIZES = [size for size in (2, 4) if size <= GPUS] or [2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices are here, and ranks need two"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    sharded.make_checkpoints(folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_all_reduce(size: int, tmp_path: Path, seed: int) -> None:
    """The reference's bits, always, eager and in graphs; who is gone is missed; and how long it takes."""
    table = run_ranks(size, adding.on_gpus, f"file://{tmp_path / 'rendezvous'}", seed, timeout_s=240)[0]
    print(f"{size} x {torch.cuda.get_device_name()}: time of one sum, of 50 in a graph")
    print("  KiB   peers' memory   NCCL")
    for kib, ours, library in table:
        print(f"{kib:5} {ours:12.1f} us {library:7.1f} us")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direct", [False, True], ids=["nccl", "direct"])
def test_ranks_say_what_one_says(size: int, direct: bool, folder: Path) -> None:
    """As in tests/parity, and a recorded step: the same tokens, logits to 1e-5, and the same bits on all ranks."""
    found = run_ranks(size, sharded.on_gpus, folder, direct, timeout_s=240)
    for family in sharded.FAMILIES:
        print(f"{family}: {found[0][family][1]:.1e}")
        assert found[0][family][1] < 1e-5, family
        assert len({rank[family][0] for rank in found}) == 1, f"{family}: the ranks differ"
