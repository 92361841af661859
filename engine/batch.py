"""One step's input: a plan, laid out as arrays on the host, and the tensors that the model computes with."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..kernels.prefill_attention import Spans
from .draws import Draws, Fill
from .penalty_counts import PenaltySlots
from .row_state import RowTable
from .sequence import Sequence


def ladder(max_rows: int) -> list[int]:
    """Batch sizes that get a graph: a batch runs in the next larger one."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 16)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class GroupBlocks(NamedTuple):
    """Where the KV of a batch lies, in the blocks of one KV group."""

    slots: Tensor
    """[tokens] int64: where each token's KV goes."""
    block_tables: Tensor
    """[num_single, blocks] int64; entries of dead blocks are not read."""
    spans: Spans | None
    """Further rows: several new tokens of a sequence each."""


class Batch(NamedTuple):
    """Tokens to compute. Sequences with one new token come first."""

    tokens: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64."""
    num_single: int
    """How many of the first rows are sequences with one new token and a context."""
    context_lens: Tensor
    """[num_single] int64."""
    groups: tuple[GroupBlocks, ...]
    """For each KV group."""
    logit_rows: Tensor | None
    """[rows] int64: which rows' logits are wanted; None: all."""


class Work(NamedTuple):
    """A part of a plan: compute the next ``num_new`` tokens of a sequence."""

    sequence: Sequence
    num_new: int


class PromptRange(NamedTuple):
    """Logits ``start`` … are of a prompt's tokens: the log probabilities of those that follow are wanted."""

    start: int
    tokens: list[int]
    num_top: int


class StepInput(NamedTuple):
    """All that a step needs, as plain data: whoever has the model and the cache can compute it.

    ``arrays``, int64 unless said otherwise; *draws* are the tokens to sample:

    - tokens (negative: the last one sampled for the sequence's row), positions: [tokens]
    - slots: [KV groups, tokens]
    - rows: [num_single], of the state that the device keeps; where it keeps none, block_tables [KV groups, num_single,
      blocks] and context_lens [num_single] instead
    - table_places, table_blocks: entries of that state's flattened block tables that it does not have yet
    - span_table [spans, 4], span_blocks [KV groups, entries]: see `Spans`
    - logit_rows: [logits]
    - draw_logits: [draws], which of the logits each is drawn from; not there: each from its own
    - draw_rows: [draws], the row of the state that takes the token
    - temperature, top_p, min_p: [draws] float32; top_k, seed, draw_positions: [draws]
    - of adjusted draws: see `Draws`
    """

    arrays: dict[str, np.ndarray]
    num_single: int
    num_draws: int
    greedy: bool
    """Whether every draw takes the likeliest token."""
    adjusted: bool
    """Whether penalties or biases change some logits before the draw."""
    fills: list[Fill]
    logprobs: list[tuple[int, int]]
    """Draws whose log probability is wanted, each with its number of alternatives."""
    prompt_logprobs: list[PromptRange]
    hidden_states: list[tuple[int, int]]
    """First row, and one past the last, of tokens whose hidden states are wanted."""

    @property
    def decodes(self) -> bool:
        """Whether every row is one new token of a sequence, and is drawn from once."""
        return "span_table" not in self.arrays and len(self.arrays["logit_rows"]) == self.num_single == self.num_draws


def lay_out(
    plan: Several[Work], block_tokens: int, table: RowTable | None, slots: PenaltySlots, num_groups: int = 1
) -> StepInput:
    """Lay a plan out.

    Args:
        plan: sequences with one new token first, then those with more.
        block_tokens: tokens a block.
        num_groups: KV groups of the model.
        table: which rows of the device's state the sequences have; None: it keeps none.
        slots: which counts they have, those with penalties.
    """
    tokens: list[int] = []
    positions: list[int] = []
    every_group = range(num_groups)
    kv_slots: list[list[int]] = [[] for _ in every_group]
    logit_rows: list[int] = []
    single: list[Sequence] = []
    spans: list[tuple[int, int, int, int]] = []
    span_blocks: list[list[np.ndarray]] = [[] for _ in every_group]
    num_blocks = 0
    draws = Draws(slots)
    prompt_logprobs: list[PromptRange] = []
    hidden_states: list[tuple[int, int]] = []
    for sequence, num_new in plan:
        first = sequence.num_computed
        last = first + num_new
        if table is not None:
            table.assign(sequence)
        if num_new == 1:
            single.append(sequence)
            known = sequence.tokens
            tokens.append(known[first] if first < len(known) else ~sequence.row)
            positions.append(first)
            for group in every_group:
                block = sequence.tables[group][first // block_tokens]
                kv_slots[group].append(block * block_tokens + first % block_tokens)
        else:
            used = -(-last // block_tokens)
            spans.append((len(tokens), num_new, last, num_blocks))
            num_blocks += used
            tokens.extend(sequence.tokens[first:last])
            position = np.arange(first, last)
            positions.extend(range(first, last))
            for group, array in enumerate(sequence.arrays):
                span_blocks[group].append(array[:used])
                places = array[position // block_tokens] * block_tokens + position % block_tokens
                kv_slots[group].extend(places.tolist())
        if sequence.hidden_states and first < sequence.num_prompt_tokens:
            start = len(tokens) - num_new
            hidden_states.append((start, start + min(last, sequence.num_prompt_tokens) - first))
        reached = last == sequence.num_expected
        if sequence.prompt_logprobs >= 0 and first < sequence.num_prompt_tokens:
            following = sequence.tokens[first + 1 : min(last + 1, sequence.num_prompt_tokens)]
            if following:
                prompt_logprobs.append(PromptRange(len(logit_rows), following, sequence.prompt_logprobs))
            logit_rows.extend(range(len(tokens) - num_new, len(tokens)))
        elif reached:
            logit_rows.append(len(tokens) - 1)
        if reached:
            draws.add(sequence, len(logit_rows) - 1, num_new == 1)
    arrays = {
        "tokens": np.array(tokens, np.int64),
        "positions": np.array(positions, np.int64),
        "slots": np.array(kv_slots, np.int64),
        "logit_rows": np.array(logit_rows, np.int64),
        **draws.arrays(len(logit_rows)),
    }
    if spans:
        arrays["span_table"] = np.array(spans, np.int64)
        arrays["span_blocks"] = np.stack([np.concatenate(blocks) for blocks in span_blocks])
    if table is None:
        arrays |= _block_tables(single, block_tokens, num_groups)
    else:
        arrays |= table.arrays(single, block_tokens)
        arrays["draw_rows"] = np.array(draws.rows(table.spare), np.int64)
    return StepInput(
        arrays, len(single), len(draws), draws.greedy, draws.adjusted, draws.fills, draws.logprobs,
        prompt_logprobs, hidden_states,
    )  # fmt: skip


def _block_tables(single: Several[Sequence], block_tokens: int, num_groups: int) -> dict[str, np.ndarray]:
    lengths = [sequence.num_computed + 1 for sequence in single]
    tables = np.zeros((num_groups, len(single), -(-max(lengths, default=0) // block_tokens)), np.int64)
    for group, rows in enumerate(tables):
        for row, sequence, length in zip(rows, single, lengths, strict=True):
            used = -(-length // block_tokens)
            row[:used] = sequence.arrays[group][:used]
    return {"block_tables": tables, "context_lens": np.array(lengths, np.int64)}
