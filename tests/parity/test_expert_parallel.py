"""Ranks that have different experts say what one with all of them says: float32, real processes, gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.quantized import make_quantized
from support.ranks import run_ranks
from support.sharded_experts import (
    FAMILIES,
    NUM_ROUNDS,
    as_workers,
    check,
    share,
    share_and_leave,
    share_and_move,
    share_both,
    share_directly,
)
from tandem.kernels import on_gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family, changes in FAMILIES.items():
        make_checkpoint(family, folder / family, **changes)
    return folder


@pytest.mark.parametrize(("size", "num_redundant"), [(2, 0), (4, 4)])
def test_ranks_say_what_one_says(size: int, num_redundant: int, folder: Path) -> None:
    """Each with prompts of its own, in chunks, then decode steps; one has none, and some end before others."""
    check(run_ranks(size, share_and_leave, folder, num_redundant))


@pytest.mark.parametrize(("workers", "families"), [(2, ("gpt_oss", "deepseek_v3")), (4, ("qwen3_moe",))])
def test_layers_and_experts(workers: int, families: tuple[str, ...], folder: Path) -> None:
    """Two ranks share each worker's layers, and all ranks share the experts."""
    check(run_ranks(2 * workers, share_both, folder, 2, families, timeout_s=600), 2)


def test_workers_of_several_processes(folder: Path) -> None:
    """Two workers, the second idle, whose first ranks tell the others what to do."""
    found = run_ranks(2, as_workers, folder, "qwen3_moe", timeout_s=600)
    assert [same for _, same in found] == [True, True], found


@pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")
def test_through_peers_memory(folder: Path) -> None:
    """The same by interpreted kernels that write into memory which two processes share."""
    check(run_ranks(2, share_directly, folder, ("qwen3_moe",), timeout_s=600))


def test_quantised_experts(tmp_path: Path) -> None:
    """Published expert by expert, and all in one tensor, of which the second rank has 5, 6, 7, 0 and 1."""
    sizes = {"num_experts": 8, "decoder_sparse_step": 1}
    make_quantized("qwen3_moe", "fp8_blocks", tmp_path / "qwen3_moe-fp8", **sizes)
    make_quantized(
        "qwen3_moe", "mxfp4", tmp_path / "qwen3_moe-mxfp4", hidden_size=64, moe_intermediate_size=32, **sizes
    )
    check(run_ranks(2, share, tmp_path, 2, "cpu", ("qwen3_moe-fp8", "qwen3_moe-mxfp4")))


def test_experts_move_while_ranks_serve(tmp_path: Path) -> None:
    """Plain and quantised, biases, scales and all; nobody notices."""
    sizes = {"num_experts": 8, "decoder_sparse_step": 1}
    for family in ("qwen3_moe", "gpt_oss"):
        make_checkpoint(family, tmp_path / family, **FAMILIES[family])
    make_quantized("qwen3_moe", "fp8_blocks", tmp_path / "fp8", **sizes)
    make_quantized("qwen3_moe", "mxfp4", tmp_path / "mxfp4", hidden_size=64, moe_intermediate_size=32, **sizes)
    families = "qwen3_moe", "gpt_oss", "fp8", "mxfp4"
    found = run_ranks(2, share_and_move, tmp_path, families, True)
    for family in families:
        for told in found:
            print(family, told[family])
            assert told[family].difference < 1e-5
            assert told[family].same_tokens
            assert told[family].loads[0][0] >= NUM_ROUNDS // 2, "rounds after which experts were elsewhere"
