"""Tiers of models whose layers see a window: of such layers the last window is enough, and without it nothing is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.offloading import Slow, block_bytes, check, config_of, prompt_of, random_load, real, until_ready, value
from support.pair import Pair
from support.tiers import end
from tandem.core.config import Config
from tandem.engine.prefixes import Part, longest_window
from tandem.kv_transfer.layout import KVGroup
from tandem.kv_transfer.offload.build import start_host_tier
from tandem.kv_transfer.offload.stack import Write

FAMILIES = {"mistral": 30, "qwen3_mixed": 50}
"""One KV group with a window; two, and one without. With blocks that are enough for one sequence."""
POOLS: dict[str, dict[str, Any]] = {
    "together": {"colocated": {"max_batched_tokens": 32}},
    "apart": {"prefill": {"max_batched_tokens": 32}, "decode": {"max_batched_tokens": 32}},
}


class Model:
    """A checkpoint, and what it answers undisturbed."""

    def __init__(self, family: str, folder: Path) -> None:
        make_checkpoint(family, folder)
        self.folder = folder
        self.num_blocks = FAMILIES[family]
        self.which = [(number, num_tokens) for number in range(6) for num_tokens in (20, 60, 90)]
        pair = Pair(config_of(folder, 1000, POOLS["together"]))
        outputs = pair.generate([prompt_of(*one) for one in self.which], max_tokens=12)
        self.golden = dict(zip(self.which, outputs, strict=True))
        self.again = [[*prompt_of(number, 90), *self.golden[number, 90], 1, 2, 3] for number in range(6)]
        """What clients say next."""
        self.golden_again = pair.generate(self.again, max_tokens=6)
        pair.close()


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tiers(model: Model, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    size = block_bytes(model.folder)
    tiers = [
        {"kind": "host", "capacity": 60 * (size + 256), "policy": "lru"},
        {"kind": "disk", "capacity": 800 * (size + 8192), "policy": "lru", "path": str(tmp_path / "disk")},
    ]
    keeper = start_host_tier(Config.model_validate({"offload": {"tiers": tiers}}).offload, size, tmp_path)
    assert keeper is not None
    yield tiers
    end(keeper)


@pytest.mark.parametrize(("pools", "overlap"), [("together", False), ("together", True), ("apart", False)])
def test_what_the_pool_lost_comes_back(
    model: Model, tmp_path: Path, tiers: list[dict[str, Any]], pools: str, overlap: bool
) -> None:
    pair = Pair(config_of(model.folder, model.num_blocks, POOLS[pools], tiers), overlap, tiers_of=real(tmp_path))
    until_ready(pair)
    for number in range(6):
        assert pair.generate([prompt_of(number, 90)], max_tokens=12) == [model.golden[number, 90]]
    for number in range(6):
        assert pair.generate([model.again[number]], max_tokens=6) == [model.golden_again[number]]
    check(pair)
    for node in pair.nodes.values():
        assert value(node, "tandem_offload_loads_total", outcome="loaded") >= 3, node.peer
        assert value(node, "tandem_offload_tokens_total") >= 3 * 40
    pair.close()


def test_prompts_that_part_anywhere_share_what_they_share(model: Model) -> None:
    """Of a window, the last blocks of every prefix are kept, not only of the whole prompt."""
    slow = Slow(config_of(model.folder, model.num_blocks, POOLS["together"]), latency_s=0.0, slots=1000)
    pair = slow.pair

    def run(prompt: list[int]) -> None:
        pair.submit(prompt, max_tokens=2)
        while pair.turn():
            pair.clock.advance(1e-6)

    for number in range(4):
        run(prompt_of(number, 90))
    for shared in (80, 72, 48):
        before = value(pair.decode, "tandem_offload_tokens_total")
        run([*prompt_of(0, 90)[:shared], 1, 2, 3])
        cached = value(pair.decode, "tandem_offload_tokens_total") - before
        assert cached == shared, "all of it comes from the tier"
        for number in range(1, 4):
            run(prompt_of(number + shared, 90))
    check(pair)
    pair.close()


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_loads(model: Model, seed: int) -> None:
    """Tiny pools and tiers that lose some groups' blocks and not others', aborts: equal tokens, and nothing leaks."""
    rng = random.Random(seed)
    config = config_of(model.folder, model.num_blocks + rng.choice((0, 20)), POOLS[rng.choice(list(POOLS))])
    times = rng.choice((0.0, 0.01, 0.1)), rng.choice((0.05, 1e9))
    slow = Slow(config, *times, rng.choice((20, 60, 400)), rng.choice(list(Write)[::2]), rng.random() < 0.5)
    random_load(slow, rng, lambda: rng.choice(model.which), model.golden)


@given(
    windows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    num_blocks=st.integers(0, 8),
    missing=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 2))),
)
def test_the_longest_prefix_is_the_longest(windows: list[int], num_blocks: int, missing: set[tuple[int, int]]) -> None:
    groups = [KVGroup((n,), window) for n, window in enumerate(windows)]

    def has(part: Part) -> bool:
        return tuple(part) not in missing

    def complete(length: int) -> bool:
        return all(
            has(Part(position, number))
            for number, group in enumerate(groups)
            for position in range(group.first_block(length * 8, 8), length)
        )

    assert longest_window(groups, num_blocks, 8, has) == max(n for n in range(num_blocks + 1) if complete(n))
