"""Ranks on GPUs of one host that have different experts say what one with all of them says, over NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.ranks import run_ranks
from support.sharded_experts import FAMILIES, check, share

GPUS = torch.cuda.device_count()
SIZES = [size for size in (2, 4) if size <= GPUS] or [2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices are here, and ranks need two"),
]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_say_what_one_says(size: int, tmp_path: Path) -> None:
    """As in tests/parity, by Triton's kernels in both forms."""
    for family, changes in FAMILIES.items():
        make_checkpoint(family, tmp_path / family, **changes)
    check(run_ranks(size, share, tmp_path, size, "cuda", timeout_s=240))
