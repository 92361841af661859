"""Tiers of workers of several ranks: what is kept looks as if one rank had all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.offloading import Slow, block_bytes, check, config_of, prompt_of, real, until_ready, value
from support.pair import Pair
from support.sharded import FAMILIES
from support.tiers import end
from tandem.core.config import Config
from tandem.engine.models.shard import kv_heads_of
from tandem.engine.models.spec import read_spec
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.offload.build import start_host_tier
from tandem.kv_transfer.offload.split import RankBlocks, SplitBlocks

TWO: dict[str, Any] = {"colocated": {"tensor_parallel": 2}}
ONE: dict[str, Any] = {"colocated": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder, **FAMILIES["llama"])
    return folder


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[int, list[int]]:
    pair = Pair(config_of(folder, 400, ONE))
    outputs = pair.generate([prompt_of(number, 90) for number in range(6)], max_tokens=12)
    pair.close()
    return dict(enumerate(outputs))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_blocks_of_ranks_are_blocks_of_the_model(folder: Path, size: int) -> None:
    spec = read_spec(folder)
    assert spec.num_kv_heads == 4
    layout = KVLayout(3, 4, 8, 16, "float16")
    rng = np.random.default_rng(size)
    whole = rng.integers(0, 256, (5, 6, 4, layout.layer_bytes // 8), dtype=np.uint8)

    def ranks(content: np.ndarray) -> list[RankBlocks]:
        heads = [kv_heads_of(spec, rank, size) for rank in range(size)]
        return [RankBlocks(h, np.ascontiguousarray(content[:, :, h.start : h.stop]).reshape(-1)) for h in heads]

    full, empty = ranks(whole), ranks(np.zeros_like(whole))
    found = np.zeros((5, layout.block_bytes), np.uint8)
    SplitBlocks(layout, full).read([3, 0], [found[1], found[4]])
    assert np.array_equal(found[[1, 4]], whole[[3, 0]].reshape(2, -1))
    SplitBlocks(layout, empty).write([3, 0], [found[1], found[4]])
    for rank, (wanted, got) in enumerate(zip(full, empty, strict=True)):
        for block in range(5):
            a, b = wanted.array.reshape(5, -1)[block], got.array.reshape(5, -1)[block]
            assert np.array_equal(b, a if block in (0, 3) else a * 0), (rank, block)


def test_ranks_and_one_rank_share_a_node(folder: Path, tmp_path: Path, golden: dict[int, list[int]]) -> None:
    """What two ranks stored, a worker of one finds, and the other way round."""
    size = block_bytes(folder)
    tiers = [{"kind": "host", "capacity": 400 * (size + 256)}]
    keeper = start_host_tier(Config.model_validate({"offload": {"tiers": tiers}}).offload, size, tmp_path)
    assert keeper is not None
    for first, second, number in ((TWO, ONE, 1), (ONE, TWO, 2)):
        for pools in (first, second):
            pair = Pair(config_of(folder, 60, pools, tiers), tiers_of=real(tmp_path))
            until_ready(pair)
            assert pair.generate([prompt_of(number, 90)], max_tokens=12) == [golden[number]]
            assert value(pair.decode, "tandem_offload_tokens_total") == (88 if pools is second else 0)
            check(pair)
            pair.close()
    end(keeper)


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_loads(folder: Path, golden: dict[int, list[int]], seed: int) -> None:
    """Outputs that fork, blocks that other ranks copy late, loads into what was freed: equal tokens."""
    rng = random.Random(seed)
    slow = Slow(config_of(folder, rng.choice((16, 24, 40)), TWO), rng.choice((0.0, 0.01)), overlap=rng.random() < 0.5)
    pair = slow.pair
    wanted: dict[int, int] = {}
    for _ in range(40):
        if rng.random() < 0.3:
            number = rng.randrange(6)
            outputs = rng.choice((1, 3))
            wanted[pair.submit(prompt_of(number, 90), max_tokens=12, seeds=list(range(outputs)))] = number
        pair.turn()
        if rng.random() < 0.3:
            pair.clock.advance(0.01)
    slow.run()
    for ticket, number in wanted.items():
        for tokens in pair.outputs[ticket].tokens.values():
            assert tokens == golden[number]
    check(pair)
    pair.close()


def test_blocks_that_ranks_may_still_copy_are_left_alone(folder: Path) -> None:
    slow = Slow(config_of(folder, 40, TWO), 0.0)
    engine = slow.pair.decode.engine
    slow.pair.submit(prompt_of(0, 90), max_tokens=4, seeds=[0, 1, 2])
    seen = []
    while slow.pair.turn():
        slow.pair.clock.advance(1e-6)
        seen.append((engine.copying, engine._allocator.num_collected))
    copying = [step for lag, step in seen if lag]
    assert copying, "forks copy blocks"
    assert all(not lag for lag, step in seen if step > copying[-1]), "until the next step has ended"
    check(slow.pair)
    slow.pair.close()
