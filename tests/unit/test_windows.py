"""Engines whose layers see unequally far: memory, admission, and what is found again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from tandem.core.clock import ManualClock
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.core.hashing import root_hash
from tandem.core.ids import TransferId
from tandem.core.messages import Child, Sampling
from tandem.engine.allocator import num_blocks_needed
from tandem.engine.batch import Work
from tandem.engine.build import build_engine, warm_up
from tandem.engine.engine import Engine
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.layout import KVGroup
from tandem.prefill.job import Job
from tandem.prefill.scheduler import PrefillScheduler

CPU = torch.device("cpu")
WINDOW = 64
KV_GROUPS = (KVGroup((0, 2), 0), KVGroup((1, 3), WINDOW))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half the layers see everything, half a window."""
    folder = tmp_path_factory.mktemp("half")
    kinds = ["full_attention", "sliding_attention"]
    make_checkpoint(
        "qwen3_mixed", folder, num_hidden_layers=4, layer_types=kinds * 2, sliding_window=WINDOW,
        max_position_embeddings=8192, num_key_value_heads=1,
    )  # fmt: skip
    return folder


def engine_of(folder: Path, num_blocks: int | str = "auto", chunk: int = 256, **model: object) -> Engine:
    block_bytes = 2 * 2 * 16 * 14 * 4
    kv = {"block_tokens": 16, "capacity": num_blocks if isinstance(num_blocks, str) else num_blocks * block_bytes}
    config = Config.model_validate({"model": {"path": str(folder)} | model, "kv": kv})
    return build_engine(config, 2, CPU, lambda *_: None, chunk).engine


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence("r", tokens, len(tokens), [Child(0, 0)], Sampling(), root_hash("m"))


def compute(engine: Engine, sequence: Sequence, chunk: int = 256) -> int:
    """The whole prompt; returns the most blocks that were used meanwhile."""
    most = 0
    while (left := sequence.num_tokens - sequence.num_computed) > 0:
        num_new = engine.room(sequence, min(chunk, left))
        assert num_new == min(chunk, left)
        [outcome] = engine.step([Work(sequence, num_new)])
        engine.commit(sequence)
        most = max(most, engine.pool.num_blocks - engine.pool.num_free)
    assert outcome.samples is not None
    assert outcome.samples[0] is not None
    sequence.tokens.append(outcome.samples[0].token)
    return most


