"""OpenAI's response objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ...core.errors import CapacityError, RequestError, TandemError
from ...core.messages import FinishReason, TokenLogprobs
from .choice import Piece
from .tokenizer import Tokenizer

_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON; a number that JSON lacks becomes null."""
    return _encoder.encode(value)


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def error_body(error: TandemError) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    if isinstance(error, CapacityError):
        kind = "rate_limit_error"
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.status}}


def finish_name(finish: FinishReason | None) -> str | None:
    """OpenAI's name of a finish reason."""
    return finish.value if finish else None


class Responses:
    """Builds one response's objects.

    Args:
        response_id: "cmpl-…" or "chatcmpl-…".
        model: the served name.
        chat: chat completions rather than completions.
        tokenizer: shows tokens in log probabilities.
        token_ids: whether choices carry them.
        with_usage: whether a stream's events have a place for usage.
    """

    def __init__(
        self,
        response_id: str,
        model: str,
        tokenizer: Tokenizer | None,
        *,
        chat: bool,
        token_ids: bool,
        with_usage: bool,
    ) -> None:
        self._head = {"id": response_id, "created": int(time.time()), "model": model}
        self._chat = chat
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._with_usage = with_usage
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        """By choice: what is before and behind the text in its events."""

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request without streaming."""
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        """One event of a stream; ``usage`` is None until the last."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        body = {**self._head, "object": kind, "choices": choices}
        return event({**body, "usage": usage} if self._with_usage else body)

    def text_chunk(self, index: int, text: str) -> bytes:
        """What `chunk` makes of `part` for a piece that is text alone, neither a choice's first nor its last."""
        frame = self._frames.get(index)
        if frame is None:
            nothing = self.part(index, Piece("", [], [], 0, None), None, first=False)
            before, _, after = self.chunk([nothing], None).rpartition(b'""')
            frame = self._frames[index] = before, after
        return frame[0] + _encoder.encode(text) + frame[1]

    def choice(
        self,
        index: int,
        text: str,
        finish: FinishReason | None,
        logprobs: dict[str, Any] | None,
        tokens: list[int],
    ) -> dict[str, Any]:
        """A choice of a whole answer."""
        body: dict[str, Any] = {"index": index, "finish_reason": finish_name(finish), "logprobs": logprobs}
        if self._chat:
            body["message"] = {"role": "assistant", "content": text}
        else:
            body["text"] = text
        if self._token_ids:
            body["token_ids"] = tokens
        return body

    def part(self, index: int, piece: Piece, logprobs: dict[str, Any] | None, *, first: bool) -> dict[str, Any]:
        """A choice of a streamed chunk."""
        body: dict[str, Any] = {"index": index, "finish_reason": finish_name(piece.finish), "logprobs": logprobs}
        if self._chat:
            body["delta"] = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
        else:
            body["text"] = piece.text
        if self._token_ids:
            body["token_ids"] = piece.tokens
        return body

    def logprobs(
        self, tokens: Sequence[int], values: Sequence[TokenLogprobs | None], offset: int
    ) -> dict[str, Any] | None:
        """Log probabilities of some tokens, the first of which starts at character ``offset`` of the text."""
        if not values:
            return None
        pairs = list(zip(tokens, values, strict=False))
        return self._chat_logprobs(pairs) if self._chat else self._completion_logprobs(pairs, offset)

    def _chat_logprobs(self, pairs: list[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        content = []
        for token, value in pairs:
            assert value is not None
            top = [self._entry(*pair) for pair in zip(value.top_ids, value.top, strict=True)]
            content.append({**self._entry(token, value.chosen), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        octets = list(self._tokenizer.token_bytes(token)) if self._tokenizer else None
        return {"token": self._text(token), "logprob": max(logprob, -9999.0), "bytes": octets}

    def _completion_logprobs(self, pairs: list[tuple[int, TokenLogprobs | None]], offset: int) -> dict[str, Any]:
        texts: list[str] = []
        offsets: list[int] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token, value in pairs:
            texts.append(self._text(token))
            offsets.append(offset)
            offset += len(texts[-1])
            chosen.append(None if value is None else max(value.chosen, -9999.0))
            if value is None:
                tops.append(None)
                continue
            # The chosen token is always among the alternatives, as OpenAI has it.
            ids = dict(zip(value.top_ids, value.top, strict=True)) | {token: value.chosen}
            tops.append({self._text(i): max(logprob, -9999.0) for i, logprob in ids.items()})
        return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _text(self, token: int) -> str:
        return self._tokenizer.token_text(token) if self._tokenizer else f"token_id:{token}"
