"""The engine alone: steps that overlap, blocks that are still written to, penalties, steps as frames."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from tandem.core.config import Config
from tandem.core.frames import send_frame
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.engine.batch import Work, lay_out
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.memory import DeviceMemory, lacking
from tandem.engine.penalty_counts import PenaltySlots
from tandem.engine.rank_wire import Compute, encode_step, receive, step_of
from tandem.engine.sequence import Sequence
from tandem.kernels.sampling import SamplingRows, apply_penalties, reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    make_checkpoint("qwen3", folder)
    return folder


def engine_of(folder: Path, overlap: bool) -> Engine:
    config = Config.model_validate({"model": {"path": str(folder)}, "kv": {"block_tokens": 4, "capacity": "4MiB"}})
    return build_engine(config, 8, CPU, lambda *_: None, overlap=overlap).engine


def sequence_of(tokens: list[int], sampling: Sampling = Sampling(), seed: int = 0) -> Sequence:
    return Sequence("r", tokens, len(tokens), [Child(0, seed)], sampling, root_hash("m"))


def run(engine: Engine, sequences: list[Sequence], count: int) -> None:
    """Until each has ``count`` outputs, one step ahead where the engine can."""
    for sequence in sequences:
        assert engine.reserve(sequence, sequence.num_tokens + count)
    flight = None
    while True:
        todo = [s for s in sequences if s.num_expected < s.num_prompt_tokens + count]
        step = engine.submit([Work(s, s.num_expected - s.num_computed) for s in todo]) if todo else None
        for done in (flight, None if engine.overlaps else step):
            for outcome in engine.collect(done) if done else ():
                assert outcome.samples is not None
                assert outcome.samples[0] is not None
                outcome.sequence.tokens.append(outcome.samples[0].token)
        flight = step if engine.overlaps else None
        if step is None:
            return


def test_blocks_that_a_step_still_writes_to_are_nobody_elses(folder: Path) -> None:
    engine = engine_of(folder, overlap=True)
    sequence = sequence_of([1, 2, 3, 4, 5])
    assert engine.reserve(sequence, 8)
    free = engine.pool.num_free
    first = engine.submit([Work(sequence, 5)])
    assert sequence.pending
    second = engine.submit([Work(sequence, 1)])
    engine.free(sequence)
    assert engine.pool.num_free == free
    [outcome] = engine.collect(first)
    assert outcome.samples is not None
    assert engine.pool.num_free == free, "the second step writes there too"
    engine.collect(second)
    assert engine.pool.num_free == free + 2
    engine.pool.check()


PENALTIES = [
    Sampling(temperature=0.7, presence_penalty=1.5, frequency_penalty=0.5),
    Sampling(repetition_penalty=1.8),
    Sampling(temperature=1.0, repetition_penalty=0.7, frequency_penalty=-0.4, logit_bias={3: 2.0, 7: -100.0}),
    Sampling(logit_bias={5: 3.5}),
    Sampling(temperature=0.9, top_k=20),
]


@pytest.mark.parametrize("overlap", [False, True])
def test_penalties_and_biases(folder: Path, overlap: bool) -> None:
    """Each step's logits, changed by the list of tokens so far, give the token that was drawn."""
    engine = engine_of(folder, overlap)
    sequences = [sequence_of([9, 4, 9, 30 + i, 2], sampling, i) for i, sampling in enumerate(PENALTIES)]
    run(engine, sequences, 30)
    for sequence in sequences:
        alone = sequence_of(sequence.tokens[:5], sequence.sampling, sequence.children[0].seed)
        plain = engine_of(folder, overlap=False)
        assert plain.reserve(alone, 40)
        seen: list[torch.Tensor] = []
        forward = plain.model.forward

        def keep(*args: object, forward: object = forward, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(forward(*args).clone())  # type: ignore[operator]
            return seen[-1]

        plain.model.forward = keep  # type: ignore[assignment,method-assign]
        for position in range(5, 35):
            plain.step([Work(alone, len(alone.tokens) - alone.num_computed)])
            row = seen[-1][-1].clone()
            sampling = sequence.sampling
            tokens = torch.tensor(alone.tokens)
            apply_penalties(
                row, tokens[:5], tokens[5:], sampling.presence_penalty, sampling.frequency_penalty,
                sampling.repetition_penalty,
            )  # fmt: skip
            for token, bias in sampling.logit_bias.items():
                row[token] += bias
            rows = SamplingRows(
                *(torch.tensor([x]) for x in (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)),
                *(torch.tensor([x]) for x in (alone.children[0].seed, position)),
            )
            assert sequence.tokens[position] == int(reference(row.unsqueeze(0), rows))
            alone.tokens.append(sequence.tokens[position])
    for sequence in sequences:
        engine.free(sequence)
    engine.pool.check()


def test_penalties_do_not_depend_on_the_way(folder: Path) -> None:
    wanted = None
    for overlap in (False, True):
        for batch in (PENALTIES, PENALTIES[::-1]):
            engine = engine_of(folder, overlap)
            sequences = [sequence_of([8, 8, 40], sampling, 5) for sampling in batch]
            run(engine, sequences, 40)
            got = {str(sequence.sampling): sequence.tokens for sequence in sequences}
            wanted = wanted or got
            assert got == wanted


def test_a_step_is_plain_data() -> None:
    sequence = sequence_of(list(range(11)), Sampling(frequency_penalty=1.0, logit_bias={4: 1.0}))
    sequence.add_blocks([7, 2, 9])
    sequence.add_blocks([3, 8], 1, [1, 2])
    other = sequence_of([5, 6], Sampling(temperature=0.5))
    other.add_blocks([1])
    other.add_blocks([0], 1)
    other.num_computed = 1
    sequence.num_computed = 4
    step = lay_out([Work(other, 1), Work(sequence, 7)], 4, None, PenaltySlots(), 2)
    assert step.arrays["slots"].tolist() == [[5, 8, 9, 10, 11, 36, 37, 38], [1, 12, 13, 14, 15, 32, 33, 34]]
    assert step.arrays["span_blocks"].tolist() == [[7, 2, 9], [-1, 3, 8]]
    assert step.arrays["block_tables"].tolist() == [[[1]], [[0]]]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(ours, encode_step(step, eager=True))
        message = receive(theirs)
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)
    assert isinstance(message, Compute)
    assert message.eager
    again = step_of(message)
    assert again._replace(arrays={}) == step._replace(arrays={})
    assert again.arrays.keys() == step.arrays.keys()
    for name, array in step.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        assert again.arrays[name].dtype == array.dtype


def test_what_does_not_fit_is_told_in_bytes(folder: Path) -> None:
    engine = engine_of(folder, overlap=False)
    memory = DeviceMemory(total=80 << 30, free=10 << 30, weights=70 << 30, steps=9 << 30)
    assert memory.for_kv == 0
    error = lacking(engine.model.spec, engine.cache.layout, 70 << 30, memory, memory.total)
    assert "of 80.0 GiB" in error.message
    assert "weights take 70.0 GiB" in error.message
    assert "steps and their graphs 10.0 GiB" in error.message
    assert "each 1,000 tokens of KV" in error.message
    assert "kv.capacity" in error.fix
