"""Made-up conversations, as a trace: they share system prompts, and each turn repeats all that was said before."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from typing import NamedTuple

from ..kv_transfer.offload.trace import TRACE_BLOCK_TOKENS, TraceRequest


class Conversations(NamedTuple):
    """What the trace is drawn from. The same seed gives the same trace."""

    num_requests: int
    seed: int = 0
    requests_per_s: float = 3.0
    """Of all conversations together, in the long run."""
    mean_turns: float = 4.0
    """Of a conversation; geometric."""
    pause_s: float = 60.0
    """Mean time between a question and the next; exponential."""
    system_prompts: int = 8
    """How many there are; the first are used most."""
    system_tokens: int = 1024
    input_tokens: int = 2000
    """Mean length of what a turn adds; exponential, as some are long."""
    output_tokens: int = 350
    """Mean length of an answer; likewise."""
    block_tokens: int = TRACE_BLOCK_TOKENS

    def requests(self) -> Iterator[TraceRequest]:
        """The requests, in the order of their arrival."""
        rng = random.Random(self.seed)
        next_id = 0

        def new_ids(count: int) -> list[int]:
            nonlocal next_id
            next_id += count
            return list(range(next_id - count, next_id))

        prompts = [new_ids(self.system_tokens // self.block_tokens) for _ in range(self.system_prompts)]
        weights = [1 / (rank + 1) for rank in range(self.system_prompts)]
        pending: list[tuple[float, int, list[int], int]] = []
        next_start_s, started = 0.0, 0
        for _ in range(self.num_requests):
            if not pending or next_start_s <= pending[0][0]:
                full = list(rng.choices(prompts, weights)[0])
                heapq.heappush(pending, (next_start_s, started, full, self.system_tokens))
                started += 1
                next_start_s += rng.expovariate(self.requests_per_s / self.mean_turns)
            at_s, number, full, length = heapq.heappop(pending)
            length += 1 + round(rng.expovariate(1 / self.input_tokens))
            full += new_ids(length // self.block_tokens - len(full))
            # The rest of a block is another content than the whole of it later.
            rest = new_ids(1) if length % self.block_tokens else []
            output = 1 + round(rng.expovariate(1 / self.output_tokens))
            yield TraceRequest(round(at_s * 1e3), length, output, (*full, *rest))
            if rng.random() < 1 - 1 / self.mean_turns:
                next_s = at_s + rng.expovariate(1 / self.pause_s)
                heapq.heappush(pending, (next_s, number, full, length + output))
