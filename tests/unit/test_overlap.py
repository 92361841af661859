"""Random loads on a worker that runs a step ahead: the same tokens as one that does not, whatever ends when."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.pair import Pair
from tandem.core.config import Config
from tandem.core.messages import Sampling

LIMITS = {"max_batched_tokens": 48, "max_running": 12}
KINDS = [
    Sampling(),
    Sampling(temperature=0.9),
    Sampling(temperature=0.7, top_k=9, frequency_penalty=0.6),
    Sampling(repetition_penalty=1.4, logprobs=2),
    Sampling(temperature=1.0, logit_bias={4: 3.0}),
]


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_mixed", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, folder)
    return folder


def play(pair: Pair, seed: int) -> dict[int, tuple[dict[int, list[int]], int]]:
    """Requests that arrive and are aborted at random turns; what each got, and how many outputs it asked for."""
    rng = random.Random(seed)
    shared = [rng.randrange(131) for _ in range(40)]
    wanted: dict[int, int] = {}
    for _ in range(60):
        for _ in range(rng.choice((0, 0, 1, 2))):
            count = rng.choice((1, 1, 1, 3))
            prompt = shared[: rng.randrange(0, 41)] + [rng.randrange(131) for _ in range(rng.randrange(1, 30))]
            ticket = pair.submit(
                prompt,
                max_tokens=rng.randrange(1, 30),
                sampling=rng.choice(KINDS),
                stop_ids=[rng.randrange(131) for _ in range(rng.choice((0, 12)))],
                seeds=[rng.randrange(1 << 40) for _ in range(count)],
                prompt_logprobs=rng.choice((-1, -1, -1, 1)),
            )
            wanted[ticket] = count
        if wanted and rng.random() < 0.2:
            pair.abort(rng.choice(list(wanted)), rng.choice((-1, -1, 0, 1)))
        for _ in range(rng.randrange(1, 4)):
            pair.turn()
    pair.run()
    return {ticket: (pair.outputs[ticket].tokens, count) for ticket, count in wanted.items()}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "pools", [{"colocated": LIMITS}, {"prefill": LIMITS, "decode": LIMITS}], ids=["together", "apart"]
)
def test_the_same_as_without(folder: Path, pools: dict[str, object], seed: int) -> None:
    """Aborts fall at other moments, so an output may be longer or shorter, but never another; nothing stays behind."""
    results = []
    for overlap in (False, True):
        config = Config.model_validate(
            {
                "model": {"path": str(folder), "max_model_len": 128},
                "kv": {"block_tokens": 4, "capacity": 160_000},
                "pools": pools,
            }
        )
        pair = Pair(config, overlap)  # of some 50 blocks: streams give theirs up now and then
        results.append(play(pair, seed))
        for node in pair.nodes.values():
            node.check_idle()
            assert node.worker.drained()
        finished = {ticket: dict(output.finish) for ticket, output in pair.outputs.items()}
        results.append(finished)  # type: ignore[arg-type]
        pair.close()
    plain, plain_ends, ahead, ahead_ends = results
    assert plain.keys() == ahead.keys()
    same = 0
    for ticket, (tokens, count) in plain.items():
        for index in range(count):
            a, b = tokens.get(index, []), ahead[ticket][0].get(index, [])
            shorter = min(len(a), len(b))
            assert a[:shorter] == b[:shorter], f"seed {seed}, request {ticket}, output {index}"
            ended = index in plain_ends[ticket] and index in ahead_ends[ticket]
            assert not ended or a == b
            same += ended
    assert same > 10
