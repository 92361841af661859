"""The HTTP surface: paths, keys, limits, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...core.clock import Clock
from ...core.config import GatewayConfig
from ...core.errors import AuthError, NotFoundError, RequestError, TandemError
from ...core.ids import new_request_id
from ...core.log import logger
from ...core.metrics import GatewayMetrics
from ...engine.limits import check_ids
from .connection import Outbox, connection_of
from .dispatcher import Dispatcher
from .generation import Generation, Model
from .guard import Endpoint, Json, guarded_route, has_key, read_body
from .responses import error_body, event
from .schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from .timeline import Timelines
from .traces import RequestTraces

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Gone(Response):
    """What is sent to nobody: the client has left."""

    def __init__(self) -> None:
        super().__init__(b"", 499)


class EventStream(Response):
    """A generation as server-sent events; a client that leaves cancels it at once."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, headers: dict[str, str], outbox: Outbox) -> None:
        super().__init__(b"", 200, _STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._generation = generation
        self._outbox = outbox

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection, generation = connection_of(scope), self._generation

        def write(number: int) -> None:
            # What comes while a client is slow waits with the request, and becomes one event.
            if not connection.is_slow and (body := generation.events(number)):
                self._outbox.put(connection, body)

        watcher = asyncio.create_task(_watch(receive, generation))
        connection.on_writable = generation.look
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await generation.follow(write)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception:  # noqa: BLE001 - a bug must end the stream as an error, not as silence
            logger.exception("a stream broke")
            body = event(error_body(TandemError("the stream broke inside the gateway")))
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            del connection.on_writable
            watcher.cancel()
            generation.close()


class Api:
    """The routes. Belongs to the gateway's event loop.

    Args:
        config: limits and keys.
        model: served.
        dispatcher: sends requests to workers.
        timelines: of the last requests.
        metrics: counts.
        clock: tells the time.
        ready: why requests cannot be served now, or "".
        scrape: every process's metrics, as text.
        operators: routes of their own.
        traces: of requests; None: nothing is traced.
    """

    def __init__(
        self,
        config: GatewayConfig,
        model: Model,
        dispatcher: Dispatcher,
        timelines: Timelines,
        metrics: GatewayMetrics,
        clock: Clock,
        ready: Callable[[], str],
        scrape: Callable[[], Awaitable[str]],
        operators: Sequence[Route] = (),
        traces: RequestTraces | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._dispatcher = dispatcher
        self._timelines = timelines
        self._metrics = metrics
        self._clock = clock
        self._ready = ready
        self._scrape = scrape
        self._traces = traces or RequestTraces(None, "", model.name)
        self._outbox = Outbox()
        self._started_s = int(clock.wall_s())
        self.app = Starlette(
            routes=[
                self._route("/v1/completions", self.completions, "POST"),
                self._route("/v1/chat/completions", self.chat, "POST"),
                self._route("/v1/models", self.models, "GET"),
                self._route("/v1/models/{name:path}", self.one_model, "GET"),
                self._route("/tokenize", self.tokenize, "POST"),
                self._route("/detokenize", self.detokenize, "POST"),
                self._route("/debug/requests/{id}", self.timeline, "GET"),
                Route("/livez", self.livez),
                Route("/readyz", self.readyz),
                Route("/metrics", self.metrics),
                *operators,
            ],
            exception_handlers={HTTPException: _http_error, Exception: _broken},
        )

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._generate(request, "cmpl", parse(CompletionBody, await self._body(request)))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._generate(request, "chatcmpl", parse(ChatBody, await self._body(request)))

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return Json({"object": "list", "data": [self._describe()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{name}"""
        self._check_model(request.path_params["name"])
        return Json(self._describe())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        body = parse(TokenizeBody, await self._body(request))
        self._check_model(body.model)
        tokenizer = self._model.require_tokenizer("prompt")
        if body.messages is not None:
            messages = ChatBody(messages=body.messages).template_messages()
            tokens = await tokenizer.encode_chat(messages, add_generation_prompt=True)
        else:
            tokens = await tokenizer.encode(body.prompt or "", special=body.add_special_tokens)
        return Json({"tokens": tokens, "count": len(tokens), "max_model_len": self._model.max_model_len})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        body = parse(DetokenizeBody, await self._body(request))
        self._check_model(body.model)
        check_ids(body.tokens, self._model.vocab_size, "tokens")
        return Json({"prompt": self._model.require_tokenizer("tokens").decode(body.tokens)})

    async def timeline(self, request: Request) -> Response:
        """GET /debug/requests/{id}"""
        found = self._timelines.get(request.path_params["id"])
        if found is None:
            raise NotFoundError(f"no request {request.path_params['id'][:100]!r} among the last 1,000")
        return Json(found.as_json())

    async def livez(self, request: Request) -> Response:
        """GET /livez: the process answers."""
        return Json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """GET /readyz: requests can be served."""
        reason = self._ready()
        return Json({"status": reason or "ok"}, 503 if reason else 200)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: every process's, in Prometheus' text format."""
        return Response(await self._scrape(), media_type="text/plain; version=0.0.4")

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, prefix: str, body: CompletionBody | ChatBody) -> Response:
        self._check_model(body.model)
        self._check_priority(body.priority)
        response_id = new_request_id(prefix)
        request.state.request_id = response_id
        operation = "chat" if isinstance(body, ChatBody) else "text_completion"
        generation = Generation(
            self._model,
            self._dispatcher,
            self._timelines,
            self._metrics,
            self._clock,
            body,
            response_id,
            partial(self._traces.begin, request.headers.get("traceparent"), operation),
        )
        await generation.begin()
        headers = {"x-request-id": response_id}
        if body.stream:
            return EventStream(generation, headers, self._outbox)
        watcher = asyncio.create_task(_watch(request.receive, generation))
        try:
            answer = await generation.whole()
        finally:
            watcher.cancel()
            generation.close()
        return Gone() if answer is None else Json(answer, headers=headers)

    def _route(self, path: str, endpoint: Endpoint, method: str) -> Route:
        return guarded_route(path, endpoint, method, self._authenticate, self._metrics)

    def _authenticate(self, request: Request) -> None:
        if self._config.api_keys and not has_key(request, self._config.api_keys):
            raise AuthError("a valid API key is needed", fix="send it as `Authorization: Bearer …`")

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise NotFoundError(f"model {name[:100]!r} is not served here; {self._model.name!r} is", param="model")

    def _check_priority(self, priority: int | None) -> None:
        least = self._config.min_priority
        if priority is not None and priority < least:
            raise RequestError(
                f"priority: this server accepts none below {least}, found {priority}",
                fix="gateway.min_priority allows more",
                param="priority",
            )

    def _describe(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "tandem",
            "max_model_len": self._model.max_model_len,
        }


async def _watch(receive: Receive, generation: Generation) -> None:
    """Wait for the client to leave."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            generation.cancel()
            return


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    wrapped = NotFoundError(f"{request.method} {request.url.path}: {error.detail.lower()}", status=error.status_code)
    return Json(error_body(wrapped), error.status_code, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    """A bug: the request ends with 500, and the log tells where."""
    return Json(error_body(TandemError("the gateway broke on this request; its log tells where")), 500)
