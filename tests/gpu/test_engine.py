"""The engine on a GPU: equal to transformers, with CUDA graphs and without, in any batch; and what it says when memory
lacks, or numbers do."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from support.checkpoints import FAMILIES, greedy, make_checkpoint
from support.quantized import CASES, make_quantized
from tandem.core.clock import SystemClock
from tandem.core.config import ColocatedPool, Config
from tandem.core.errors import ConfigError
from tandem.core.hashing import root_hash
from tandem.core.messages import Abort, Child, Generate, Message, Refused, Sampling, Stopping, Update
from tandem.core.metrics import WorkerMetrics
from tandem.decode.worker import DecodeWorker
from tandem.engine.batch import Work
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.connector import Connector
from tandem.kv_transfer.ends import End

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


def engine_of(folder: Path, dtype: str = "float32", kv_dtype: str = "auto") -> Engine:
    kv = {"block_tokens": 8, "capacity": "64MiB", "dtype": kv_dtype}
    config = Config.model_validate({"model": {"path": str(folder), "dtype": dtype}, "kv": kv})
    return build_engine(config, 16, torch.device("cuda"), lambda *_: None).engine


def generate(engine: Engine, prompts: list[list[int]], count: int, chunk: int = 50) -> list[list[int]]:
    """Prompts in chunks beside sequences that decode already; greedy."""
    sequences = [
        Sequence(f"r{i}", prompt, len(prompt), [Child(0, i)], Sampling(), root_hash("gpu"))
        for i, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        assert engine.reserve(sequence, sequence.num_tokens + count)
    while any(sequence.num_output_tokens < count for sequence in sequences):
        plan = [
            Work(sequence, min(chunk, sequence.num_tokens - sequence.num_computed))
            for sequence in sequences
            if sequence.num_output_tokens < count
        ]
        for outcome in engine.step(plan):
            if outcome.samples is not None:
                assert outcome.samples[0] is not None
                outcome.sequence.tokens.append(outcome.samples[0].token)
    for sequence in sequences:
        engine.discard(sequence)
    return [sequence.tokens[sequence.num_prompt_tokens :] for sequence in sequences]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equal_to_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path).cuda()
    prompts = [[(7 * i * i + j * 13) % 131 for j in range(length)] for i, length in enumerate((1, 9, 50, 51, 130))]
    want = [greedy(model, prompt, 40) for prompt in prompts]
    engine = engine_of(tmp_path)
    assert engine.runner.graphs is not None
    assert generate(engine, prompts, 40) == want
    # One by one, other graphs; then none.
    assert [generate(engine, [prompt], 40)[0] for prompt in prompts] == want
    engine.runner.graphs = None
    assert generate(engine, prompts, 40) == want


@pytest.mark.parametrize(("family", "layout", "sizes"), CASES, ids=[f"{f}-{layout}" for f, layout, _ in CASES])
def test_quantised_weights(family: str, layout: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Equal to transformers with what the weights say, in graphs and without."""
    if "fp8" in layout and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8, and torch serves without graphs")
    model = make_quantized(family, layout, tmp_path, **sizes).cuda()
    prompts = [[(7 * i * i + j * 13) % 131 for j in range(length)] for i, length in enumerate((1, 9, 70))]
    want = [greedy(model, prompt, 20) for prompt in prompts]
    engine = engine_of(tmp_path)
    assert engine.runner.graphs is not None
    assert generate(engine, prompts, 20) == want
    engine.runner.graphs = None
    assert generate(engine, prompts, 20) == want


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "auto"), ("float16", "auto"), ("bfloat16", "fp8_e4m3")])
@pytest.mark.parametrize("chunk", [50, 160])
def test_half_precision_stays_close(dtype: str, kv_dtype: str, chunk: int, tmp_path: Path) -> None:
    """The first logits are those of float32 but for rounding, whether the library computes the prompt's attention or
    the kernel over the blocks."""
    if kv_dtype == "fp8_e4m3" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    model = make_checkpoint("qwen3_moe", tmp_path)
    prompt = [(11 * j) % 131 for j in range(160)]
    with torch.no_grad():
        want = model(torch.tensor([prompt])).logits[0, -1]
    engine = engine_of(tmp_path, dtype, kv_dtype)
    seen: list[torch.Tensor] = []
    sample = engine.model.ops.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = sample(x, weight, bias)
        if weight is engine.model.head:
            seen.append(out.float().cpu())
        return out

    engine.runner.graphs = None
    engine.model.ops = engine.model.ops._replace(linear=linear)
    generate(engine, [prompt], 1, chunk)
    error = (seen[-1][-1] - want).norm() / want.norm()
    assert error < 0.1, error


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path)
    config = Config.model_validate({"model": {"path": str(tmp_path)}, "kv": {"capacity": "4000GiB"}})
    with pytest.raises(
        ConfigError, match=r"out of device memory: of .* GiB, .* weights take .* 1,000 tokens"
    ) as caught:
        build_engine(config, 16, torch.device("cuda"), lambda *_: None)
    assert "the largest steps and their graphs" in caught.value.message
    assert "kv.capacity" in caught.value.fix


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_sequence_without_numbers_fails_alone(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    engine = engine_of(tmp_path)
    good = [[(5 * i + j) % 100 for j in range(20 + i)] for i in range(6)]
    want = generate(engine, good, 20)
    bad = next(token for token in range(131) if all(token not in tokens for tokens in good + want))
    engine.model.embedding[bad] = float("nan")
    prompts = [*good[:3], [bad] * 9, *good[3:]]
    sequences = [
        Sequence(f"r{i}", prompt, len(prompt), [Child(0, i)], Sampling(), root_hash("gpu"))
        for i, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        assert engine.reserve(sequence, sequence.num_tokens + 20)
    running = list(sequences)
    while running:
        for outcome in engine.step([Work(s, s.num_tokens - s.num_computed) for s in running]):
            assert outcome.samples is not None
            if outcome.samples[0] is None:
                assert outcome.sequence is sequences[3]
                engine.discard(outcome.sequence)
                running.remove(outcome.sequence)
            else:
                outcome.sequence.tokens.append(outcome.samples[0].token)
        running = [s for s in running if s.num_output_tokens < 20]
    assert sequences[3].num_output_tokens == 0
    assert [s.tokens[s.num_prompt_tokens :] for s in sequences if s is not sequences[3]] == want


def test_ten_thousand_requests_fit_into_the_memory_that_was_planned(tmp_path: Path) -> None:
    """All of the GPU's memory is taken at the start; requests of every kind, at full load, some of them aborted, end
    without a lack of memory."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    pool = ColocatedPool(max_running=256, max_batched_tokens=4096, gpus_per_replica=1)
    config = Config.model_validate(
        {"model": {"path": str(tmp_path), "load": "dummy", "max_model_len": 40000}, "pools": {"colocated": pool}}
    )
    built = build_engine(config, 256, torch.device("cuda"), lambda *_: None, 4096)
    engine, cache = built.engine, built.engine.cache
    free, total = torch.cuda.mem_get_info()
    print(f"{engine.pool.num_blocks} blocks; {free / 2**20:.0f} MiB of {total / 2**30:.0f} GiB are free")
    ended: set[int] = set()

    def send(_: str, message: Message) -> None:
        if isinstance(message, Refused):
            raise AssertionError(message.message)
        if isinstance(message, Update):
            ended.update(child.ticket for child in message.children if child.finish is not None)

    metrics, clock = WorkerMetrics(CollectorRegistry()), SystemClock()
    layout = cache.layout
    connector = Connector(
        "colocated-0#1", built.fingerprint, layout, engine.groups, engine.runner.layer_groups,
        [End(range(layout.num_kv_heads), {})], "auto", 30, clock, metrics,
    )  # fmt: skip
    worker = DecodeWorker(engine, connector, pool, config, built.fingerprint, built.max_model_len, clock, metrics, send)
    rng = random.Random(1)
    kinds = [
        Sampling(),
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=1.0, top_k=40, presence_penalty=0.5, logprobs=5),
        Sampling(temperature=0.7, logit_bias={5: 1.0}, min_p=0.05),
    ]
    aborted = set()
    for ticket in range(10_000):
        length = 20_000 if ticket % 500 == 0 else rng.randrange(1, 600)
        prompt = [rng.randrange(1000) for _ in range(length)]
        children = [Child(index, rng.randrange(1 << 60)) for index in range(rng.choice((1, 1, 1, 3)))]
        stopping = Stopping(rng.randrange(1, 40))
        wanted = 2 if ticket % 50 == 0 and length < 600 else -1
        request = Generate(ticket, f"r{ticket}", prompt, length, children, rng.choice(kinds), stopping, wanted)
        worker.handle("gateway-0#1", request)
        if ticket % 97 == 0:
            aborted.add(ticket - 3)
            worker.handle("gateway-0#1", Abort([ticket - 3]) if ticket > 3 else Abort([]))
        if ticket % 4 == 0:
            worker.step()
    while worker.step():
        pass
    assert set(range(10_000)) - ended <= aborted
    assert worker.drained()
    engine.pool.check()
    assert engine.pool.num_free == engine.pool.num_blocks
    least = torch.cuda.mem_get_info()[0]
    print(f"{least / 2**20:.0f} MiB are free at the end; {metrics.preemptions._value.get():.0f} preemptions")


SMALL = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
