"""From a step's logits to its tokens: penalties, biases, the draw, log probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from ..core.messages import TokenLogprobs
from ..kernels.oracle import Ops
from ..kernels.penalties import fill
from ..kernels.sampling import SamplingRows, greedy, top_logprobs
from .batch import StepInput
from .penalty_counts import PenaltyCounts
from .upload import download


def draw(logits: Tensor, step: StepInput, tensors: Mapping[str, Tensor], counts: PenaltyCounts, ops: Ops) -> Tensor:
    """Sample a step's tokens.

    Args:
        logits: [logits, vocabulary]. Not changed.
        step: what to draw.
        tensors: its arrays on the device, "tokens" without unknown ones.
        counts: of the tokens of sequences with penalties; brought up to date.
        ops: the kernels.

    Returns:
        [draws] int64; negative where the logits were not numbers.
    """
    chosen = tensors.get("draw_logits")
    own = logits if chosen is None else logits[chosen]
    if step.adjusted:
        own = _adjust(own, step, tensors, counts, ops)
    if step.greedy:
        return greedy(own)
    return ops.sample(own, sampling_rows(tensors))


def sampling_rows(tensors: Mapping[str, Tensor]) -> SamplingRows:
    """The parameters among a step's tensors."""
    return SamplingRows(
        temperature=tensors["temperature"],
        top_k=tensors["top_k"],
        top_p=tensors["top_p"],
        min_p=tensors["min_p"],
        seed=tensors["seed"],
        position=tensors["draw_positions"],
    )


def _adjust(own: Tensor, step: StepInput, tensors: Mapping[str, Tensor], counts: PenaltyCounts, ops: Ops) -> Tensor:
    slots = step.arrays["penalty_slots"]
    held = counts.covering(int(slots.max(initial=0)) + 1)
    for slot, prompt, output in step.fills:
        fill(held, slot, *(torch.tensor(ids, dtype=torch.int64, device=own.device) for ids in (prompt, output)))
    inputs = tensors["tokens"][tensors["logit_rows"]]
    chosen = tensors.get("draw_logits")
    ops.count_output(held, tensors["count_slots"], inputs if chosen is None else inputs[chosen])
    adjusted = ops.penalize(
        own, held, tensors["penalty_slots"], tensors["presence"], tensors["frequency"], tensors["repetition"]
    )
    places = tensors["bias_draws"], tensors["bias_ids"]
    return adjusted.index_put_(places, tensors["bias_values"], accumulate=True)


class LogprobsOnTheWay:
    """Log probabilities that were asked of a device.

    Args:
        logits: [rows, vocabulary].
        tokens: [rows] int64, the chosen ones.
        num_top: alternatives wanted of each row.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, num_top: Several[int]) -> None:
        # Where a row is not numbers, its token is none: its log probability is asked for by nobody.
        parts = top_logprobs(logits, tokens.clamp(min=0), max(num_top))
        self._parts = [download(part) for part in parts]
        self._num_top = num_top

    def get(self) -> list[TokenLogprobs]:
        """The values; the device's work must be done."""
        chosen, ids, values = (part.tolist() for part in self._parts)
        lists = zip(chosen, ids, values, self._num_top, strict=True)
        return [TokenLogprobs(own, top_ids[:n], top[:n]) for own, top_ids, top, n in lists]


def prompt_logprobs(logits: Tensor, step: StepInput) -> list[LogprobsOnTheWay]:
    """Of each of a step's prompts that want them."""
    return [
        LogprobsOnTheWay(
            logits[start : start + len(tokens)],
            torch.tensor(tokens, dtype=torch.int64, device=logits.device),
            [num_top] * len(tokens),
        )
        for start, tokens, num_top in step.prompt_logprobs
    ]
