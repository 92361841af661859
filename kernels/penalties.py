"""Presence, frequency and repetition penalties (Keskar et al. 2019, arXiv:1909.05858) from counts beside the logits.

Of each slot the device holds one count a vocabulary entry, which a decode step increments where it draws a token: no
list of tokens travels, however long a sequence gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .on_gpu import kernel_varying, next_power_of_2, tl

IN_PROMPT = 1 << 30
"""The bit of a count that says that the prompt holds the entry; the lower ones number its occurrences in the output."""

_BLOCK = 2048


def fill(counts: Tensor, slot: int, prompt: Tensor, output: Tensor) -> None:
    """Begin a slot anew.

    Args:
        counts: [slots, vocabulary] int32.
        slot: which.
        prompt: [n] int64 token ids of the prompt.
        output: [m] int64 token ids produced so far.
    """
    row = counts[slot].zero_()
    row.scatter_(0, prompt, IN_PROMPT)
    row.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))


def reference_count(counts: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Count one output token of each row.

    Args:
        counts: [slots, vocabulary] int32.
        slots: [rows] int64, different where ≥ 0; negative: the row counts nowhere.
        tokens: [rows] int64; negative ones, as `sampling.INVALID`, count nowhere.
    """
    counted = (slots >= 0) & (tokens >= 0)
    counts.index_put_((slots.clamp(min=0), tokens.clamp(min=0)), counted.int(), accumulate=True)


def fused_count(counts: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """`reference_count` on a GPU. ``slots`` and ``tokens`` may have any stride."""
    rows = len(slots)
    if rows:
        block = min(256, next_power_of_2(rows))
        _count_kernel[(-(-rows // block),)](
            counts, slots, tokens, rows, *counts.stride(), slots.stride(0), tokens.stride(0), block
        )


def reference(
    logits: Tensor, counts: Tensor, slots: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """Lower the logits of entries that were seen: see `sampling.apply_penalties`.

    Args:
        logits: [rows, vocabulary], any floating dtype. Not changed.
        counts: [slots, vocabulary] int32: occurrences in the output, and `IN_PROMPT`.
        slots: [rows] int64; negative: the row's logits stay as they are.
        presence: [rows] float32, subtracted once from each entry of the output.
        frequency: [rows] float32, subtracted for every occurrence in the output.
        repetition: [rows] float32 > 0: positive logits of the entries of prompt and output are divided by it, others
            multiplied, before anything is subtracted.

    Returns:
        [rows, vocabulary] float32.
    """
    seen = counts[slots.clamp(min=0)].masked_fill((slots < 0).unsqueeze(1), 0)
    occurrences = seen & (IN_PROMPT - 1)
    value = logits.float()
    factor = repetition.unsqueeze(1)
    value = torch.where(seen != 0, torch.where(value > 0, value / factor, value * factor), value)
    lowered = value - (presence.unsqueeze(1) + frequency.unsqueeze(1) * occurrences)
    return torch.where(occurrences > 0, lowered, value)


def fused(
    logits: Tensor, counts: Tensor, slots: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """`reference` on a GPU, in one pass that does not read the counts of rows without a slot.

    Parameters, and rows of logits, may have any stride.
    """
    rows, vocabulary = logits.shape
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=logits.device)
    if rows:
        _penalize_kernel[(rows, -(-vocabulary // _BLOCK))](
            logits, counts, slots, presence, frequency, repetition, out, vocabulary, logits.stride(0),
            *counts.stride(), slots.stride(0), presence.stride(0), frequency.stride(0), repetition.stride(0), _BLOCK,
            num_warps=4,
        )  # fmt: skip
    return out


@kernel_varying("slots", "tokens", "rows")
def _count_kernel(  # type: ignore[no-untyped-def]
    counts, slots, tokens, rows, count_stride, entry_stride, slot_stride, token_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row * slot_stride, mask=row < rows, other=-1)
    token = tl.load(tokens + row * token_stride, mask=row < rows, other=-1)
    place = counts + slot * count_stride + token * entry_stride
    counted = (slot >= 0) & (token >= 0)
    tl.store(place, tl.load(place, mask=counted, other=0) + 1, mask=counted)


@kernel_varying("slots", "presences", "frequencies", "repetitions")
def _penalize_kernel(  # type: ignore[no-untyped-def]
    logits, counts, slots, presences, frequencies, repetitions, out, vocabulary, row_stride, count_stride, entry_stride,
    slot_stride, presence_stride, frequency_stride, repetition_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    value = tl.load(logits + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + row * slot_stride)
    if slot >= 0:
        presence = tl.load(presences + row * presence_stride)
        frequency = tl.load(frequencies + row * frequency_stride)
        repetition = tl.load(repetitions + row * repetition_stride)
        seen = tl.load(counts + slot * count_stride + at.to(tl.int64) * entry_stride, mask=inside, other=0)
        occurrences = seen & 0x3FFFFFFF
        repeated = tl.where(value > 0, value / repetition, value * repetition)
        value = tl.where(seen != 0, repeated, value)
        lowered = value - (presence + frequency * occurrences.to(tl.float32))
        value = tl.where(occurrences > 0, lowered, value)
    tl.store(out + row * vocabulary + at, value, mask=inside)