def test_a_window_on_half_the_layers_halves_the_blocks(folder: Path) -> None:
    engine = engine_of(folder)
    assert engine.groups == KV_GROUPS
    sequence = sequence_of([(7 * i * i) % 131 for i in range(4000)])
    assert engine.reserve_prompt(sequence)
    whole, window, chunk = 4000 // 16, WINDOW // 16 + 1, 256 // 16
    assert compute(engine, sequence) <= whole + window + chunk
    for _ in range(40):
        assert engine.reserve(sequence, sequence.num_tokens)
        [outcome] = engine.step([Work(sequence, 1)])
        assert outcome.samples is not None
        assert outcome.samples[0] is not None
        sequence.tokens.append(outcome.samples[0].token)
        used = engine.pool.num_blocks - engine.pool.num_free
        assert used <= -(-sequence.num_tokens // 16) + window
    assert used < 0.52 * 2 * (-(-sequence.num_tokens // 16))
    assert sum(block >= 0 for block in sequence.tables[1]) <= window
    engine.pool.check()
    engine.free(sequence)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_what_was_given_back_is_found_until_it_is_reused(folder: Path) -> None:
    """A hit far beyond the window, and one that ends before what is missing; both continue as if all were computed."""
    engine = engine_of(folder)
    tokens = [(5 * i * i + i) % 131 for i in range(1000)]
    first = sequence_of(tokens)
    assert engine.reserve_prompt(first)
    compute(engine, first)
    for length in (1000, 500):
        again = sequence_of(tokens[:length])
        assert engine.match_prefix(again) == (length - 1) // 16 * 16
        assert all(block >= 0 for block in again.tables[0])
        assert [block >= 0 for block in again.tables[1]].count(True) == 4
        assert engine.reserve_prompt(again)
        compute(engine, again)
        fresh = sequence_of(tokens[:length])
        plain = engine_of(folder)
        assert plain.reserve(fresh, length + 1)
        compute(plain, fresh)
        assert again.tokens == fresh.tokens
        engine.free(again)
    engine.free(first)
    # One block in the middle of the windowed group is gone: whoever needs it finds less.
    key = first.keys(40, 16)[30] + (1).to_bytes(2, "little")
    block = engine.pool.find(key)
    assert block is not None
    engine.pool.uncache([block])
    engine.pool.check()
    for length, hit in ((1000, 992), (35 * 16 + 1, 35 * 16), (34 * 16 + 1, 30 * 16), (31 * 16 + 1, 30 * 16)):
        again = sequence_of(tokens[:length])
        assert engine.match_prefix(again) == hit
        engine.free(again)


def test_what_went_wrong_is_not_found_even_where_it_was_given_back(folder: Path) -> None:
    engine = engine_of(folder)
    tokens = [(3 * i) % 131 for i in range(800)]
    sequence = sequence_of(tokens)
    assert engine.reserve_prompt(sequence)
    compute(engine, sequence)
    assert -1 in sequence.tables[1]
    engine.discard(sequence)
    assert engine.pool.num_cached == 0
    assert engine.match_prefix(sequence_of(tokens)) == 0
    engine.pool.check()


def test_forks_share_the_window(folder: Path) -> None:
    engine = engine_of(folder)
    parent = sequence_of([(11 * i) % 131 for i in range(500)])
    assert engine.reserve_prompt(parent)
    compute(engine, parent)
    token = parent.tokens.pop()
    before = engine.pool.num_free
    fork = engine.fork(parent, Child(1, 1), "r")
    assert fork is not None
    assert before - engine.pool.num_free == 2  # the last block of each group
    assert sum(block >= 0 for block in fork.tables[1]) == 5
    outputs = []
    for sequence in (parent, fork):
        sequence.tokens.append(token)
        while len(sequence.tokens) < 600:
            assert engine.reserve(sequence, sequence.num_tokens)
            [outcome] = engine.step([Work(sequence, 1)])
            assert outcome.samples is not None
            assert outcome.samples[0] is not None
            sequence.tokens.append(outcome.samples[0].token)
        outputs.append(sequence.tokens)
        engine.free(sequence)
    assert outputs[0] == outputs[1]
    engine.pool.check()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_the_longest_sequence_fits_into_the_least_cache(folder: Path) -> None:
    """Admitted alone it is computed to the end; one block less is a configuration error."""
    least = num_blocks_needed(KV_GROUPS, 512, 256, 16)
    engine = engine_of(folder, least, max_model_len=512)
    sequence = sequence_of([i % 131 for i in range(511)])
    assert engine.reserve_prompt(sequence, announced=True)
    compute(engine, sequence)
    assert engine.reserve(sequence, 512)
    engine.step([Work(sequence, 1)])
    with pytest.raises(ConfigError, match=f"one sequence of model.max_model_len = 512 tokens needs {least},"):
        engine_of(folder, least - 1, max_model_len=512)


def test_a_warm_up_leaves_nothing(folder: Path) -> None:
    engine = engine_of(folder, 80, max_model_len=512)
    warm_up(engine, 256, lambda *_: None)
    engine.pool.check()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("seed", range(12))
def test_started_prompts_end_whatever_they_share(folder: Path, seed: int) -> None:
    """Prompts with common prefixes in hardly more blocks than the longest needs, readers that take their time."""
    rng = random.Random(seed)
    least = num_blocks_needed(KV_GROUPS, 512, 32, 16)
    engine = engine_of(folder, least + 2 * seed, chunk=32, max_model_len=512)
    scheduler = PrefillScheduler(engine, 60, 16, ManualClock())
    shared = [rng.randrange(131) for _ in range(400)]
    held: list[Job] = []
    ended = 0
    for number in range(40):
        tokens = shared[: rng.randrange(100, 400)] + [rng.randrange(131) for _ in range(rng.randrange(1, 110))]
        scheduler.add(Job(TransferId("d", number), sequence_of(tokens), 0, 0.0))
    while ended < 40:
        scheduler.admit()
        plan = scheduler.plan()
        assert bool(plan) == bool(scheduler.num_running), "the prompts that started stand still"
        jobs = {id(job.sequence): job for job in scheduler}
        for outcome in engine.step(plan) if plan else ():
            engine.commit(outcome.sequence)
            if outcome.samples is not None:
                job = jobs[id(outcome.sequence)]
                scheduler.hold(job)
                held.append(job)
        if held and (not plan or rng.random() < 0.3):
            scheduler.remove(held.pop(rng.randrange(len(held))))
            ended += 1
        engine.pool.check()
    assert engine.pool.num_free == engine.pool.num_blocks
