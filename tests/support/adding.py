"""What ranks do to test `kernels.all_reduce`; each function is one rank's part."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXACT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def interpreted(rank: int, size: int, memories: list[torch.Tensor], gone: torch.Tensor, seed: int) -> int:
    """Under Triton's interpreter, in memory that processes share: many calls, then one for which the last rank is late,
    until the others, who note it in ``gone``, have given up."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tandem.kernels import all_reduce

    cpu = torch.device("cpu")
    peers = all_reduce.Peers(rank, [memory.data_ptr() for memory in memories], cpu, polls=1_000_000)
    together = random.Random(seed)
    apart = random.Random(seed + 1 + rank)
    blocks = 0
    for call in range(60):
        dtype = together.choice([torch.float32, torch.float16])
        largest = all_reduce.MAX_BYTES // dtype.itemsize
        numel = largest if call == 30 else together.choice([1, 2, 17, 2048, 4096, 4097, 20_000])
        generator = torch.Generator().manual_seed(together.randrange(1 << 30))
        parts = [torch.randn(numel, generator=generator).to(dtype) for _ in range(size)]
        want = all_reduce.reference(parts)
        if apart.random() < 0.3:
            time.sleep(apart.random() * 0.01)
        got = all_reduce.fused(parts[rank], peers)
        assert got is parts[rank]
        assert torch.equal(got, want), f"call {call} of {numel} {dtype}"
        blocks += -(-numel * dtype.itemsize // 8192)
    assert int(peers.calls.sum()) == blocks
    assert not peers.missing()
    peers.polls = 2_000
    if rank < size - 1:
        for _ in range(2):
            assert all_reduce.fused(torch.ones(2000), peers).isnan().all()
            assert peers.missing() == [size - 1]
        gone[rank] = 1
        return blocks
    # It is late, and finds what the others left for this call; then they are silent.
    while int(gone.sum()) < size - 1:
        time.sleep(0.01)
    assert (all_reduce.fused(torch.ones(2000), peers) == size).all()
    assert all_reduce.fused(torch.ones(2000), peers).isnan().all()
    assert peers.missing() == list(range(size - 1))
    return blocks


def on_gpus(rank: int, size: int, rendezvous: str, seed: int) -> list[tuple[int, float, float]]:
    """A thousand calls, with pauses; the same in a graph; the time of each size; and some without the last rank.

    Returns:
        (KiB, µs through peers' memory or NaN, µs through NCCL) for each size.
    """
    import torch.distributed as dist
    from tandem.core.errors import WorkerError
    from tandem.engine.tensor_parallel import TorchGroup
    from tandem.kernels import all_reduce

    device = torch.device("cuda", rank)
    group = TorchGroup(rank, size, rendezvous, device)
    assert not group.why_not_direct, group.why_not_direct
    together, apart = random.Random(seed), random.Random(seed + 1 + rank)

    def parts_of(numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(together.randrange(1 << 30))
        return [torch.randn(numel, generator=generator, device=device).to(dtype) for _ in range(size)]

    def shape() -> tuple[int, torch.dtype]:
        dtype = together.choice(DTYPES)
        return max(1, int(2 ** (together.random() * 19)) // dtype.itemsize), dtype

    def check(got: torch.Tensor, parts: list[torch.Tensor]) -> None:
        assert torch.equal(got, all_reduce.reference(parts)), (got.shape, got.dtype)
        exact = sum(part.double() for part in parts)
        # In units of what was added: the sum of one number from each rank may be next to nothing.
        added = sum(part.double().abs() for part in parts)
        assert (got.double() - exact).norm() <= EXACT[got.dtype] * added.norm()

    def pause() -> None:
        if apart.random() < 0.2:
            torch.cuda._sleep(apart.randrange(300_000))
        if apart.random() < 0.05:
            time.sleep(apart.random() * 0.005)

    for _ in range(20):
        inputs = [parts_of(*shape()) for _ in range(50)]
        sums = [parts[rank].clone() for parts in inputs]
        for x in sums:
            pause()
            assert group.all_reduce(x) is x
        for x, parts in zip(sums, inputs, strict=True):
            check(x, parts)

    shapes = [shape() for _ in range(8)]
    given = [torch.empty(numel, dtype=dtype, device=device) for numel, dtype in shapes]
    sums = [group.all_reduce(torch.zeros_like(x)) for x in given]  # compiles what the graph records
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for x, source in zip(sums, given, strict=True):
            group.all_reduce(x.copy_(source))
    for replay in range(200):
        inputs = [parts_of(*wanted) for wanted in shapes]
        for source, parts in zip(given, inputs, strict=True):
            source.copy_(parts[rank])
        pause()
        graph.replay()
        if replay % 3 == 0:  # another number of programs between two replays
            group.all_reduce(torch.ones(1 + replay * 100, device=device))
        for x, parts in zip(sums, inputs, strict=True):
            check(x, parts)
    group.check()

    def microseconds(operation: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
        count, replays = 50, 20
        operation(x)
        timed = torch.cuda.CUDAGraph()
        with torch.cuda.graph(timed, capture_error_mode="thread_local"):
            for _ in range(count):
                operation(x)
        timed.replay()
        torch.cuda.synchronize()
        group.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            timed.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / count / replays

    table = []
    for kib in (8, 16, 32, 64, 128, 256, 512, 1024):
        x = torch.zeros(kib * 512, dtype=torch.bfloat16, device=device)
        ours = microseconds(group.all_reduce, x) if all_reduce.serves(x) else float("nan")
        table.append((kib, ours, microseconds(dist.all_reduce, x)))

    assert group._peers is not None
    group._peers.polls = 1_000_000
    group.barrier()
    if rank < size - 1:
        for _ in range(3):
            assert group.all_reduce(torch.ones(2000, device=device)).isnan().all()
        with pytest.raises(WorkerError, match=f"rank {rank} of {size} waited in vain for rank {size - 1}"):
            group.check()
    group.barrier()
    if rank == size - 1:
        assert (group.all_reduce(torch.ones(2000, device=device)) == size).all()
        assert group.all_reduce(torch.ones(2000, device=device)).isnan().all()
        with pytest.raises(WorkerError, match=f"rank {rank} of {size} waited in vain for rank 0"):
            group.check()
    group.barrier()
    return table
