"""One output as the client sees it: text, stop strings, log probabilities, token ids."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ...core.messages import ChildUpdate, FinishReason, TokenLogprobs
from .tokenizer import Tokenizer


class Piece(Struct):
    """What one update adds to an output."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    offset: int
    """Characters of output before this piece."""
    finish: FinishReason | None
    """None while more may come."""


class Choice:
    """Turns an output's tokens into text, and ends it at a stop string.

    Args:
        tokenizer: or None: outputs are token ids alone.
        prompt: its end decides how the first token reads.
        stops: stop strings; the output ends before the first that appears.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream(prompt) if tokenizer else None
        self._stops = list(stops)
        self._held = ""
        """Decoded and not yet shown: it may be the beginning of a stop string."""
        self._length = 0
        self.finish: FinishReason | None = None
        self.num_tokens = 0

    def push(self, update: ChildUpdate) -> Piece:
        """Take tokens in; returns what can be shown. After the end, nothing more may be pushed."""
        self.num_tokens += len(update.tokens)
        text = self._held
        if self._stream is not None:
            text += self._stream.push(update.tokens)
            if update.finish is not None:
                text += self._stream.finish()
        finish = update.finish
        if self._stops:
            found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
            shown = len(text)
            if found:
                shown, finish = min(found), FinishReason.STOP
            elif finish is None:
                shown -= self._stop_prefix(text)
            text, self._held = text[:shown], text[shown:]
        self.finish = finish
        piece = Piece(text, update.tokens, update.logprobs or [], self._length, finish)
        self._length += len(text)
        return piece

    def _stop_prefix(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if stop.startswith(text[-length:]):
                    longest = length
                    break
        return longest
