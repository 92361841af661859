"""Ranks that have different experts say what one with all of them says: float32, real processes, gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.ranks import run_ranks
from support.sharded_experts import FAMILIES, NUM_OUTPUT, PROMPTS, share


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family, changes in FAMILIES.items():
        make_checkpoint(family, folder / family, **changes)
    return folder


@pytest.mark.parametrize(("size", "num_redundant"), [(2, 0), (4, 4)])
def test_ranks_say_what_one_says(size: int, num_redundant: int, folder: Path) -> None:
    """Each with prompts of its own, in chunks, then decode steps; one has none, and some end before others."""
    found = run_ranks(size, share, folder, num_redundant)
    for case in found[0]:
        for rank, told in enumerate(found):
            print(f"{case}, rank {rank}: {told[case].difference:.1e}, idle {told[case].num_idle}")
            assert told[case].difference < 1e-5
            assert told[case].same_tokens
        # Every choice of every token counts in one place, and nothing else does.
        num_tokens = sum(length + NUM_OUTPUT - 1 for lengths in PROMPTS[:size] for length in lengths)
        top_k = 3 if "qwen3_moe" in case else 2
        for layer in zip(*(told[case].loads for told in found), strict=True):
            assert sum(map(sum, layer)) == num_tokens * top_k
        # The longest prompt takes three chunks, with the last of which comes the first token.
        assert found[1][case].num_idle == NUM_OUTPUT + 2
