"""Tiers of a worker whose ranks are processes."""

from __future__ import annotations

from pathlib import Path

from support.checkpoints import make_checkpoint
from support.offloading import block_bytes, check, config_of, prompt_of, real, until_ready, value
from support.pair import Pair
from support.sharded import FAMILIES


def test_what_the_pool_lost_comes_back_to_every_rank(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "model", **FAMILIES["llama"])
    prompts = [prompt_of(number, 90) for number in range(4)]
    pair = Pair(config_of(tmp_path / "model", 400, {"colocated": {}}))
    golden = pair.generate(prompts, max_tokens=12)
    pair.close()
    size = block_bytes(tmp_path / "model")
    tiers = [{"kind": "disk", "capacity": 400 * (size + 8192), "path": str(tmp_path / "disk")}]
    config = config_of(tmp_path / "model", 20, {"colocated": {"tensor_parallel": 2}}, tiers)
    pair = Pair(config, tiers_of=real(tmp_path), processes=True)
    try:
        until_ready(pair)
        for turn in range(2):
            for prompt, tokens in zip(prompts, golden, strict=True):
                assert pair.generate([prompt], max_tokens=12) == [tokens]
                pair.generate([prompt[:40]], max_tokens=2, seeds=[0, 1, 2])  # which fork, and copy blocks
            loaded = value(pair.decode, "tandem_offload_loads_total", outcome="loaded")
            assert loaded >= 4 if turn else loaded >= 0
        assert value(pair.decode, "tandem_offload_tokens_total") >= 4 * 80
        check(pair)
    finally:
        pair.close()
