"""Against transformers: random weights, float32, odd dimensions, every family; apart and together."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import FAMILIES, greedy, make_checkpoint
from support.pair import Pair
from tandem.core.config import Config
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.engine.batch import Work
from tandem.engine.build import build_engine
from tandem.engine.sequence import Sequence

VOCABULARY = 131
OUTPUT = 64


class Subject:
    """A family's checkpoint, prompts, and what transformers makes of them."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder = folder
        self.model: transformers.PreTrainedModel = make_checkpoint(family, folder)
        rng = random.Random(family)
        shared = [rng.randrange(VOCABULARY) for _ in range(100)]
        self.prompts = [
            shared[: rng.randrange(0, 101)] + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 90))]
            for _ in range(32)
        ]
        # Lengths at the edges of blocks, an exact repetition, and one token.
        self.prompts[:5] = [shared[:16], shared[:64], shared[:17], shared[:64], shared[:1]]

    def check(self, prompt: list[int], output: list[int]) -> None:
        """``output`` is what transformers continues ``prompt`` with: at every position its likeliest token is the
        next."""
        assert len(output) == OUTPUT
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + output])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output

    def config(self, **sections: object) -> Config:
        base: dict[str, object] = {"model": {"path": str(self.folder)}, "routing": {"local_prefill": "never"}}
        return Config.model_validate(base | sections)


# What deepseek_v2 does in another way than deepseek_v3 is in test_latent_attention.py.
@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "deepseek_v2"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


def capacity(block_tokens: int, tokens: int) -> dict[str, object]:
    """Room for ``tokens`` tokens, whatever the family's size of one."""
    return {"block_tokens": block_tokens, "capacity": tokens * 4 * 3 * 2 * 60}


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_logits(subject: Subject, chunk: int) -> None:
    """Every position's logits, whatever the chunks, to 1e-4."""
    config = subject.config(kv={"block_tokens": 8, "capacity": "4MiB"})
    engine = build_engine(config, 4, torch.device("cpu"), lambda *_: None).engine
    tokens = subject.prompts[7] + subject.prompts[8]
    sequence = Sequence("r", tokens, len(tokens), [Child(0, 0)], Sampling(logprobs=20), root_hash("m"), 20)
    assert engine.reserve(sequence, len(tokens))
    seen = []
    original = engine.model.forward

    def keep(*args: object) -> torch.Tensor:
        logits = original(*args)  # type: ignore[arg-type]
        seen.append(logits.clone())
        return logits

    engine.model.forward = keep  # type: ignore[assignment,method-assign]
    while sequence.num_computed < len(tokens):
        engine.step([Work(sequence, min(chunk, len(tokens) - sequence.num_computed))])
    with torch.inference_mode():
        want = subject.model(torch.tensor([tokens])).logits[0]
    got = torch.cat(seen)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("block_tokens", [8, 16, 64])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_one_sequence(subject: Subject, block_tokens: int, together: bool) -> None:
    pools: dict[str, object] = {"colocated": {}} if together else {}
    pair = Pair(subject.config(pools=pools, kv={"block_tokens": block_tokens, "capacity": "16MiB"}))
    for index in (0, 4, 9):
        prompt = subject.prompts[index]
        [output] = pair.generate([prompt], max_tokens=OUTPUT)
        subject.check(prompt, output)
    assert greedy(subject.model, prompt, OUTPUT) == output
    check_idle(pair)


@pytest.mark.parametrize(
    ("block_tokens", "chunk"), [(8, 16), (16, 512), (64, 33)], ids=["blocks8", "blocks16", "blocks64"]
)
@pytest.mark.parametrize("way", ["apart", "together", "ahead"])
def test_32_sequences_with_shared_prefixes(subject: Subject, block_tokens: int, chunk: int, way: str) -> None:
    pools: dict[str, object] = {"prefill": {"max_batched_tokens": chunk}, "decode": {}}
    if way != "apart":
        pools = {"colocated": {"max_batched_tokens": max(chunk, 40)}}
    pair = Pair(
        subject.config(pools=pools, kv={"block_tokens": block_tokens, "capacity": "32MiB", "layer_groups": 3}),
        way == "ahead",
    )
    got = pair.generate(subject.prompts, max_tokens=OUTPUT)
    for prompt, output in zip(subject.prompts, got, strict=True):
        subject.check(prompt, output)
    cached = sum(output.usage.cached_tokens for output in pair.outputs.values() if output.usage)
    assert cached > 0, "prefixes were to be shared"
    check_idle(pair)


