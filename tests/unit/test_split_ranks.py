"""Prefill and decode workers of different numbers of ranks, in threads: the tokens of one worker that does both."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.pair import Node, Pair
from support.sharded import FAMILIES
from support.thread_ranks import ThreadRanks
from tandem.core.config import Config
from tandem.core.messages import PrefillFailed, Sampling
from tandem.decode.worker import DecodeWorker
from tandem.engine.models.shard import kv_heads_of
from tandem.kv_transfer.sum_queue import Pending
from tandem.prefill.worker import PrefillWorker

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

    def __call__(
        self,
        family: str,
        ranks: tuple[int, int] | None,
        overlap: bool = False,
        model_dtype: str = "float32",
        checksums: bool = False,
        **prefill_kv: object,
    ) -> Pair:
        pools: dict[str, object] = {"colocated": {}}
        if ranks:
            prefill, decode = ranks
            pools = {
                "prefill": {"tensor_parallel": prefill, "max_batched_tokens": 24},
                "decode": {"tensor_parallel": decode, "max_running": 4},
            }
        config: dict[str, object] = {
            "model": {"path": str(self._folder / family), "max_model_len": 256, "dtype": model_dtype},
            "kv": {"block_tokens": 8, "capacity": "1MiB", "checksums": checksums},
            "routing": {"local_prefill": "never"},
            "pools": pools,
        }
        kv = {"block_tokens": 8, "capacity": "1MiB"} | prefill_kv
        prefill_config = Config.model_validate(config | {"kv": kv})
        self._pairs.append(Pair(Config.model_validate(config), overlap, prefill_config))
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


@pytest.mark.parametrize("checksums", [False, True], ids=["", "checksums"])
@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_blocks_may_differ_too(ranks: tuple[int, int], checksums: bool, make: Make) -> None:
    pair = make("llama", ranks, checksums=checksums, block_tokens=12, layer_groups=3)
    assert pair.generate(PROMPTS, max_tokens=12) == make("llama", None).generate(PROMPTS, max_tokens=12)
    assert not pair.decode.metrics.load_failures.collect()[0].samples


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("ranks", [(1, 2), (2, 4), (4, 2)])
def test_a_bit_that_changes_in_any_rank_is_noticed(ranks: tuple[int, int], family: str, make: Make) -> None:
    """Also in a rank that holds the heads of another: what it has read is a copy of its own."""
    want = make(family, None).generate(PROMPTS[:1], max_tokens=12)
    pair = make(family, ranks, checksums=True)
    assert pair.generate(PROMPTS[:1], max_tokens=12) == want
    failures = pair.decode.metrics.load_failures.labels("checksum")._value
    assert failures.get() == 0
    assert isinstance(pair.decode.ranks, ThreadRanks)
    last, checksums = pair.decode.ranks.caches[-1].tensor, pair.decode.connector._sums
    assert checksums is not None
    start, flipped = checksums.start, 0

    def flip(tables: list[list[int]], layers: range, *others: Any, copies: bool, behind_steps: bool) -> Pending:
        nonlocal flipped
        if not flipped:
            flipped += 1
            last[tables[0][0], layers.start, 0, 0, 3, 0] += 1
        return start(tables, layers, *others, copies=copies, behind_steps=behind_steps)

    checksums.start = flip  # type: ignore[method-assign]
    other = [[(token + 1) % 131 for token in PROMPTS[0]]]
    assert pair.generate(other, max_tokens=12) == make(family, None).generate(other, max_tokens=12)
    assert flipped
    assert failures.get() == 1


def kv_of(node: Node, blocks: list[int], num_tokens: int) -> torch.Tensor:
    """[layer, K|V, head, token, dim] of the whole model, put together from a worker's ranks."""
    engine = node.engine
    spec, size = engine.model.spec, engine.model.group.size
    caches = [engine.cache, *(node.ranks.caches if node.ranks else ())]
    by_head: dict[int, torch.Tensor] = {}
    for rank, cache in enumerate(caches):
        gathered = cache.tensor[blocks].permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, :, :num_tokens]
        for index, head in enumerate(kv_heads_of(spec, rank, size)):
            if head in by_head:
                assert torch.equal(by_head[head], gathered[:, :, index]), "ranks that share a head differ"
            by_head[head] = gathered[:, :, index]
    return torch.stack([by_head[head] for head in range(spec.num_kv_heads)], dim=2)


