"""Ranks on GPUs of one host that have different experts say what one with all of them says, over NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.ranks import run_ranks
from support.sharded_experts import FAMILIES, NUM_TOKENS, PROMPTS, check, on_graphs, share

GPUS = torch.cuda.device_count()
SIZES = [size for size in (2, 4) if size <= GPUS] or [2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices are here, and ranks need two"),
]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_say_what_one_says(size: int, tmp_path: Path) -> None:
    """As in tests/parity, by Triton's kernels in all forms."""
    for family, changes in FAMILIES.items():
        make_checkpoint(family, tmp_path / family, **changes)
    forms = ("exact", "fixed", "direct")
    check(run_ranks(size, share, tmp_path, size, "cuda", tuple(FAMILIES), forms, timeout_s=400))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_graphs(family: str, size: int, tmp_path: Path) -> None:
    """Decode steps of several ranks, recorded, whatever each of them has to do."""
    make_checkpoint(family, tmp_path / family, **FAMILIES[family])
    found = run_ranks(size, on_graphs, tmp_path, family, timeout_s=400)
    for rank, (tokens, same) in enumerate(found):
        assert [len(each) for each in tokens] == [NUM_TOKENS] * len(PROMPTS[rank])
        assert same, f"rank {rank}: {tokens}"
