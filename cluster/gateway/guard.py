"""What every endpoint has around it: keys, limits, errors in OpenAI's shape, a count."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.errors import CapacityError, TandemError, TooLargeError
from ...core.log import RequestLog
from ...core.metrics import GatewayMetrics
from .responses import error_body, to_json

Endpoint = Callable[[Request], Awaitable[Response]]


class Json(Response):
    """A JSON response."""

    media_type = "application/json"

    def __init__(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(to_json(value), status, headers)


def guarded_route(
    path: str, endpoint: Endpoint, method: str, authenticate: Callable[[Request], None], metrics: GatewayMetrics
) -> Route:
    """A route that asks who calls, counts, and turns errors into answers.

    Args:
        path: of the route.
        endpoint: answers; may raise a `TandemError`.
        method: of HTTP.
        authenticate: raises a `TandemError` for those who may not.
        metrics: counts.
    """

    async def guarded(request: Request) -> Response:
        try:
            authenticate(request)
            response = await endpoint(request)
        except TandemError as error:
            request_id = getattr(request.state, "request_id", "")
            RequestLog(request_id).info("%s %s: %s", path, error.status, error)
            response = Json(error_body(error), error.status, _error_headers(error, request_id))
        metrics.requests.labels(path, response.status_code).inc()
        return response

    return Route(path, guarded, methods=[method])


def has_key(request: Request, keys: Sequence[str]) -> bool:
    """Whether a request has one of these keys. Compares with every one, whatever the outcome: the time tells
    nothing."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    return any(matches)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """A request's body.

    Raises:
        TooLargeError: it is larger than the limit.
    """
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if not declared.isdigit() or int(declared) <= limit_bytes:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit_bytes:
                break
        else:
            return bytes(body)
    raise TooLargeError(f"the body is larger than gateway.max_body, {limit_bytes} bytes")


def _error_headers(error: TandemError, request_id: str) -> dict[str, str]:
    headers = {"x-request-id": request_id} if request_id else {}
    if isinstance(error, CapacityError):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    return headers
