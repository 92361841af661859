"""A collector of spans: takes OTLP over HTTP, as a real one does, and keeps what it was sent."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Callable
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from .gateway import wait_for


class Received(NamedTuple):
    """A span as it came."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    process: str
    """service.instance.id"""
    attributes: dict[str, object]
    events: list[str]
    error: str
    kind: int


class Collector:
    """Listens on the loopback address until `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Received] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        """Nobody listens there any more. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def spans(self) -> list[Received]:
        """All so far."""
        with self._lock:
            return list(self._spans)

    def trace(self, request_id: str, complete: Callable[[list[Received]], bool]) -> list[Received]:
        """All spans of a request's trace, by their start, when they are complete."""

        def find() -> list[Received]:
            spans = self.spans()
            roots = [span for span in spans if span.attributes.get("gen_ai.response.id") == request_id]
            found = [span for span in spans if roots and span.trace_id == roots[0].trace_id]
            return sorted(found, key=lambda span: span.start_s) if complete(found) else []

        return list(wait_for(find, 30, f"the spans of {request_id}"))

    def _take(self, request: ExportTraceServiceRequest) -> None:
        with self._lock:
            for resource in request.resource_spans:
                process = _values(resource.resource.attributes)["service.instance.id"]
                for scope in resource.scope_spans:
                    self._spans += [_received(span, str(process)) for span in scope.spans]


def _received(span: trace_pb2.Span, process: str) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        process,
        _values(span.attributes),
        [event.name for event in span.events],
        span.status.message if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else "",
        span.kind,
    )


def _values(attributes: object) -> dict[str, object]:
    def value(found: AnyValue) -> object:
        kind = found.WhichOneof("value")
        return getattr(found, kind) if kind else None

    return {attribute.key: value(attribute.value) for attribute in attributes}  # type: ignore[attr-defined]
