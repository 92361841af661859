"""Exchanges over peers' memory, by processes under Triton's interpreter; `test_expert_parallel` has them on GPUs."""

from __future__ import annotations

import pytest
import torch
from support import exchanging
from support.ranks import run_ranks
from tandem.kernels import expert_exchange, on_gpu

pytestmark = [
    pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs exchange by themselves: test_expert_parallel"),
]


def test_many_rounds_in_shared_memory(seed: int) -> None:
    """Three processes, rows and choices at random, with pauses: always the bits of the reference. Who leaves is missed."""
    buffers = expert_exchange.Buffers(
        3, exchanging.MOST, exchanging.HIDDEN, exchanging.TOP_K, exchanging.NUM_LOCAL, torch.float32
    )
    memories = [torch.zeros(buffers.num_bytes, dtype=torch.uint8).share_memory_() for _ in range(3)]
    gone = torch.zeros(3, dtype=torch.int64).share_memory_()
    assert len(set(run_ranks(3, exchanging.interpreted, memories, gone, seed, timeout_s=600))) == 1
