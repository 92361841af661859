"""DeepSeek-V2 against transformers, where it differs from V3: uncompressed queries, biases, and another routing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.pair import Pair
from tandem.core.config import Config


@pytest.mark.parametrize(
    ("changes", "num_ranks"),
    [
        ({}, (1, 1)),
        ({"topk_method": "greedy", "attention_bias": False, "first_k_dense_replace": 2}, (2, 1)),
        ({"q_lora_rank": 18, "n_group": 2, "topk_group": 1}, (1, 2)),
    ],
    ids=["grouped", "greedy", "compressed queries"],
)
def test_deepseek_v2(changes: dict[str, object], num_ranks: tuple[int, int], tmp_path: Path) -> None:
    """Prefill apart from decode, in chunks, unequal blocks and ranks: prompts' logits, and 24 greedy tokens."""
    model = make_checkpoint("deepseek_v2", tmp_path, **changes)

    def config(block_tokens: int) -> Config:
        return Config.model_validate(
            {
                "model": {"path": str(tmp_path)},
                "kv": {"block_tokens": block_tokens, "capacity": "2MiB", "checksums": True},
                "pools": {
                    "prefill": {"max_batched_tokens": 16, "tensor_parallel": num_ranks[0]},
                    "decode": {"tensor_parallel": num_ranks[1]},
                },
                "routing": {"local_prefill": "never"},
            }
        )

    pair = Pair(config(8), prefill=config(16))
    prompts = [[(7 * i * i + 13 * j) % 131 for j in range(length)] for i, length in enumerate((45, 9, 1))]
    outputs = pair.generate(prompts, max_tokens=24)
    ticket = pair.submit(prompts[0], max_tokens=1, prompt_logprobs=1)
    pair.run()
    assert any("transfer.done" in output.stages for output in pair.outputs.values())
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output
    with torch.inference_mode():
        want = model(torch.tensor([prompts[0]])).logits[0].log_softmax(-1)
    for position, value in enumerate(pair.outputs[ticket].prompt_logprobs):
        assert abs(value.chosen - want[position, prompts[0][position + 1]].item()) < 1e-4
    # Nothing but the latents and the shared keys was kept, or moved.
    layout = pair.decode.engine.cache.layout
    assert layout.token_bytes == 3 * (20 + 6) * 4
    pair.close()
