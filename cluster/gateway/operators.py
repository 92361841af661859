"""Operators' endpoints, apart from users': cached KV cleared and pinned, a trace recorded."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.bounds import MAX_TOKENS
from ...core.config import GatewayConfig
from ...core.errors import AuthError, RequestError
from ...core.ids import PeerId, worker_of
from ...core.kv_messages import KVClear, KVControlled, KVPin, KVUnpin
from ...core.messages import Message
from ...core.metrics import GatewayMetrics
from ...engine.limits import check_prompt
from .generation import Model
from .guard import Endpoint, Json, guarded_route, has_key, read_body
from .recorder import MOST_REQUESTS, TraceRecorder
from .schema import TokenId, _Body, parse

_LONGEST_S = 366 * 86400.0

Control = Callable[[Callable[[int], Message]], Awaitable[dict[PeerId, KVControlled | None]]]
"""Gives all workers an order, made with a number; what each has answered, or None."""

Tenant = Annotated[str, Field(max_length=128)]


class ClearBody(_Body):
    """POST /admin/kv/clear."""

    tenant: Tenant | None = None
    """The `cache_salt` of its requests; not given: everybody's KV."""


class PinBody(_Body):
    """POST /admin/kv/pin."""

    tenant: Tenant = ""
    prompt: str | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
    ttl_s: Annotated[float, Field(gt=0, le=_LONGEST_S)] | None = None


class UnpinBody(_Body):
    """POST /admin/kv/unpin."""

    tenant: Tenant | None = None
    prompt: str | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)] | None = None


class RecordBody(_Body):
    """POST /admin/trace/start."""

    max_requests: int = Field(default=MOST_REQUESTS, ge=1, le=MOST_REQUESTS)


class Operators:
    """See the module. Belongs to the gateway's event loop.

    Args:
        config: keys and limits.
        model: served.
        control: reaches the workers.
        recorder: records traces.
        metrics: counts.
    """

    def __init__(
        self, config: GatewayConfig, model: Model, control: Control, recorder: TraceRecorder, metrics: GatewayMetrics
    ) -> None:
        self._config = config
        self._model = model
        self._control = control
        self._recorder = recorder
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """All of them."""
        endpoints: dict[str, Endpoint] = {
            "/admin/kv/clear": self.clear,
            "/admin/kv/pin": self.pin,
            "/admin/kv/unpin": self.unpin,
            "/admin/trace/start": self.start_trace,
            "/admin/trace/stop": self.stop_trace,
        }
        return [
            guarded_route(path, endpoint, "POST", self._authenticate, self._metrics)
            for path, endpoint in endpoints.items()
        ]

    async def clear(self, request: Request) -> Response:
        """POST /admin/kv/clear"""
        body = parse(ClearBody, await self._body(request))
        return await self._order(lambda number: KVClear(number, body.tenant))

    async def pin(self, request: Request) -> Response:
        """POST /admin/kv/pin"""
        body = parse(PinBody, await self._body(request))
        tokens = await self._tokens(body.prompt)
        return await self._order(lambda number: KVPin(number, body.tenant, tokens, body.ttl_s or 0.0))

    async def unpin(self, request: Request) -> Response:
        """POST /admin/kv/unpin"""
        body = parse(UnpinBody, await self._body(request))
        tokens = await self._tokens(body.prompt) if body.prompt is not None else []
        return await self._order(lambda number: KVUnpin(number, body.tenant, tokens))

    async def start_trace(self, request: Request) -> Response:
        """POST /admin/trace/start"""
        self._recorder.start(parse(RecordBody, await self._body(request)).max_requests)
        return Json({"recording": True})

    async def stop_trace(self, request: Request) -> Response:
        """POST /admin/trace/stop: the recorded lines."""
        return Response(self._recorder.stop(), media_type="application/jsonl")

    async def _order(self, order: Callable[[int], Message]) -> Response:
        """Have all workers carry out an order, and answer with what each did."""
        answers = await self._control(order)
        for answer in answers.values():
            if answer is not None and answer.error:
                raise RequestError(answer.error)
        workers = {worker_of(peer): answer.num_blocks if answer else None for peer, answer in answers.items()}
        missing = sorted(worker for worker, blocks in workers.items() if blocks is None)
        return Json({"blocks": workers, "unanswered": missing}, 504 if missing else 200)

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        tokens = await self._model.require_tokenizer("prompt").encode(prompt) if isinstance(prompt, str) else prompt
        check_prompt(tokens, self._model.vocab_size, self._model.max_model_len)
        return tokens

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body) or b"{}"

    def _authenticate(self, request: Request) -> None:
        if self._config.admin_keys:
            if not has_key(request, self._config.admin_keys):
                raise AuthError("an operator's key is needed", fix="send one of gateway.admin_keys as a Bearer token")
        elif has_key(request, self._config.api_keys):
            raise AuthError("a user's key opens no operators' endpoint", fix="set gateway.admin_keys, and send one")
        elif not _is_loopback(request.client.host if request.client else ""):
            raise AuthError(
                "without gateway.admin_keys, operators' endpoints answer clients on this host alone",
                fix="set gateway.admin_keys, and send one as a Bearer token",
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
