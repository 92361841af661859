"""The engine on a GPU: equal to transformers, with CUDA graphs and without, in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import FAMILIES, greedy, make_checkpoint
from tandem.core.config import Config
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.engine.batch import Work
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.sequence import Sequence

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
        engine.pool.release(sequence.drop_blocks())
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
