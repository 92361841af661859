"""What dispatch and combine take between ranks of one host: through peers' memory, and by NCCL's all-to-all beside it.

NCCL is told beforehand how many rows come from where, and its rows are packed before the clock runs: what is measured
of it is the exchange alone. Ours reads tokens and routing as a layer has them, and adds up what comes back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.tensor_parallel import TorchGroup
from ..kernels.expert_exchange import Buffers, Exchange
from ..kernels.peer_memory import PeerMemory

_ALTERNATIONS = 3


class Task(NamedTuple):
    """What a rank is to measure.

    Args:
        device: "cuda" or "cpu"; there, kernels are interpreted, and figures mean nothing.
        tokens: of each rank.
        hidden: numbers of a token.
        experts: of all ranks.
        top_k: experts of a token.
        dtype: of tokens.
        programs: that write at a time.
        rounds: in one CUDA graph.
        replays: of it, of which each is a sample; three times as many in all.
    """

    device: str
    tokens: int
    hidden: int
    experts: int
    top_k: int
    dtype: str
    programs: int
    rounds: int
    replays: int


class _Clock:
    """Times a round: a mean over those of one graph, a sample for each replay."""

    def __init__(self, group: TorchGroup, device: torch.device, task: Task) -> None:
        self._group, self._device, self._task = group, device, task

    def prepare(self, run: Callable[[], object]) -> Callable[[], list[float]]:
        """What measures ``run``, and returns microseconds of a round."""
        run()
        run()
        if self._device.type == "cpu":
            return lambda: [self._wall(run) for _ in range(self._task.replays)]
        torch.cuda.synchronize()
        self._group.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(self._task.rounds):
                run()
        return lambda: self._replays(graph)

    def _wall(self, run: Callable[[], object]) -> float:
        start_s = time.perf_counter()
        for _ in range(self._task.rounds):
            run()
        return (time.perf_counter() - start_s) * 1e6 / self._task.rounds

    def _replays(self, graph: torch.cuda.CUDAGraph) -> list[float]:
        graph.replay()
        torch.cuda.synchronize()
        self._group.barrier()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self._task.replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 / self._task.rounds for start, end in itertools.pairwise(events)]


def measure(rank: int, size: int, task: Task, folder: str) -> list[dict[str, Any]]:
    """One rank's part; what it found. Blocks until all are done.

    Args:
        rank: this one.
        size: of all.
        task: the same for all.
        folder: of this run, where ranks meet.

    Raises:
        ConfigError: GPUs cannot map each other's memory.
    """
    device = torch.device(task.device, rank) if task.device == "cuda" else torch.device("cpu")
    dtype = getattr(torch, task.dtype)
    num_local = -(-task.experts // size)
    buffers = Buffers(size, task.tokens, task.hidden, task.top_k, num_local, dtype)
    group = TorchGroup(rank, size, f"file://{folder}/rendezvous", device, direct=False)
    memory: PeerMemory | None = None
    if device.type == "cuda":
        memory = PeerMemory(buffers.num_bytes, rank, device, group.exchange)
        addresses, own = memory.addresses, memory.own()
    else:
        memories = [_mapped(Path(folder) / f"memory-{other}", buffers.num_bytes) for other in range(size)]
        addresses, own = [tensor.data_ptr() for tensor in memories], memories[rank]
        group.barrier()
    exchange = Exchange(rank, addresses, own, buffers, task.programs)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(task.tokens, task.hidden, generator=generator).to(device, dtype)
    chances = torch.ones(task.tokens, task.experts)
    slots = torch.multinomial(chances, task.top_k, generator=generator).to(device)
    weights = torch.rand(task.tokens, task.top_k, generator=generator).to(device)
    exchange.live.fill_(task.tokens)
    loads = torch.zeros(num_local, dtype=torch.int64, device=device)
    arrived = exchange.dispatch(x, weights, slots, task.tokens)
    out = arrived.x.unsqueeze(1) * arrived.weights.unsqueeze(2).to(dtype)
    back = exchange.combine(out, slots, task.tokens, loads)
    _check(back, x, weights)

    def ours() -> None:
        exchange.dispatch(x, weights, slots, task.tokens)
        exchange.combine(out, slots, task.tokens, loads)

    goes = (slots.unsqueeze(0) // num_local == torch.arange(size, device=device).view(-1, 1, 1)).any(-1)
    sent = goes.sum(1).tolist()
    received = [counts[rank] for counts in _gathered(group, sent)]
    sending = x[goes.nonzero(as_tuple=True)[1]]
    coming = x.new_empty(sum(received), task.hidden)

    def there() -> None:
        dist.all_to_all_single(coming, sending, received, sent)

    def here() -> None:
        dist.all_to_all_single(sending, coming, sent, received)

    def library() -> None:
        there()
        here()

    # What is sent again and again without an answer is overwritten while it is read: of no use, but for the clock.
    runs: dict[tuple[str, str], Callable[[], object]] = {
        ("dispatch + combine", "peer memory"): ours,
        ("dispatch + combine", "all-to-all"): library,
        ("dispatch", "peer memory"): lambda: exchange.dispatch(x, weights, slots, task.tokens),
        ("dispatch", "all-to-all"): there,
        ("combine", "peer memory"): lambda: exchange.combine(out, slots, task.tokens, loads),
        ("combine", "all-to-all"): here,
    }
    samples = _samples(runs, _Clock(group, device, task), group)
    assert not exchange.missing(), f"ranks {exchange.missing()} were missed"
    sent_bytes = (sum(sent) - sent[rank]) * task.hidden * dtype.itemsize
    found = [_record(*name, values, sent_bytes) for name, values in samples.items()]
    group.barrier()
    if memory is not None:
        torch.cuda.synchronize()
        memory.close()
    group.close()
    return found


def _samples(
    runs: Mapping[tuple[str, str], Callable[[], object]], clock: _Clock, group: TorchGroup
) -> dict[tuple[str, str], list[float]]:
    """Microseconds of each, in turns. What recorded them is gone at the end: NCCL waits for its graphs when it ends."""
    clocks = {name: clock.prepare(run) for name, run in runs.items()}
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(_ALTERNATIONS):
        for name, take in clocks.items():
            group.barrier()
            samples[name] += take()
    return samples


def _record(operation: str, by: str, samples: list[float], sent_bytes: int) -> dict[str, Any]:
    p50, p99 = (float(np.percentile(samples, percent)) for percent in (50, 99))
    ways = 2 if "+" in operation else 1
    return {
        "operation": operation,
        "by": by,
        "p50_us": round(p50, 1),
        "p99_us": round(p99, 1),
        "n": len(samples),
        "sent_mib": round(ways * sent_bytes / 2**20, 2),
        "gb_per_s": round(ways * sent_bytes / p50 / 1e3, 1),
    }


def _check(back: Tensor, x: Tensor, weights: Tensor) -> None:
    """Experts that do nothing give each token back, times the sum of its weights."""
    want = x.double() * weights.double().sum(1, keepdim=True)
    error = float((back.double() - want).norm() / want.norm())
    # A product, a sum at each rank, and one over ranks are rounded.
    assert error < 4 * torch.finfo(x.dtype).eps, f"what comes back is wrong: {error:.1e}"


def _gathered(group: TorchGroup, counts: list[int]) -> list[list[int]]:
    each = group.exchange(np.array(counts, np.int64).tobytes())
    return [np.frombuffer(data, np.int64).tolist() for data in each]


def _mapped(path: Path, num_bytes: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
