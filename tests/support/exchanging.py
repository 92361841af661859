"""What ranks do to test `kernels.expert_exchange`; each function is one rank's part."""

from __future__ import annotations

import os
import random
import time

import torch

NUM_LOCAL = 3
TOP_K = 3
MOST = 6
HIDDEN = 40
PROGRAMS = 5


def interpreted(rank: int, size: int, memories: list[torch.Tensor], gone: torch.Tensor, seed: int) -> int:
    """Under Triton's interpreter, in memory that processes share: many rounds of dispatch and combine, then one for
    which the last rank is late, until the others, who note it in ``gone``, have given up."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tandem.kernels import expert_exchange

    buffers = expert_exchange.Buffers(size, MOST, HIDDEN, TOP_K, NUM_LOCAL, torch.float32)
    addresses = [memory.data_ptr() for memory in memories]
    exchange = expert_exchange.Exchange(rank, addresses, memories[rank], buffers, PROGRAMS, polls=10_000_000)
    together, apart = random.Random(seed), random.Random(seed + 1 + rank)
    rounds = 12

    def pause() -> None:
        if apart.random() < 0.3:
            time.sleep(apart.random() * 0.01)

    for number in range(rounds):
        generator = torch.Generator().manual_seed(together.randrange(1 << 30))
        rows = together.randint(1, MOST)
        counts = [together.choice([0, rows, together.randint(0, rows)]) for _ in range(size)]
        x = [torch.randn(n, HIDDEN, generator=generator) for n in counts]
        weights = [torch.rand(n, TOP_K, generator=generator) for n in counts]
        chances = torch.rand(size * NUM_LOCAL, generator=generator) + 0.01
        slots = [
            torch.multinomial(chances.expand(max(n, 1), -1), TOP_K, generator=generator)[:n].contiguous()
            for n in counts
        ]
        # What fills a graph up goes nowhere, whatever it is.
        extra = apart.randint(0, rows - counts[rank]) if number % 2 else 0
        filled = [torch.cat([part, part.new_full((extra, part.shape[1]), 1)]) for part in (x[rank], weights[rank])]
        chosen = torch.cat([slots[rank], slots[rank].new_zeros(extra, TOP_K)])
        exchange.live.fill_(counts[rank])
        pause()
        got = exchange.dispatch(*filled, chosen, rows)
        want = expert_exchange.reference_dispatch(x, weights, slots, rank, rows, NUM_LOCAL)
        assert torch.equal(got.ids, want.ids), number
        comes = (want.ids >= 0).any(1)
        assert torch.equal(got.x[comes], want.x[comes]), number
        assert torch.equal(got.weights[comes], want.weights[comes]), number
        pause()
        each = number % 3 > 0
        out = _said(got.x, got.weights, got.ids, rank)
        loads = torch.full((NUM_LOCAL,), 7)
        back = exchange.combine(out if each else _summed(out, want.ids), chosen, rows, loads)
        assert loads.tolist() == [7 + int((want.ids == expert).sum()) for expert in range(NUM_LOCAL)]
        parts = []
        for other in range(size):
            there = expert_exchange.reference_dispatch(x, weights, slots, other, rows, NUM_LOCAL)
            whole = _summed(_said(*there, other), there.ids).view(size, rows, HIDDEN)
            parts.append(whole[rank, : counts[rank]])
        assert torch.equal(back[: counts[rank]], expert_exchange.reference_combine(parts, slots[rank], NUM_LOCAL))
        assert not back[counts[rank] :].any()
    assert exchange.told_so_far.tolist() == [rounds * PROGRAMS] * 2
    assert not exchange.missing()
    exchange.polls.fill_(5_000)  # enough for a peer that is slow
    exchange.live.fill_(1)
    one = torch.ones(1, HIDDEN), torch.ones(1, TOP_K), torch.zeros(1, TOP_K, dtype=torch.int64)

    def ask() -> torch.Tensor:
        arrived = exchange.dispatch(*one, 1)
        return exchange.combine(arrived.x.clone(), one[2], 1, torch.zeros(NUM_LOCAL, dtype=torch.int64))

    if rank < size - 1:
        for _ in range(2):
            assert ask().isnan().all()
            assert exchange.missing() == [size - 1]
        gone[rank] = 1
        return rounds
    # It is late, and finds what the others left for this call; then they are silent.
    while int(gone.sum()) < size - 1:
        time.sleep(0.01)
    arrived = exchange.dispatch(*one, 1)
    assert not exchange.missing()
    assert exchange.combine(arrived.x.clone(), one[2], 1, torch.zeros(NUM_LOCAL, dtype=torch.int64)).isnan().all()
    assert exchange.missing() == list(range(size - 1))
    assert ask().isnan().all()
    return rounds


def _said(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rank: int) -> torch.Tensor:
    """[tokens, top_k, hidden]: what a rank's experts would say, and NaN where there is none."""
    out = x.unsqueeze(1) * (ids + rank * NUM_LOCAL + 1).unsqueeze(2) * weights.unsqueeze(2)
    return torch.where((ids >= 0).unsqueeze(2), out, torch.nan)


def _summed(out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As the kernel adds: in the order of choices."""
    total = torch.zeros(len(out), out.shape[2])
    for k in range(out.shape[1]):
        total += torch.where((ids[:, k] >= 0).unsqueeze(1), out[:, k], 0)
    return torch.where((ids >= 0).any(1, keepdim=True), total, torch.nan)
