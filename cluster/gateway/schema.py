"""What clients may send: OpenAI's request bodies, with their bounds, and what Tandem adds to them.

Unknown fields are refused, so that a field that does nothing is never mistaken for one that does, and no internal
field can be smuggled in.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...core.bounds import MAX_CHILDREN, MAX_LOGPROBS, MAX_PRIORITY, MAX_TOKENS
from ...core.errors import RequestError
from ...core.messages import Sampling

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_PROMPTS = 1024

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted; padding against traffic analysis is left to TLS."""


class GenerationBody(_Body):
    """What completions and chat completions share."""

    model: str | None = Field(default=None, max_length=256)
    n: int | None = Field(default=None, ge=1, le=MAX_CHILDREN)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    # Beyond OpenAI's.
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(default=None, max_length=128)
    """Requests share cached KV only under equal salts."""
    priority: int | None = Field(default=None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """A lower one is served sooner; 0 is everybody's."""
    return_hidden_states: bool | None = None
    """Write the prompt's hidden states to a file on the server, and name it in each choice."""
    # Accepted, without effect on the output.
    user: str | None = Field(default=None, max_length=1024)
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and int(key) < 1 << 31):
                raise ValueError(f"keys are token ids, found {key[:40]!r}")
        return value

    @model_validator(mode="after")
    def _check_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self, logprobs: int) -> Sampling:
        """The engine's parameters; OpenAI's defaults."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            logprobs=logprobs,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHILDREN)
    suffix: None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is supported only when it equals n, found {self.best_of} and {self.n or 1}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 makes sense only with echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]
    name: str | None = Field(default=None, max_length=256)


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def template_messages(self) -> list[dict[str, Any]]:
        """What the chat template gets: role and plain text."""
        return [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]


class TokenizeBody(_Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = Field(default=None, max_length=256)
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = Field(default=None, max_length=256)
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


_B = TypeVar("_B", bound=BaseModel)


def parse(kind: type[_B], body: bytes) -> _B:
    """A checked request body.

    Raises:
        RequestError: names the first offending field, what was expected, and what was found.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    problem = _most_telling(problems)
    location = [part for part in problem["loc"] if isinstance(part, int) or part in _fields(kind)]
    name = ".".join(str(part) for part in problem["loc"][:1]) if not location else ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        field = str(problem["loc"][-1])[:80]
        near = difflib.get_close_matches(field, list(kind.model_fields), n=1, cutoff=0.6)
        raise RequestError(f"unknown field {field!r}{f'; did you mean {near[0]}?' if near else ''}", param=field)
    if problem["type"] == "json_invalid":
        raise RequestError(f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}", param=None)
    text = problem["msg"].removeprefix("Value error, ")
    found = _shorten(problem.get("input"))
    raise RequestError(
        f"{name + ': ' if name else ''}{text}{found}", param=str(problem["loc"][0]) if problem["loc"] else None
    )


def _most_telling(problems: list[Any]) -> Mapping[str, Any]:
    """Of a union's complaints, one that got deepest."""
    return max(problems, key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"]), -problems.index(p)))


def _fields(kind: type[BaseModel]) -> set[str]:
    return {*kind.model_fields, "role", "content", "name", "text", "type", "include_usage"}


def _shorten(value: Any) -> str:
    if value is None or isinstance(value, dict | list):
        return ""
    text = repr(value)
    return f", found {text if len(text) <= 60 else text[:57] + '…'}"
