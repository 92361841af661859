"""What is sent, and when: random prompts with given lengths, open or closed loop, or a recorded trace."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.errors import ConfigError
from ..kv_transfer.offload.trace import TRACE_BLOCK_TOKENS, read_requests


class Job(NamedTuple):
    """One request: ``at_s`` after the start, in an open loop."""

    at_s: float
    prompt: list[int]
    output_tokens: int


class Lengths(NamedTuple):
    """A range of lengths, both ends included, drawn evenly."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ "128" or "100:1000".

        Raises:
            ConfigError: neither.
        """
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            raise ConfigError(f"{text!r} is not a length", fix="write 128, or 100:1000 for a range") from None
        if not 0 < lengths.low <= lengths.high:
            raise ConfigError(f"{text!r} is not a length", fix="the first must be positive and not above the second")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


class Synthetic(NamedTuple):
    """A stream of random requests."""

    num_requests: int
    rate: float | None
    """Requests a second, Poisson; None: all at once, for a closed loop."""
    inputs: Lengths
    outputs: Lengths
    long_share: float
    """Share of requests that are long prompts with short outputs: what disturbs decoding."""
    long_inputs: Lengths
    long_outputs: Lengths
    vocabulary: int
    seed: int

    def jobs(self) -> list[Job]:
        """The same jobs for the same seed."""
        rng = random.Random(self.seed)
        jobs, at_s = [], 0.0
        for _ in range(self.num_requests):
            if self.rate is not None:
                at_s += rng.expovariate(self.rate)
            is_long = rng.random() < self.long_share
            length = (self.long_inputs if is_long else self.inputs).draw(rng)
            output = (self.long_outputs if is_long else self.outputs).draw(rng)
            jobs.append(Job(at_s, [rng.randrange(self.vocabulary) for _ in range(length)], output))
        return jobs


def read_trace(path: Path, num_requests: int, speed: float, vocabulary: int, max_model_len: int) -> list[Job]:
    """Requests of a trace in Mooncake's JSONL format.

    Prompts are made up so that they share what the trace says; those longer than the model's context are cut.

    Args:
        path: the file.
        num_requests: how many to read, from the start.
        speed: how much faster than recorded.
        vocabulary: token ids are below it.
        max_model_len: of the served model.

    Raises:
        ConfigError: not such a file; names the line and the field.
    """
    jobs, room = [], max_model_len - 1
    for request in itertools.islice(read_requests(path), num_requests):
        output = max(1, min(request.output_length, room // 2))
        tokens = list(_trace_tokens(request.hash_ids, request.input_length, vocabulary))
        jobs.append(Job(request.timestamp / 1e3 / speed, tokens[: room - output], output))
    if not jobs:
        raise ConfigError(f"{path}: the trace is empty")
    return jobs


def _trace_tokens(hash_ids: Sequence[int], length: int, vocabulary: int) -> Iterator[int]:
    for number, block in enumerate(hash_ids):
        rng = random.Random(block)
        for _ in range(min(TRACE_BLOCK_TOKENS, length - TRACE_BLOCK_TOKENS * number)):
            yield rng.randrange(vocabulary)
