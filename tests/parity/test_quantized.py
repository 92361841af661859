"""Quantised checkpoints, as published, against transformers with what their weights say: float32, logits to 1e-4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pair import Pair
from support.quantized import CASES, make_quantized
from tandem.core.config import Config


@pytest.mark.parametrize(("family", "layout", "sizes"), CASES, ids=[f"{f}-{layout}" for f, layout, _ in CASES])
def test_a_published_layout(family: str, layout: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Prefill apart from decode: prompts' logits, and 24 greedy tokens."""
    model = make_quantized(family, layout, tmp_path, **sizes)
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "kv": {"block_tokens": 8, "capacity": "4MiB"},
            "pools": {"prefill": {"max_batched_tokens": 16}, "decode": {}},
            "routing": {"local_prefill": "never"},
        }
    )
    pair = Pair(config)
    prompts = [[(7 * i * i + 13 * j) % 131 for j in range(length)] for i, length in enumerate((45, 9, 1))]
    outputs = pair.generate(prompts, max_tokens=24)
    tickets = [pair.submit(prompt, max_tokens=1, prompt_logprobs=1) for prompt in prompts[:1]]
    pair.run()
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output
    with torch.inference_mode():
        want = model(torch.tensor([prompts[0]])).logits[0].log_softmax(-1)
    for position, value in enumerate(pair.outputs[tickets[0]].prompt_logprobs):
        assert abs(value.chosen - want[position, prompts[0][position + 1]].item()) < 1e-4
    pair.close()
