"""A model that processes share says what the whole model says: every family, in float32, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.sharded import FAMILIES, make_checkpoints, on_cpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    make_checkpoints(folder)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_say_what_one_says(size: int, folder: Path) -> None:
    """Prompts in chunks, then decode steps: the same tokens, logits to 1e-5, and the same bits on all ranks."""
    found = run_ranks(size, on_cpus, folder)
    for family in FAMILIES:
        print(f"{family}: {found[0][family][1]:.1e}")
        assert found[0][family][1] < 1e-5, family
        assert len({rank[family][0] for rank in found}) == 1, f"{family}: the ranks differ"
