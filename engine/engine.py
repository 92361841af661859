"""The engine: runs plans over sequences, and keeps their blocks.

A plan is a list of (sequence, number of new tokens). The engine does not know whether it serves prefill or decode.

On a GPU the host runs a step ahead: `submit` queues a step, and the next one may be submitted before `collect` has told
the tokens of the first. A sequence whose newest token is not known yet is *pending*; the device knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.hashing import BlockHash
from ..core.messages import Child, SampledToken, TokenLogprobs
from .allocator import Allocator
from .batch import Work, lay_out
from .block_pool import BlockPool
from .kv_cache import KVCache
from .models.decoder import Decoder
from .penalty_counts import PenaltySlots
from .row_state import RowTable
from .runner import Results, Runner
from .sequence import Sequence


class Outcome(NamedTuple):
    """What a step did for one sequence."""

    sequence: Sequence
    first: int
    """Position of the first new token."""
    num_new: int
    samples: list[SampledToken | None] | None
    """For each of the sequence's children, its next token (None: the logits were not numbers); None when the step did
    not reach the sequence's last known token."""
    prompt_logprobs: list[TokenLogprobs]
    """Of the prompt tokens that follow the new ones, when the sequence asks for them."""
    hidden_states: Tensor | None = None
    """[tokens, layers, hidden] on the host, of those new tokens that are the prompt's, when the sequence asks."""


class _Part(NamedTuple):
    """A sequence's part of a step in flight."""

    sequence: Sequence
    first: int
    num_new: int
    num_draws: int
    wants_prompt: bool
    num_states: int


class Step(NamedTuple):
    """A step in flight."""

    number: int
    parts: list[_Part]
    logprob_draws: list[int]
    results: Results


