"""One API call: its prompts become live requests, their tokens a response, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from ...core.bounds import FILE_SUFFIX
from ...core.clock import Clock
from ...core.errors import RequestError
from ...core.ids import RequestId
from ...core.messages import Child, FinishReason, Stopping, TokenLogprobs
from ...core.metrics import GatewayMetrics
from ...core.randomness import child_seed
from ...core.spans import Trace
from ...engine.limits import check_ids, check_prompt
from .choice import Choice, Piece
from .dispatcher import Dispatcher
from .live import LiveRequest, nobody
from .responses import DONE, Responses, error_body, event
from .schema import ChatBody, CompletionBody
from .timeline import Timelines
from .tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
_SEED_MASK = (1 << 63) - 1


class Model:
    """What the gateway knows of the served model."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        hidden_states: bool = False,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_ids = eos_ids
        self.hidden_states = hidden_states
        """Whether workers write them."""

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer, for a request that needs text.

        Raises:
            RequestError: the model has none.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer", fix="send prompts as token ids", param=param)
        return self.tokenizer


class Generation:
    """One call of /v1/completions or /v1/chat/completions.

    Args:
        model: served.
        dispatcher: sends the requests.
        timelines: where their stages are kept.
        metrics: counts.
        clock: tells the time.
        body: of the call, checked.
        response_id: its id.
        begin_trace: called for each of its requests.
    """

    def __init__(
        self,
        model: Model,
        dispatcher: Dispatcher,
        timelines: Timelines,
        metrics: GatewayMetrics,
        clock: Clock,
        body: CompletionBody | ChatBody,
        response_id: RequestId,
        begin_trace: Callable[[], Trace | None] = lambda: None,
    ) -> None:
        self._model = model
        self._dispatcher = dispatcher
        self._timelines = timelines
        self._metrics = metrics
        self._clock = clock
        self._body = body
        self._id = response_id
        self._begin_trace = begin_trace
        self._n = body.n or 1
        self._echo = isinstance(body, CompletionBody) and bool(body.echo)
        self._lives: list[LiveRequest] = []
        self._choices: dict[int, Choice] = {}
        self._num_open = 0
        """Choices that go on."""
        self._started: set[int] = set()
        """Choices of which something was sent."""
        self._is_over = False
        self._only_prompt = False
        self._is_plain = not (self._echo or body.return_token_ids)
        """Whether events are about text alone, but for a choice's first and last, and those with log probabilities."""
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._responses = Responses(
            response_id,
            model.name,
            model.tokenizer,
            chat=isinstance(body, ChatBody),
            token_ids=bool(body.return_token_ids),
            with_usage=self._with_usage,
        )

    async def begin(self) -> None:
        """Tokenize, check, and send the requests.

        Raises:
            RequestError: the request can never be served.
            CapacityError: not now.
        """
        prompts = await self._prompts()
        for tokens in prompts:
            self._check(tokens)
        body = self._body
        if body.return_hidden_states and not self._model.hidden_states:
            raise RequestError(
                "this server writes no hidden states",
                fix="hidden_states.folder and hidden_states.layers turn it on",
                param="return_hidden_states",
            )
        priority = body.priority or 0
        self._dispatcher.make_room(len(prompts), priority)  # the last check: others may have to go for this request
        seed = secrets.randbits(63) if body.seed is None else body.seed & _SEED_MASK
        for number, tokens in enumerate(prompts):
            request_id = self._id if len(prompts) == 1 else f"{self._id}-{number}"
            timeline = self._timelines.open(request_id)
            timeline.mark("gateway.received", _described(tokens, priority))
            live = LiveRequest(
                request_id,
                tokens,
                [Child(index, child_seed(seed, index)) for index in range(self._n)],
                body.sampling(self._logprobs_wanted()),
                Stopping(self._max_tokens(len(tokens)), self._stop_ids()),
                self._logprobs_wanted() if self._echo else -1,
                body.cache_salt or "",
                timeline,
                secrets.token_hex(16) if body.return_hidden_states else "",
                self._begin_trace(),
                priority,
            )
            for index in range(self._n):
                self._choices[number * self._n + index] = Choice(self._model.tokenizer, tokens, body.stops)
            self._lives.append(live)
        self._num_open = len(self._choices)
        for live in self._lives:
            self._dispatcher.submit(live)

    def cancel(self) -> None:
        """The client is gone."""
        self._is_over = True
        for live in self._lives:
            if any(not output.finished for output in live.outputs.values()):
                live.timeline.mark("gateway.client_gone")
                live.log.info("the client is gone")
            self._dispatcher.finish(live)

    def close(self) -> None:
        """The response is complete, or has failed."""
        now_s = self._clock.monotonic_s()
        for live in self._lives:
            if not live.done:
                live.timeline.mark("gateway.done")
                self._metrics.e2e_s.observe(now_s - live.arrived_s)
                self._metrics.prompt_tokens.inc(len(live.tokens))
                self._metrics.output_tokens.inc(sum(len(output.tokens) for output in live.outputs.values()))
                if live.first_token_s:
                    self._metrics.stage_s.labels("decode").observe(live.last_token_s - live.first_token_s)
            self._dispatcher.finish(live)

    async def whole(self) -> dict[str, Any] | None:
        """The whole answer; None when the client is gone.

        Raises:
            TandemError: the request failed.
        """
        texts: dict[int, list[str]] = {index: [] for index in self._choices}
        tokens: dict[int, list[int]] = {index: [] for index in self._choices}
        logprobs: dict[int, list[TokenLogprobs]] = {index: [] for index in self._choices}

        def collect(number: int) -> None:
            for index, piece in self._pieces(number):
                texts[index].append(piece.text)
                tokens[index].extend(piece.tokens)
                logprobs[index].extend(piece.logprobs)
            if (error := self._lives[number].error) is not None:
                raise error

        await self.follow(collect)
        if any(live.done for live in self._lives):
            return None
        choices = []
        for index, choice in self._choices.items():
            live = self._lives[index // self._n]
            prompt_text, values, shown = "", list[TokenLogprobs | None](logprobs[index]), tokens[index]
            if self._echo:
                prompt_text = self._prompt_text(live)
                values = [*live.prompt_logprobs, *values]
                shown = [*live.tokens, *shown] if live.prompt_logprobs else shown
            listed = self._responses.logprobs(shown, values, 0)
            text = prompt_text + "".join(texts[index])
            body = self._responses.choice(index, text, choice.finish, listed, tokens[index])
            choices.append(body | _hidden_states(live))
        return self._responses.whole(choices, self._usage())

    async def follow(self, take: Callable[[int], None]) -> None:
        """Until all outputs are over, or the client is gone. What ``take`` raises is raised here.

        Args:
            take: called in the event loop with a prompt's number when it has news.
        """
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def news(number: int) -> None:
            if over.done():
                return
            try:
                take(number)
                if self._is_over:
                    over.set_result(None)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it can be handled
                over.set_exception(error)

        for number, live in enumerate(self._lives):
            live.on_news = partial(news, number)
        self.look()
        try:
            await over
        finally:
            for live in self._lives:
                live.on_news = nobody

    def look(self) -> None:
        """Have whoever follows take what there is."""
        for live in self._lives:
            live.on_news()

    def events(self, number: int) -> bytes:
        """What has come for a prompt, as server-sent events; b"" if nothing has.

        The response's last are [DONE], or an error. There is none when the client is gone.
        """
        events = []
        for index, piece in self._pieces(number):
            if self._is_plain and index in self._started and piece.finish is None and not piece.logprobs:
                events.append(self._responses.text_chunk(index, piece.text))
            else:
                events.append(self._chunk(index, piece))
        error = self._lives[number].error
        if error is not None:
            self._is_over = True
            events.append(event(error_body(error)))
        elif not self._num_open:
            if self._with_usage:
                events.append(self._responses.chunk([], self._usage()))
            events.append(DONE)
        return b"".join(events)

    # ---- the request ------------------------------------------------------------------------------------------------

    async def _prompts(self) -> list[list[int]]:
        body = self._body
        if isinstance(body, ChatBody):
            tokenizer = self._model.require_tokenizer("messages")
            messages = body.template_messages()
            for message in messages:
                self._check_length(tokenizer, str(message["content"]), "messages")
            wanted = body.add_generation_prompt
            return [await tokenizer.encode_chat(messages, add_generation_prompt=wanted is None or wanted)]
        prompts = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                tokenizer = self._model.require_tokenizer("prompt")
                self._check_length(tokenizer, prompt, "prompt")
                prompts.append(await tokenizer.encode(prompt))
            else:
                prompts.append(prompt)
        return prompts

    def _check_length(self, tokenizer: Tokenizer, text: str, param: str) -> None:
        if tokenizer.too_long(text, self._model.max_model_len):
            raise RequestError(
                f"{len(text)} characters are more than the {self._model.max_model_len} tokens of the context can hold",
                param=param,
            )

    def _check(self, tokens: list[int]) -> None:
        param = "messages" if isinstance(self._body, ChatBody) else "prompt"
        limit = self._model.max_model_len
        check_prompt(tokens, self._model.vocab_size, limit, param)
        wanted = self._wanted_tokens()
        if wanted is not None and len(tokens) + wanted > limit:
            raise RequestError(
                f"{len(tokens)} prompt tokens and {wanted} output tokens are more than the context of {limit}",
                param="max_tokens",
            )
        check_ids(list(self._body.sampling(-1).logit_bias), self._model.vocab_size, "logit_bias")
        check_ids(self._body.stop_token_ids or [], self._model.vocab_size, "stop_token_ids")
        if self._body.stops:
            self._model.require_tokenizer("stop")

    def _wanted_tokens(self) -> int | None:
        """What the client asked for; None: as much as fits (chat), or OpenAI's default (completions)."""
        body = self._body
        if isinstance(body, ChatBody):
            return body.max_completion_tokens or body.max_tokens
        return body.max_tokens

    def _max_tokens(self, num_prompt_tokens: int) -> int:
        room = self._model.max_model_len - num_prompt_tokens
        wanted = self._wanted_tokens()
        if wanted is None:
            return room if isinstance(self._body, ChatBody) else min(DEFAULT_COMPLETION_TOKENS, room)
        self._only_prompt = wanted == 0  # one token is sampled, and not shown
        return max(wanted, 1)

    def _stop_ids(self) -> list[int]:
        ids = set(self._body.stop_token_ids or ())
        if not self._body.ignore_eos:
            ids.update(self._model.eos_ids)
        return sorted(ids)

    def _logprobs_wanted(self) -> int:
        body = self._body
        if isinstance(body, ChatBody):
            return (body.top_logprobs or 0) if body.logprobs else -1
        return -1 if body.logprobs is None else body.logprobs

    # ---- the response -----------------------------------------------------------------------------------------------

    def _pieces(self, number: int) -> list[tuple[int, Piece]]:
        """What has come for one prompt's choices."""
        live = self._lives[number]
        pieces = []
        for update in live.take():
            index = number * self._n + update.index
            choice = self._choices[index]
            if choice.finish is not None:
                continue
            piece = choice.push(update)
            if self._only_prompt:
                piece = Piece("", [], [], 0, FinishReason.LENGTH)
                choice.finish, choice.num_tokens = FinishReason.LENGTH, 0
            if piece.finish is not None:
                self._num_open -= 1
                self._is_over |= not self._num_open
                self._dispatcher.finish_output(live, update.index)
            pieces.append((index, piece))
        return pieces

    def _chunk(self, index: int, piece: Piece) -> bytes:
        first = index not in self._started
        self._started.add(index)
        live = self._lives[index // self._n]
        values = list[TokenLogprobs | None](piece.logprobs)
        tokens, offset = piece.tokens, piece.offset
        prompt_text = self._prompt_text(live) if self._echo else ""
        if self._echo and first:
            piece.text = prompt_text + piece.text
            values = [*live.prompt_logprobs, *values]
            tokens = [*live.tokens, *tokens] if live.prompt_logprobs else tokens
        elif self._echo:
            offset += len(prompt_text)
        listed = self._responses.logprobs(tokens, values, offset)
        part = self._responses.part(index, piece, listed, first=first)
        if first:
            part |= _hidden_states(live)
        return self._responses.chunk([part], None)

    def _prompt_text(self, live: LiveRequest) -> str:
        return self._model.tokenizer.decode(live.tokens) if self._model.tokenizer else ""

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(live.tokens) for live in self._lives)
        output = sum(choice.num_tokens for choice in self._choices.values())
        cached = sum(live.usage.cached_tokens for live in self._lives if live.usage)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _described(tokens: list[int], priority: int) -> str:
    return f"{len(tokens)} prompt tokens" + (f", priority {priority}" if priority else "")


def _hidden_states(live: LiveRequest) -> dict[str, str]:
    return {"hidden_states": live.hidden_states + FILE_SUFFIX} if live.hidden_states else {}
