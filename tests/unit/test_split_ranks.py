"""Prefill and decode workers of different numbers of ranks, in threads: the tokens of one worker that does both."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.pair import Pair
from support.sharded import FAMILIES
from tandem.core.config import Config
from tandem.core.messages import Sampling

RANKS = [(1, 2), (2, 1), (2, 2), (2, 4), (4, 2)]
FAMILY = ["llama", "qwen2", "qwen3"]
"""Four, two and one key and value heads: ranks have several, one each, or share one."""
PROMPTS = [[(7 * i * i + 13 * j) % 131 for j in range(length)] for i, length in enumerate((61, 8, 17, 40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILY:
        plain = {"use_sliding_window": False} if family == "qwen2" else {}
        make_checkpoint(family, folder / family, **(FAMILIES[family] | plain))
    return folder


class Make:
    """Makes pairs, and looks at the end whether anything leaked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: list[Pair] = []

    def __call__(self, family: str, ranks: tuple[int, int] | None, overlap: bool = False) -> Pair:
        pools: dict[str, object] = {"colocated": {}}
        if ranks:
            prefill, decode = ranks
            pools = {
                "prefill": {"tensor_parallel": prefill, "max_batched_tokens": 24},
                "decode": {"tensor_parallel": decode, "max_running": 4},
            }
        config = {
            "model": {"path": str(self._folder / family), "max_model_len": 256},
            "kv": {"block_tokens": 8, "capacity": "1MiB"},
            "routing": {"local_prefill": "never"},
            "pools": pools,
        }
        self._pairs.append(Pair(Config.model_validate(config), overlap))
        return self._pairs[-1]

    def check(self) -> None:
        for pair in self._pairs:
            pair.run()
            for node in pair.nodes.values():
                node.check_idle()
            pair.close()


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    maker = Make(folder)
    yield maker
    maker.check()


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_same_tokens_whatever_the_ranks(ranks: tuple[int, int], family: str, make: Make) -> None:
    pair = make(family, ranks)
    assert pair.generate(PROMPTS, max_tokens=12) == make(family, None).generate(PROMPTS, max_tokens=12)
    assert not pair.decode.metrics.load_failures.collect()[0].samples
    # Every rank reads its own heads: where several hold the same, more bytes travel than one worker has.
    assert pair.prefill.worker.drained()


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_outputs_that_part_copy_their_last_block_on_every_rank(overlap: bool, make: Make) -> None:
    sampling = Sampling(temperature=1.0, frequency_penalty=0.5)
    said = []
    for pair in (make("llama", (2, 4), overlap), make("llama", None)):
        tickets = [pair.submit(prompt, max_tokens=12, sampling=sampling, seeds=[5, 6, 7]) for prompt in PROMPTS]
        pair.run()
        said.append([pair.outputs[ticket].tokens for ticket in tickets])
    assert said[0] == said[1]


def test_aborts_at_any_time_leave_nothing_and_spoil_nothing(make: Make) -> None:
    pair = make("llama", (2, 4))
    rng = random.Random(0)
    wanted = make("llama", None).generate(PROMPTS, max_tokens=6)
    for _ in range(40):
        tickets = [pair.submit(prompt, max_tokens=6, seeds=[1, 2]) for prompt in PROMPTS]
        doomed = set(rng.sample(tickets, 2))
        for ticket in sorted(doomed):
            for _ in range(rng.randrange(8)):
                pair.turn()
            pair.abort(ticket)
        pair.run()
        for ticket, tokens in zip(tickets, wanted, strict=True):
            for child in (0, 1) if ticket not in doomed else ():
                assert pair.outputs[ticket].tokens[child] == tokens
