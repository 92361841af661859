"""The all-reduce over peers' memory, by processes under Triton's interpreter; `test_tensor_parallel` has it on GPUs."""

from __future__ import annotations

import pytest
import torch
from support.adding import interpreted
from support.ranks import run_ranks
from tandem.kernels import all_reduce, on_gpu

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")


def test_many_calls_in_shared_memory(seed: int) -> None:
    """Three processes, sizes and types mixed, with pauses: always the bits of the reference. Who leaves is missed."""
    memories = [torch.zeros(all_reduce.memory_bytes(3), dtype=torch.uint8).share_memory_() for _ in range(3)]
    gone = torch.zeros(3, dtype=torch.int64).share_memory_()
    assert len(set(run_ranks(3, interpreted, memories, gone, seed))) == 1


def test_the_order_of_ranks_decides_the_bits() -> None:
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]
    assert all_reduce.reference(parts).item() == 0.0
    assert all_reduce.reference([parts[0], parts[2], parts[1]]).item() == 1.0
    half = [torch.full((2,), 2049.0, dtype=torch.float16), torch.full((2,), -2048.0, dtype=torch.float16)]
    assert all_reduce.reference(half).tolist() == [0.0, 0.0]


def test_what_it_serves() -> None:
    assert all_reduce.serves(torch.empty(all_reduce.MAX_BYTES // 2, dtype=torch.bfloat16))
    assert not all_reduce.serves(torch.empty(all_reduce.MAX_BYTES // 2, dtype=torch.float32))
    assert not all_reduce.serves(torch.empty(0))
