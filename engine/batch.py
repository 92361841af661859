"""One step's input, as tensors."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.prefill_attention import Span
from .sequence import Sequence


class Batch(NamedTuple):
    """Tokens to compute. Sequences with one new token come first."""

    tokens: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64."""
    slots: Tensor
    """[tokens] int64: where each token's KV goes."""
    num_single: int
    """How many of the first rows are sequences with one new token and a context."""
    block_tables: Tensor
    """[num_single, blocks] int64."""
    context_lens: Tensor
    """[num_single] int64."""
    spans: list[Span]
    logit_rows: Tensor
    """[rows] int64: which rows' logits are wanted."""


class Work(NamedTuple):
    """A part of a plan: compute the next ``num_new`` tokens of a sequence."""

    sequence: Sequence
    num_new: int


def build_batch(plan: Several[Work], wants_logits: Several[int], block_tokens: int, device: torch.device) -> Batch:
    """Lay a plan out.

    Args:
        plan: sequences with one new token first, then those with more.
        wants_logits: for each, how many of its last new tokens need logits.
        block_tokens: tokens a block.
        device: where the tensors go.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    spans: list[Span] = []
    single: list[Sequence] = []
    for (sequence, num_new), num_logits in zip(plan, wants_logits, strict=True):
        first = sequence.num_computed
        if num_new == 1:
            single.append(sequence)
            tokens.append(sequence.tokens[first])
            positions.append(first)
            slots.append(sequence.blocks[first // block_tokens] * block_tokens + first % block_tokens)
        else:
            last = first + num_new
            blocks = sequence.block_table[: -(-last // block_tokens)]
            start = len(tokens)
            spans.append(Span(start, start + num_new, torch.from_numpy(blocks).to(device), last))
            tokens.extend(sequence.tokens[first:last])
            position = np.arange(first, last)
            positions.extend(range(first, last))
            slots.extend((blocks[position // block_tokens] * block_tokens + position % block_tokens).tolist())
        logit_rows.extend(range(len(tokens) - num_logits, len(tokens)))
    longest = max((-(-(s.num_computed + 1) // block_tokens) for s in single), default=0)
    tables = np.zeros((len(single), longest), np.int64)
    for row, sequence in zip(tables, single, strict=True):
        used = -(-(sequence.num_computed + 1) // block_tokens)
        row[:used] = sequence.block_table[:used]
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        num_single=len(single),
        block_tables=torch.from_numpy(tables).to(device),
        context_lens=torch.tensor([s.num_computed + 1 for s in single], dtype=torch.int64, device=device),
        spans=spans,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
    )