def device_is_lost(error: RuntimeError) -> bool:
    """Whether a GPU cannot be used any more by this process: every error but lack of memory stays."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


class Engine:
    """A model, its cache and its pool. Owned by one thread.

    Args:
        runner: the model and what the device keeps.
        cache: memory for KV.
        prefix_cache: whether equal prefixes share blocks.
        rows: of the device's state; None: a step's tokens must be known before the next is submitted.
        max_chunk: tokens of the largest part of a prompt that is computed at once.

    Attributes:
        groups: of the model's layers; a sequence has a block table for each.
    """

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        prefix_cache: bool,
        rows: RowTable | None = None,
        max_chunk: int = 2048,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.groups = runner.model.groups
        self.pool = BlockPool(cache.num_blocks, cache.generations, prefix_cache)
        self.block_tokens = cache.layout.block_tokens
        self._allocator = Allocator(self.pool, self.groups, self.block_tokens, max_chunk)
        self.forward_s = 0.0
        """Time of the forward pass of the step that was collected last; on a GPU, of all its work."""
        self._first_after_copy = 0
        self._rows = rows
        self._penalty_slots = PenaltySlots()

    @property
    def model(self) -> Decoder:
        """What is computed."""
        return self.runner.model

    @property
    def overlaps(self) -> bool:
        """Whether a step may be submitted before the one before it is collected."""
        return self._rows is not None

    @property
    def copying(self) -> bool:
        """Whether other ranks may still be copying blocks, which nobody may write to: until a step that they take part
        in after that has ended."""
        return self._allocator.num_collected < self._first_after_copy

    def match_prefix(self, sequence: Sequence) -> int:
        """Give a sequence that has no blocks those of its longest cached prefix, leaving at least one token to compute.

        Returns:
            tokens that need not be computed.
        """
        if sequence.prompt_logprobs >= 0 or sequence.hidden_states:  # something of every prompt token is wanted
            return 0
        return self._allocator.match(sequence)

    def num_cached(self, keys: Several[BlockHash]) -> int:
        """How many blocks the longest cached prefix of ``keys`` has, in every group."""
        return self._allocator.num_cached(keys)

    def num_lacking(self, num_tokens: int, num_matched: int) -> int:
        """Blocks that a prompt takes when the prefix cache has its first ``num_matched``."""
        return self._allocator.num_lacking(num_tokens, num_matched)

    def reserve(self, sequence: Sequence, num_tokens: int, first_token: int | None = None) -> bool:
        """Give a sequence blocks for ``num_tokens`` tokens in all; False, and nothing, when there are not enough.

        Groups with a window give dead blocks back meanwhile. With ``first_token`` they get blocks for what the token at
        that position and later ones see, and for nothing before: earlier tokens are computed elsewhere.
        """
        if first_token is None and num_tokens <= sequence.num_reserved:
            return True
        return self._allocator.reserve(sequence, num_tokens, first_token)

    def reserve_prompt(self, sequence: Sequence, spare: int = 0, *, announced: bool = False) -> bool:
        """Give a sequence all blocks with which its tokens can be computed without waiting for others; False, and
        nothing, when there are not enough, or fewer than ``spare`` would be left. See `Allocator.reserve_prompt`."""
        return self._allocator.reserve_prompt(sequence, spare, announced=announced)

    def expect(self, sequence: Sequence) -> None:
        """The KV of a sequence that has a prompt's blocks comes from elsewhere: groups with a window need the last
        window's alone."""
        self._allocator.expect(sequence)

    def room(self, sequence: Sequence, num_new: int) -> int:
        """For how many of the next ``num_new`` tokens of a prompt there are blocks now."""
        return self._allocator.room(sequence, num_new)

    def trim(self, sequence: Sequence) -> None:
        """Take the blocks back that no token to come sees."""
        self._allocator.trim(sequence)

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; what it computed stays in the prefix cache until the blocks are reused."""
        self.commit(sequence)
        self._release(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back, and let nobody find what it computed: it went wrong."""
        self._allocator.uncache(sequence)
        self._release(sequence)

    def commit(self, sequence: Sequence) -> None:
        """Offer a sequence's full blocks to the prefix cache. A step in flight may still have to fill them: whoever
        finds them computes later."""
        if min(sequence.num_computed, sequence.num_tokens) // self.block_tokens > sequence.num_committed:
            self._allocator.commit(sequence)

    def fork(self, parent: Sequence, child: Child, request_id: str) -> Sequence | None:
        """A sequence with the same computed tokens: shares the full blocks, copies the last. None without a free
        block."""
        fork = Sequence(request_id, parent.tokens, parent.num_prompt_tokens, [child], parent.sampling, parent.root)
        copies = self._allocator.fork(parent, fork)
        if copies is None:
            return None
        for source, target in copies:
            self.runner.copy_block(source, target)
        if copies and self.model.group.size > 1:
            self._first_after_copy = self._allocator.num_submitted + 1
        return fork

    def submit(self, plan: Several[Work], publish: Callable[[int], None] | None = None) -> Step:
        """Start a step. The sequences must have blocks for their new tokens.

        A sequence may be part of several steps in flight, of at most one that samples for it beyond its known tokens.

        Args:
            plan: what to compute, in any order; at least one token.
            publish: called with a layer group's number as soon as its KV is in the cache, or queued to be.

        Returns:
            what `collect` takes, in the same order.
        """
        # Single tokens first, as the batch wants them; of those, long contexts first, which take longest.
        plan = sorted(plan, key=lambda work: (work.num_new > 1, -work.sequence.num_computed))
        step = lay_out(plan, self.block_tokens, self._rows, self._penalty_slots, len(self.groups))
        assert step.arrays["slots"].min() >= 0, "a token has no block"
        results = self.runner.run(step, publish)
        self._allocator.num_submitted += 1
        number = self._allocator.num_submitted
        parts = []
        for sequence, num_new in plan:
            first = sequence.num_computed
            reached = first + num_new == sequence.num_expected
            wants_prompt = sequence.prompt_logprobs >= 0 and first + 1 < sequence.num_prompt_tokens
            num_states = min(first + num_new, sequence.num_prompt_tokens) - first if sequence.hidden_states else 0
            num_draws = len(sequence.children) if reached else 0
            parts.append(_Part(sequence, first, num_new, num_draws, wants_prompt, max(num_states, 0)))
            sequence.num_computed += num_new
            sequence.last_step = number
            sequence.pending = reached
        return Step(number, parts, [draw for draw, _ in step.logprobs], results)

    def collect(self, step: Step) -> list[Outcome]:
        """Wait for a step.

        Returns:
            outcomes, in another order than the plan's; also of sequences that were freed since.

        Raises:
            WorkerError: a rank of several did not take part: this process can do nothing more.
        """
        tokens, logprobs, prompt_logprobs = step.results.wait()
        self.model.group.check()
        if self.model.experts is not None:
            self.model.experts.check()
        self.forward_s = step.results.forward_s
        self._allocator.collected(step.number)
        samples = [SampledToken(token) if token >= 0 else None for token in tokens]
        for draw, values in zip(step.logprob_draws, logprobs, strict=True):
            if tokens[draw] >= 0:
                samples[draw] = SampledToken(tokens[draw], values)
        of_prompts = iter(prompt_logprobs)
        outcomes = []
        states = step.results.hidden_states
        start = state = 0
        for sequence, first, num_new, num_draws, wants_prompt, num_states in step.parts:
            drawn = samples[start : start + num_draws] if num_draws else None
            start += num_draws
            if sequence.last_step == step.number:
                sequence.pending = False
            logprobs_of = next(of_prompts) if wants_prompt else []
            own = None
            if states is not None and num_states:
                own, state = states[state : state + num_states], state + num_states
            outcomes.append(Outcome(sequence, first, num_new, drawn, logprobs_of, own))
        return outcomes

    def step(self, plan: Several[Work], publish: Callable[[int], None] | None = None) -> list[Outcome]:
        """`submit` and `collect`."""
        return self.collect(self.submit(plan, publish))

    def accompany(self) -> bool:
        """With nothing to compute, take part in the next step of the ranks that share experts; see
        `Runner.accompany`."""
        return self.runner.accompany()

    def _release(self, sequence: Sequence) -> None:
        if self._rows is not None:
            self._rows.release(sequence)
        if sequence.penalty_slot >= 0:
            self._penalty_slots.give_back(sequence.penalty_slot)
            sequence.penalty_slot = -1
        self._allocator.release(sequence)
