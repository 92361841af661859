"""Recorded load: when requests came, how long they were, and which began alike. No text.

Mooncake's format (https://arxiv.org/abs/2407.00079, section 4): one JSON object a line, with ``hash_ids`` for the
blocks of the prompt, the last of which may be partial. Equal ids are equal prefixes, up to and including the block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from ...core.errors import ConfigError
from .keys import KEY_BYTES, TierKey

TRACE_BLOCK_TOKENS = 512
"""Of the traces that Mooncake has published."""

_MAX_TOKENS = 1 << 26
_FIELDS = "timestamp, input_length, output_length and hash_ids"


class TraceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e15)]
    """Arrival, in milliseconds after any moment that is the same for all."""
    input_length: Annotated[int, msgspec.Meta(ge=1, le=_MAX_TOKENS)]
    """Tokens of the prompt."""
    output_length: Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKENS)]
    """Tokens of the answer."""
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)], ...]
    """One for each block of the prompt, all different."""


class Trace(NamedTuple):
    """A whole trace."""

    requests: Sequence[TraceRequest]
    """At least one, in the order of their arrival."""
    block_tokens: int
    """Tokens that an id stands for."""

    @property
    def prompt_tokens(self) -> int:
        """Of all requests together."""
        return sum(request.input_length for request in self.requests)

    def tokens_of(self, request: TraceRequest, num_blocks: int) -> int:
        """Tokens of a prompt's first blocks."""
        return min(request.input_length, num_blocks * self.block_tokens)

    def without_limit(self) -> tuple[int, int]:
        """(tokens, blocks) of prompts that came before: what a cache finds that never forgets."""
        seen: set[int] = set()
        tokens = blocks = 0
        for request in self.requests:
            count = next((n for n, block in enumerate(request.hash_ids) if block not in seen), len(request.hash_ids))
            tokens += self.tokens_of(request, count)
            blocks += count
            seen.update(request.hash_ids)
        return tokens, blocks


def read_requests(path: Path, block_tokens: int = TRACE_BLOCK_TOKENS) -> Iterator[TraceRequest]:
    """The lines of a trace, one after the other. Blocks while it reads.

    Args:
        path: the file.
        block_tokens: tokens that an id stands for.

    Raises:
        ConfigError: it cannot be read, or a line is none of a trace; names the line and the field.
    """
    decoder, last = msgspec.json.Decoder(TraceRequest), 0.0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    request = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise _bad(path, number, str(error)) from None
                needed = -(-request.input_length // block_tokens)
                if len(request.hash_ids) != needed:
                    raise _bad(
                        path,
                        number,
                        f"`hash_ids` has {len(request.hash_ids)} ids, and `input_length` {request.input_length} is "
                        f"{needed} blocks of {block_tokens} tokens",
                    )
                if len(set(request.hash_ids)) != needed:
                    raise _bad(path, number, "`hash_ids` has an id twice: an id stands for all that comes before it")
                if request.timestamp < last:
                    raise _bad(path, number, f"`timestamp` {request.timestamp:g} is before the line above's {last:g}")
                last = request.timestamp
                yield request
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", fix="give a trace in JSON lines") from None


def read_trace(path: Path, block_tokens: int = TRACE_BLOCK_TOKENS) -> Trace:
    """A whole trace. See `read_requests`.

    Raises:
        ConfigError: as there, or the trace is empty.
    """
    requests = list(read_requests(path, block_tokens))
    if not requests:
        raise ConfigError(f"{path}: the trace is empty")
    return Trace(requests, block_tokens)


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> int:
    """Write a trace; returns the number of its lines. Blocks.

    Raises:
        ConfigError: the file cannot be written.
    """
    count = 0
    try:
        with path.open("wb") as lines:
            for request in requests:
                lines.write(msgspec.json.encode(request) + b"\n")
                count += 1
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    return count


def trace_key(block: int) -> TierKey:
    """What a block of a trace is called in a tier: as good as random, as real keys are."""
    return hashlib.blake2b(block.to_bytes(8, "little"), digest_size=KEY_BYTES, person=b"tandem-trace").digest()


def _bad(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(f"{path}:{number}: {problem}", fix=f"a line is one JSON object with {_FIELDS}, and nothing else")
