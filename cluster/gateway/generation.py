"""One API call: its prompts become live requests, their tokens a response, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from ...core.bounds import FILE_SUFFIX
from ...core.clock import Clock
from ...core.errors import RequestError, TandemError
from ...core.ids import RequestId
from ...core.messages import Child, FinishReason, Stopping, TokenLogprobs
from ...core.metrics import GatewayMetrics
from ...core.randomness import child_seed
from ...core.spans import Trace
from ...engine.limits import check_ids, check_prompt
from .choice import Choice, Piece
from .dispatcher import Dispatcher
from .live import LiveRequest
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
        self._only_prompt = False
        self._responses = Responses(
            response_id,
            model.name,
            model.tokenizer,
            chat=isinstance(body, ChatBody),
            token_ids=bool(body.return_token_ids),
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
        for live in self._lives:
            self._dispatcher.submit(live)

    def cancel(self) -> None:
        """The client is gone."""
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

        async def collect(number: int) -> None:
            async for index, piece in self._pieces(number):
                texts[index].append(piece.text)
                tokens[index].extend(piece.tokens)
                logprobs[index].extend(piece.logprobs)

        tasks = [asyncio.create_task(collect(number)) for number in range(len(self._lives))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
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

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; ends early, without [DONE], when the client is gone.

        A failure after the first byte is an error event, the last one.
        """
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        started: set[int] = set()
        try:
            # A single prompt, as nearly all are, needs no task and no queue between it and its reader.
            async for batch in self._batches(0) if len(self._lives) == 1 else self._merged():
                yield b"".join(self._chunk(index, piece, started, with_usage) for index, piece in batch)
        except TandemError as error:
            yield event(error_body(error))
            return
        if any(live.done for live in self._lives):
            return
        if with_usage:
            yield self._responses.chunk([], self._usage(), with_usage=True)
        yield DONE

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

    async def _merged(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """`_batches` of all prompts, as they come."""
        queue: asyncio.Queue[list[tuple[int, Piece]] | TandemError | None] = asyncio.Queue()

        async def collect(number: int) -> None:
            try:
                async for batch in self._batches(number):
                    queue.put_nowait(batch)
            except TandemError as error:
                queue.put_nowait(error)
            queue.put_nowait(None)

        tasks = [asyncio.create_task(collect(number)) for number in range(len(self._lives))]
        try:
            running = len(tasks)
            while running:
                batch = await queue.get()
                if isinstance(batch, TandemError):
                    raise batch
                if batch is None:
                    running -= 1
                else:
                    yield batch
        finally:
            for task in tasks:
                task.cancel()

    async def _batches(self, number: int) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Pieces of one prompt's choices, as they come together."""
        live = self._lives[number]
        open_choices = set(range(self._n))
        while open_choices:
            batch = []
            deltas = await live.next_deltas()
            if not deltas:
                return
            for delta in deltas:
                if delta.child not in open_choices:
                    continue
                index = number * self._n + delta.child
                piece = self._choices[index].push(delta)
                if self._only_prompt:
                    piece = Piece("", [], [], 0, FinishReason.LENGTH)
                    self._choices[index].finish, self._choices[index].num_tokens = FinishReason.LENGTH, 0
                if piece.finish is not None:
                    open_choices.discard(delta.child)
                    self._dispatcher.finish_output(live, delta.child)
                batch.append((index, piece))
            yield batch

    async def _pieces(self, number: int) -> AsyncIterator[tuple[int, Piece]]:
        async for batch in self._batches(number):
            for pair in batch:
                yield pair

    def _chunk(self, index: int, piece: Piece, started: set[int], with_usage: bool) -> bytes:
        live = self._lives[index // self._n]
        values = list[TokenLogprobs | None](piece.logprobs)
        tokens, offset, first = piece.tokens, piece.offset, index not in started
        started.add(index)
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
        return self._responses.chunk([part], None, with_usage=with_usage)

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