@pytest.mark.parametrize("block_tokens", [8, 12])
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_what_prefill_computed_of_its_heads(
    ranks: tuple[int, int], family: str, block_tokens: int, make: Make
) -> None:
    landed, sent = handed_over(make(family, ranks, block_tokens=block_tokens))
    assert torch.equal(landed, sent)


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_every_rank_converts_what_it_reads(ranks: tuple[int, int], make: Make) -> None:
    pair = make("llama", ranks, False, "bfloat16", checksums=True, block_tokens=12, dtype="float32")
    landed, sent = handed_over(pair)
    assert (landed.dtype, sent.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(landed, sent.to(torch.bfloat16))


def handed_over(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt's KV as decode begins with it, and as prefill has it."""
    prompt = PROMPTS[0]
    found: dict[str, torch.Tensor] = {}
    prefill, decode = pair.prefill.worker, pair.decode.worker
    assert isinstance(prefill, PrefillWorker)
    assert isinstance(decode, DecodeWorker)

    def keep(node: Node, blocks: list[int]) -> None:
        found[node.peer] = kv_of(node, blocks, len(prompt)).clone()

    hold, begin = prefill._scheduler.hold, decode._prompts._on_here
    prefill._scheduler.hold = lambda job: keep(pair.prefill, job.sequence.tables[0]) or hold(job)  # type: ignore[func-returns-value,method-assign]
    decode._prompts._on_here = lambda stream: keep(pair.decode, stream.sequence.tables[0]) or begin(stream)  # type: ignore[func-returns-value,method-assign]
    pair.generate([prompt], max_tokens=4)
    landed, sent = found[pair.decode.peer], found[pair.prefill.peer]
    assert sent.abs().sum() > 0
    return landed, sent


def test_blocks_that_were_reused_while_one_rank_read_late_are_noticed(make: Make) -> None:
    """The first rank has read, the second stalls past the lease: its bytes are somebody else's."""
    wanted = make("llama", None).generate(PROMPTS[:1], max_tokens=12)
    pair = make("llama", (2, 2))
    assert pair.decode.ranks is not None
    assert pair.prefill.ranks is not None
    pair.decode.ranks.num_copies += 1  # one that is never done
    pair.deliver = lambda sender, to, message: not isinstance(message, PrefillFailed)
    ticket = pair.submit(PROMPTS[0], max_tokens=12)
    for _ in range(10):
        pair.turn()
    assert pair.decode.connector.num_pulls
    pair.clock.advance(31)
    pair.prefill.worker.tick()
    pair.prefill.check_idle()
    pool = pair.prefill.engine.pool
    blocks = pool.allocate(pool.num_blocks)
    assert blocks is not None
    pair.prefill.ranks.caches[0].tensor.fill_(float("nan"))
    pool.release(blocks)
    for mover in pair.decode.ranks.movers:
        mover.copied(1, lambda: None)
    pair.run()
    assert [pair.outputs[ticket].tokens[0]] == wanted
    assert "transfer.failed" in pair.outputs[ticket].stages
    assert pair.decode.metrics.load_failures.labels("generation")._value.get() == 1


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_outputs_that_part_copy_their_last_block_on_every_rank(overlap: bool, make: Make) -> None:
    sampling = Sampling(temperature=1.0, frequency_penalty=0.5)
    said = []
    for pair in (make("llama", (2, 4), overlap), make("llama", None)):
        tickets = [pair.submit(prompt, max_tokens=12, sampling=sampling, seeds=[5, 6, 7]) for prompt in PROMPTS]
        pair.run()
        said.append([pair.outputs[ticket].tokens for ticket in tickets])
        assert pair.decode.ranks is None or pair.decode.ranks.num_copies
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
