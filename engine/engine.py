"""The engine: runs plans over sequences, and keeps their blocks.

A plan is a list of (sequence, number of new tokens). The engine does not know whether it serves prefill or decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch

from ..core.messages import Child, SampledToken, TokenLogprobs
from ..kernels.oracle import Ops
from .batch import Work, build_batch
from .block_pool import BlockPool
from .graphs import DecodeGraphs
from .kv_cache import KVCache
from .models.decoder import Decoder
from .sampler import Draw, logprobs_of, sample
from .sequence import Sequence


class Outcome(NamedTuple):
    """What a step did for one sequence."""

    sequence: Sequence
    num_new: int
    samples: list[SampledToken | None] | None
    """For each of the sequence's children, its next token (None: the logits were not numbers); None when the step did
    not reach the sequence's last known token."""
    prompt_logprobs: list[TokenLogprobs]
    """Of the prompt tokens that follow the new ones, when the sequence asks for them."""


class Engine:
    """A model, its cache and its pool. Owned by one thread.

    Args:
        model: with its weights.
        cache: memory for KV.
        prefix_cache: whether equal prefixes share blocks.
        layer_groups: first layer of each group of layers that is published as one.
        graphs: for decode steps on a GPU.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        prefix_cache: bool,
        layer_groups: Several[int],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.pool = BlockPool(cache.num_blocks, cache.generations, prefix_cache)
        self.block_tokens = cache.layout.block_tokens
        self.forward_s = 0.0
        """Time of the last step's forward pass."""
        self.graphs = graphs
        self._layer_groups = layer_groups
        self._ops: Ops = model.ops

    def match_prefix(self, sequence: Sequence) -> int:
        """Give a sequence that has no blocks those of its longest cached prefix, leaving at least one token to compute.

        Returns:
            tokens that need not be computed.
        """
        if sequence.prompt_logprobs >= 0:  # every prompt token's logits are wanted
            return 0
        whole = (sequence.num_tokens - 1) // self.block_tokens
        blocks = self.pool.match(sequence.keys(whole, self.block_tokens))
        self.pool.acquire(blocks)
        sequence.add_blocks(blocks)
        sequence.num_computed = len(blocks) * self.block_tokens
        sequence.num_committed = len(blocks)
        return sequence.num_computed

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence blocks for ``num_tokens`` tokens in all; False, and nothing, when there are not enough."""
        lacking = -(-num_tokens // self.block_tokens) - len(sequence.blocks)
        if lacking <= 0:
            return True
        blocks = self.pool.allocate(lacking)
        if blocks is None:
            return False
        sequence.add_blocks(blocks)
        return True

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; what it computed stays in the prefix cache until the blocks are reused."""
        self.commit(sequence)
        self.pool.release(sequence.drop_blocks())

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back, and let nobody find what it computed: it went wrong."""
        self.pool.uncache(sequence.blocks)
        self.pool.release(sequence.drop_blocks())

    def commit(self, sequence: Sequence) -> None:
        """Offer a sequence's full blocks to the prefix cache."""
        full = min(sequence.num_computed, sequence.num_tokens) // self.block_tokens
        if full > sequence.num_committed:
            keys = sequence.keys(full, self.block_tokens)
            for index in range(sequence.num_committed, full):
                self.pool.commit(sequence.blocks[index], keys[index])
            sequence.num_committed = full

    def fork(self, parent: Sequence, child: Child, request_id: str) -> Sequence | None:
        """A sequence with the same computed tokens: shares the full blocks, copies the last. None without a free
        block."""
        full = parent.num_computed // self.block_tokens
        partial = self.pool.allocate(1) if parent.num_computed % self.block_tokens else []
        if partial is None:
            return None
        fork = Sequence(request_id, parent.tokens, parent.num_prompt_tokens, [child], parent.sampling, parent.root)
        self.pool.acquire(parent.blocks[:full])
        fork.add_blocks(parent.blocks[:full] + partial)
        if partial:
            self.cache.tensor[partial[0]] = self.cache.tensor[parent.blocks[full]]
        fork.num_computed = parent.num_computed
        fork.num_committed = min(parent.num_committed, full)
        return fork

    def step(self, plan: Several[Work], publish: Callable[[int], None] | None = None) -> list[Outcome]:
        """Compute a plan. The sequences must have blocks for their new tokens.

        Args:
            plan: what to compute, in any order; at least one token.
            publish: called with a layer group's number as soon as its KV is in the cache.

        Returns:
            outcomes, in another order.
        """
        # Single tokens first, as the batch wants them.
        plan = sorted(plan, key=lambda work: work.num_new > 1)
        wants = [self._num_logits(work) for work in plan]
        batch = build_batch(plan, wants, self.block_tokens, self.model.device)
        start = time.perf_counter()
        if self.graphs is not None and publish is None and self.graphs.serves(batch):
            logits = self.graphs.run(batch)
        else:
            logits = self.model.forward(batch, self.cache.tensor, self._layer_groups, publish)
        self.forward_s = time.perf_counter() - start
        return self._finish(plan, wants, logits)

    @torch.inference_mode()
    def _finish(self, plan: Several[Work], wants: Several[int], logits: torch.Tensor) -> list[Outcome]:
        draws: list[Draw] = []
        reached: list[bool] = []
        end = 0
        prompt_logprobs: list[list[TokenLogprobs]] = []
        for (sequence, num_new), num_logits in zip(plan, wants, strict=True):
            end += num_logits
            reached.append(sequence.num_computed + num_new == sequence.num_tokens)
            if reached[-1]:
                draws.extend(Draw(end - 1, sequence, child.seed) for child in sequence.children)
            prompt_logprobs.append(self._prompt_logprobs(sequence, num_new, logits[end - num_logits : end]))
        drawn = iter(sample(logits, draws, self._ops) if draws else [])
        outcomes = []
        for (sequence, num_new), full, logprobs in zip(plan, reached, prompt_logprobs, strict=True):
            samples = [next(drawn) for _ in sequence.children] if full else None
            sequence.num_computed += num_new
            outcomes.append(Outcome(sequence, num_new, samples, logprobs))
        return outcomes

    def _num_logits(self, work: Work) -> int:
        """How many of a part's last rows need logits."""
        sequence, num_new = work
        if sequence.prompt_logprobs >= 0 and sequence.num_computed < sequence.num_prompt_tokens:
            return num_new
        return 1 if sequence.num_computed + num_new == sequence.num_tokens else 0

    def _prompt_logprobs(self, sequence: Sequence, num_new: int, logits: torch.Tensor) -> list[TokenLogprobs]:
        if sequence.prompt_logprobs < 0:
            return []
        first = sequence.num_computed + 1
        following = sequence.tokens[first : min(first + num_new, sequence.num_prompt_tokens)]
        if not following:
            return []
        tokens = torch.tensor(following, dtype=torch.int64, device=logits.device)
        return logprobs_of(logits[: len(following)], tokens, [sequence.prompt_logprobs] * len(following))
