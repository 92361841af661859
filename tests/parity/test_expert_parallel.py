"""Ranks that have different experts say what one with all of them says: float32, real processes, gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.ranks import run_ranks
from support.sharded_experts import FAMILIES, check, share


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family, changes in FAMILIES.items():
        make_checkpoint(family, folder / family, **changes)
    return folder


@pytest.mark.parametrize(("size", "num_redundant"), [(2, 0), (4, 4)])
def test_ranks_say_what_one_says(size: int, num_redundant: int, folder: Path) -> None:
    """Each with prompts of its own, in chunks, then decode steps; one has none, and some end before others."""
    check(run_ranks(size, share, folder, num_redundant))
