"""Layers that see unequally far, against transformers: what is found again, shared, given up and handed over."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import greedy, make_checkpoint
from support.pair import Pair
from tandem.core.config import Config
from tandem.core.messages import Sampling

OUTPUT = 24
KINDS = {
    # The first layers see everything, the others 21 tokens.
    "qwen2": ("qwen2", {"max_window_layers": 2, "num_hidden_layers": 5}),
    "qwen3": ("qwen3_mixed", {}),
    # All see 37 tokens.
    "mistral": ("mistral", {}),
}


class Subject:
    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        family, changes = KINDS[kind]
        self.model: transformers.PreTrainedModel = make_checkpoint(family, folder, **changes)
        rng = random.Random(kind)
        self.shared = [rng.randrange(131) for _ in range(300)]
        self.tails = [[rng.randrange(131) for _ in range(rng.randrange(1, 40))] for _ in range(8)]

    def pair(self, ahead: bool = False, capacity: str | int = "16MiB", **pools: object) -> Pair:
        model = {"path": str(self.folder), "max_model_len": 512}
        kv = {"block_tokens": 8, "capacity": capacity, "layer_groups": 3}
        document = {"model": model, "kv": kv, "pools": pools, "routing": {"local_prefill": "never"}}
        return Pair(Config.model_validate(document), ahead)

    def check(self, prompt: list[int], output: list[int]) -> None:
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + output])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


WAYS = {
    "apart": (False, {"prefill": {"max_batched_tokens": 40}, "decode": {"max_batched_tokens": 40}}),
    "together": (False, {"colocated": {"max_batched_tokens": 40}}),
    "ahead": (True, {"colocated": {"max_batched_tokens": 40}}),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[bool, dict[str, object]]:
    return WAYS[request.param]


def check_idle(pair: Pair) -> None:
    pair.run()
    for node in pair.nodes.values():
        node.check_idle()
    pair.close()


def test_hits_far_beyond_the_window(subject: Subject, way: tuple[bool, dict[str, object]]) -> None:
    ahead, pools = way
    pair = subject.pair(ahead, **pools)
    prompts = [subject.shared + tail for tail in subject.tails]
    outputs = [pair.generate([prompt], max_tokens=OUTPUT)[0] for prompt in prompts[:2]]
    outputs += pair.generate(prompts[2:], max_tokens=OUTPUT)
    for prompt, output in zip(prompts, outputs, strict=True):
        subject.check(prompt, output)
    assert greedy(subject.model, prompts[0], OUTPUT) == outputs[0]
    # A long common prefix is computed once.
    assert sum(node.worker.report().prompt_tokens for node in pair.nodes.values()) < 300 + 8 * 48
    check_idle(pair)


def test_several_outputs(subject: Subject, way: tuple[bool, dict[str, object]]) -> None:
    ahead, pools = way
    sampling = Sampling(temperature=1.0)
    prompt = subject.shared[:203]
    pair = subject.pair(ahead, **pools)
    ticket = pair.submit(prompt, max_tokens=OUTPUT, sampling=sampling, seeds=[5, 6, 7])
    pair.run()
    together = pair.outputs[ticket].tokens
    fresh = subject.pair(ahead, **pools)
    for index, seed in enumerate((5, 6, 7)):
        alone = fresh.submit(prompt, max_tokens=OUTPUT, sampling=sampling, seeds=[seed])
        fresh.run()
        assert fresh.outputs[alone].tokens[0] == together[index]
    check_idle(pair)
    check_idle(fresh)


def test_hardly_any_blocks(subject: Subject, way: tuple[bool, dict[str, object]]) -> None:
    """As many as the longest sequence needs, and a few: prompts wait, streams give theirs up, and all end."""
    ahead, pools = way
    pair = subject.pair(ahead, **pools)
    layout, groups = pair.decode.engine.cache.layout, pair.decode.engine.groups
    pair.close()
    pair = subject.pair(ahead, sum(22 if group.window else 66 for group in groups) * layout.block_bytes, **pools)
    prompts = [subject.shared[: 37 * (i % 7) + 40] + tail for i, tail in enumerate(subject.tails)]
    prompts += [tail + subject.shared for tail in subject.tails]
    for prompt, output in zip(prompts, pair.generate(prompts, max_tokens=OUTPUT), strict=True):
        subject.check(prompt, output)
    check_idle(pair)


def test_a_handoff_carries_the_last_window(tmp_path: Path) -> None:
    subject = Subject("mistral", tmp_path)
    pair = subject.pair(prefill={"max_batched_tokens": 40}, decode={})
    prompt = subject.shared
    subject.check(prompt, pair.generate([prompt], max_tokens=OUTPUT)[0])
    report = pair.decode.worker.report()
    window_blocks = -(-37 // 8) + 1
    assert 0 < report.received_bytes <= window_blocks * pair.decode.engine.cache.layout.block_bytes
    # What was transferred is found again, and what lies before it was not asked for.
    again = prompt + subject.tails[0]
    subject.check(again, pair.generate([again], max_tokens=OUTPUT)[0])
    ticket = max(pair.outputs)
    usage = pair.outputs[ticket].usage
    assert usage is not None
    assert usage.cached_tokens >= 296
    check_idle(pair)


@pytest.mark.parametrize("turns", range(0, 12))
def test_the_prefill_worker_dies_at_any_moment(subject: Subject, turns: int) -> None:
    """Of a window, only all of it is of use: the prompt is computed from what was there before."""
    pair = subject.pair(prefill={"max_batched_tokens": 40}, decode={"max_batched_tokens": 40})
    first = subject.shared[:50]
    pair.generate([first], max_tokens=4)
    prompts = [subject.shared[:120] + tail for tail in subject.tails[:3]]
    tickets = [pair.submit(prompt, max_tokens=OUTPUT) for prompt in prompts]
    for _ in range(turns):
        pair.turn()
    pair.remove("prefill-0#1")
    pair.run()
    for prompt, ticket in zip(prompts, tickets, strict=True):
        subject.check(prompt, pair.outputs[ticket].tokens[0])
    check_idle(pair)