@pytest.mark.parametrize(("prefill_tokens", "decode_tokens"), [(32, 16), (8, 8), (64, 4)])
def test_workers_with_unequal_caches(subject: Subject, prefill_tokens: int, decode_tokens: int) -> None:
    """Other blocks and other layer groups at the two ends; every byte is summed."""
    pools: dict[str, object] = {"prefill": {"max_batched_tokens": 40}, "decode": {}}
    kv = {"capacity": "32MiB", "checksums": True}
    pair = Pair(
        subject.config(pools=pools, kv=kv | {"block_tokens": decode_tokens, "layer_groups": 2}),
        prefill=subject.config(pools=pools, kv=kv | {"block_tokens": prefill_tokens, "layer_groups": 3}),
    )
    prompts = subject.prompts[:12]
    for prompt, output in zip(prompts, pair.generate(prompts, max_tokens=OUTPUT), strict=True):
        subject.check(prompt, output)
    assert all("transfer.done" in output.stages for output in pair.outputs.values())
    check_idle(pair)


@pytest.mark.parametrize("way", ["apart", "together", "ahead"])
def test_under_preemption(subject: Subject, way: str) -> None:
    """A cache too small for all: sequences give their blocks up, wait, and still say the same."""
    spec = build_engine(subject.config(kv={"capacity": "8MiB"}), 1, torch.device("cpu"), lambda *_: None)
    num_blocks = sum(12 if group.window else 20 for group in spec.engine.groups)
    model = {"path": str(subject.folder), "max_model_len": 256}
    kv = {"block_tokens": 16, "prefix_cache": subject.family != "llama"}
    kv["capacity"] = num_blocks * spec.engine.cache.layout.block_bytes
    limits = {"max_batched_tokens": 64}
    pools: dict[str, object] = {"prefill": limits, "decode": limits} if way == "apart" else {"colocated": limits}
    config = Config.model_validate({"model": model, "kv": kv, "pools": pools, "routing": {"local_prefill": "never"}})
    pair = Pair(config, way == "ahead")
    prompts = [prompt[:90] for prompt in subject.prompts[5:15]]
    for prompt, output in zip(prompts, pair.generate(prompts, max_tokens=OUTPUT), strict=True):
        subject.check(prompt, output)
    if not all(group.window for group in spec.engine.groups):  # a window's blocks do not grow with a sequence
        assert pair.decode.metrics.preemptions._value.get() > 0
    check_idle(pair)


def test_sampled_tokens_do_not_depend_on_the_way(subject: Subject) -> None:
    """The same seed gives the same text, alone or in a batch, in any chunks, apart or together."""
    sampling = Sampling(temperature=1.0)
    prompts = subject.prompts[:8]
    wanted: list[list[int]] | None = None
    for pools in (
        {"colocated": {}},
        {"colocated": {"max_batched_tokens": 17}},
        {"prefill": {"max_batched_tokens": 16}, "decode": {}},
        {"prefill": {}, "decode": {"max_running": 3}},
    ):
        pair = Pair(subject.config(pools=pools, kv={"block_tokens": 8, "capacity": "16MiB"}))
        tickets = [pair.submit(p, max_tokens=32, sampling=sampling, seeds=[100 + i]) for i, p in enumerate(prompts)]
        pair.run()
        got = [pair.outputs[ticket].tokens[0] for ticket in tickets]
        wanted = wanted or got
        assert got == wanted
    assert wanted != pair.generate(prompts, max_tokens=32), "temperature 1 is not greedy"


def test_logprobs_are_transformers(subject: Subject) -> None:
    prompt = subject.prompts[10]
    pair = Pair(subject.config(kv={"block_tokens": 8, "capacity": "16MiB"}))
    ticket = pair.submit(prompt, max_tokens=10, sampling=Sampling(logprobs=5), prompt_logprobs=3)
    pair.run()
    output = pair.outputs[ticket]
    tokens = prompt + output.tokens[0]
    with torch.inference_mode():
        want = subject.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert len(output.prompt_logprobs) == len(prompt) - 1
    everything = output.prompt_logprobs + output.logprobs[0]
    assert len(everything) == len(tokens) - 1
    for position, value in enumerate(everything):
        assert abs(value.chosen - want[position, tokens[position + 1]].item()) < 1e-4
        best = want[position].topk(len(value.top))
        torch.testing.assert_close(torch.tensor(value.top), best.values, atol=1e-4, rtol=0)
    check_idle(pair)


def check_idle(pair: Pair) -> None:
    """Every block is free again on every worker."""
    pair.run()
    for node in pair.nodes.values():
        node.check_idle()
    pair.close()
