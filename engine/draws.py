"""The tokens that a step samples: of which logits, with which parameters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .penalty_counts import PenaltySlots
from .sequence import Sequence


class Fill(NamedTuple):
    """Counts of a sequence's tokens that begin now: the prompt's, and the output's so far."""

    slot: int
    prompt: list[int]
    output: list[int]


class Draws:
    """Collects draws, and lays them out.

    Penalties and biases add these arrays: penalty_slots, count_slots [draws] (negative: none; the second are those
    whose input token is to be counted first), presence, frequency, repetition [draws] float32, bias_draws and bias_ids
    [biases], bias_values [biases] float32.

    Args:
        slots: which counts the sequences with penalties have.
    """

    def __init__(self, slots: PenaltySlots) -> None:
        self.fills: list[Fill] = []
        self.logprobs: list[tuple[int, int]] = []
        self.adjusted = False
        self._slots = slots
        self._sequences: list[Sequence] = []
        self._logits: list[int] = []
        self._seeds: list[int] = []
        self._count_slots: list[int] = []

    def __len__(self) -> int:
        return len(self._seeds)

    @property
    def greedy(self) -> bool:
        """Whether every draw takes the likeliest token."""
        return all(sequence.sampling.temperature == 0 for sequence in self._sequences)

    def add(self, sequence: Sequence, logits: int, single: bool) -> None:
        """The next token of each child of a sequence.

        Args:
            sequence: whose last token is computed in this step.
            logits: which of the step's logits are that token's.
            single: whether it is the sequence's only new token.
        """
        sampling = sequence.sampling
        count_slot = -1
        if sampling.needs_history:
            self.adjusted = True
            count_slot = self._count(sequence, single)
        elif sampling.logit_bias:
            self.adjusted = True
        for child in sequence.children:
            if sampling.logprobs >= 0:
                self.logprobs.append((len(self), sampling.logprobs))
            self._sequences.append(sequence)
            self._logits.append(logits)
            self._seeds.append(child.seed)
            self._count_slots.append(count_slot)

    def _count(self, sequence: Sequence, single: bool) -> int:
        """The slot in which the input token must be counted; negative: it is counted, or a prompt's."""
        known = sequence.num_computed if single else len(sequence.tokens)
        if sequence.penalty_slot < 0:
            start = sequence.num_prompt_tokens
            sequence.penalty_slot = self._slots.take()
            self.fills.append(Fill(sequence.penalty_slot, sequence.tokens[:start], sequence.tokens[start:known]))
        return sequence.penalty_slot if single and known >= sequence.num_prompt_tokens else -1

    def rows(self, spare: int) -> list[int]:
        """The row of the device's state that takes each token; ``spare`` for sequences that are about to be split."""
        return [sequence.row if len(sequence.children) == 1 else spare for sequence in self._sequences]

    def arrays(self, num_logits: int) -> dict[str, np.ndarray]:
        """See `StepInput`."""
        sequences = self._sequences
        params = [sequence.sampling for sequence in sequences]
        arrays: dict[str, np.ndarray] = {
            "temperature": np.array([p.temperature for p in params], np.float32),
            "top_p": np.array([p.top_p for p in params], np.float32),
            "min_p": np.array([p.min_p for p in params], np.float32),
            "top_k": np.array([p.top_k for p in params], np.int64),
            "seed": np.array(self._seeds, np.int64),
            "draw_positions": np.array([sequence.num_expected for sequence in sequences], np.int64),
        }
        if self._logits != list(range(num_logits)):
            arrays["draw_logits"] = np.array(self._logits, np.int64)
        if self.adjusted:
            biases = [(draw, p.logit_bias) for draw, p in enumerate(params) if p.logit_bias]
            arrays |= {
                "penalty_slots": np.array([sequence.penalty_slot for sequence in sequences], np.int64),
                "count_slots": np.array(self._count_slots, np.int64),
                "presence": np.array([p.presence_penalty for p in params], np.float32),
                "frequency": np.array([p.frequency_penalty for p in params], np.float32),
                "repetition": np.array([p.repetition_penalty for p in params], np.float32),
                "bias_draws": np.array([draw for draw, bias in biases for _ in bias], np.int64),
                "bias_ids": np.array([token for _, bias in biases for token in bias], np.int64),
                "bias_values": np.array([value for _, bias in biases for value in bias.values()], np.float32),
            }
        return arrays
