"""From logits to tokens: parameters of many sequences gathered into one call, penalties, biases, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.messages import SampledToken, TokenLogprobs
from ..kernels.oracle import Ops
from ..kernels.sampling import INVALID, SamplingRows, apply_penalties, greedy, top_logprobs
from .sequence import Sequence


class Draw(NamedTuple):
    """One token to draw: a row of the logits, for one child of a sequence."""

    row: int
    sequence: Sequence
    seed: int


def sample(logits: Tensor, draws: Several[Draw], ops: Ops) -> list[SampledToken | None]:
    """Draw tokens.

    Args:
        logits: [rows, vocabulary]; rows that several children share are given once. Not changed.
        draws: what to draw.
        ops: the kernels.

    Returns:
        a token for each draw, or None where the logits were not numbers.
    """
    rows = torch.tensor([draw.row for draw in draws], dtype=torch.int64, device=logits.device)
    identity = len(draws) == logits.shape[0] and all(draw.row == i for i, draw in enumerate(draws))
    own = logits if identity else logits[rows]
    changed = [i for i, draw in enumerate(draws) if _changes_logits(draw.sequence)]
    if changed:
        own = own.clone() if identity else own
        for i in changed:
            _adjust(own[i], draws[i].sequence)
    if all(draw.sequence.sampling.temperature == 0 for draw in draws):
        tokens = greedy(own)
    else:
        tokens = ops.sample(own, _rows(draws, logits.device))
    chosen = tokens.tolist()
    result: list[SampledToken | None] = [None if token == INVALID else SampledToken(token) for token in chosen]
    wanted = [i for i, draw in enumerate(draws) if draw.sequence.sampling.logprobs >= 0 and result[i] is not None]
    if wanted:
        picked = logits[rows[wanted]]
        for i, logprobs in zip(
            wanted, logprobs_of(picked, tokens[wanted], [draws[i].sequence.sampling.logprobs for i in wanted]),
            strict=True,
        ):  # fmt: skip
            result[i] = SampledToken(chosen[i], logprobs)
    return result


def logprobs_of(logits: Tensor, tokens: Tensor, num_top: Several[int]) -> list[TokenLogprobs]:
    """The model's own log probabilities of ``tokens`` [rows], each with as many alternatives as asked for."""
    chosen, ids, values = top_logprobs(logits, tokens, max(num_top))
    lists = zip(chosen.tolist(), ids.tolist(), values.tolist(), num_top, strict=True)
    return [TokenLogprobs(own, top_ids[:n], top[:n]) for own, top_ids, top, n in lists]


def _rows(draws: Several[Draw], device: torch.device) -> SamplingRows:
    params = [draw.sequence.sampling for draw in draws]
    return SamplingRows(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
        seed=torch.tensor([draw.seed for draw in draws], dtype=torch.int64, device=device),
        position=torch.tensor([draw.sequence.num_tokens for draw in draws], dtype=torch.int64, device=device),
    )


def _changes_logits(sequence: Sequence) -> bool:
    return bool(sequence.sampling.logit_bias) or sequence.sampling.needs_history


def _adjust(row: Tensor, sequence: Sequence) -> None:
    sampling = sequence.sampling
    if sampling.needs_history:
        tokens = torch.tensor(sequence.tokens, dtype=torch.int64, device=row.device)
        prompt, output = tokens[: sequence.num_prompt_tokens], tokens[sequence.num_prompt_tokens :]
        apply_penalties(
            row, prompt, output, sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
        )
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64, device=row.device)
        row[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)
