"""The baseline process: reads batches of prompts as JSON lines, runs `generate` on each, writes how long it took.

Usage: transformers_batch.py MODEL_FOLDER THREADS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers


def main() -> None:
    """Serve until standard input ends."""
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    _run(model, [[i % vocabulary for i in range(32)]] * 2, 4)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = _run(model, request["prompts"], request["output_tokens"])
        print(json.dumps({"seconds": seconds}), flush=True)


def _run(model: Any, prompts: list[list[int]], output_tokens: int) -> float:
    ids = torch.tensor(prompts)
    start_s = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
