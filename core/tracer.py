"""Sends spans to a collector: by OpenTelemetry's exporter, on a thread of its own."""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .config import TracesConfig
from .errors import ConfigError
from .ids import PeerId, worker_of
from .log import RateLimited
from .spans import Mark, Span, SpanContext, Trace, new_trace_id, parse_traceparent

if TYPE_CHECKING:
    from prometheus_client import Counter

_MAX_QUEUED = 2048
_MAX_TOGETHER = 256
_GATHER_S = 0.2
_EXPORT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_NS = 1_000_000_000
_log = RateLimited(30.0)


class Tracer:
    """Thread-safe; no call but `close` waits.

    Args:
        peer: who we are.
        role: prefill, decode, colocated or gateway.
        config: where spans go; its ``endpoint`` is given.
        counter: of spans, by ``outcome``.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, peer: PeerId, role: str, config: TracesConfig, counter: Counter) -> None:
        assert config.endpoint is not None
        if importlib.util.find_spec("opentelemetry") is None:
            raise ConfigError(
                "observability.traces.endpoint: OpenTelemetry is not installed in the environment of this process",
                fix='pip install "tandem[otel]" on every node, or leave observability.traces out',
            )
        self._peer = peer
        self._role = role
        self._endpoint = config.endpoint
        # As OpenTelemetry's TraceIdRatioBased: processes that see the same trace decide alike.
        self._bound = round(config.sample_ratio * (1 << 64))
        self._sent, self._lost = counter.labels("sent"), counter.labels("lost")
        self._queue: queue.Queue[Callable[[], list[Span]] | None] = queue.Queue(_MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()

    def begin(self, traceparent: str | None) -> Trace | None:
        """For a request from outside; None: it is not traced.

        Args:
            traceparent: the client's header; it decides, if it is there.
        """
        parsed = parse_traceparent(traceparent) if traceparent else None
        if parsed is not None:
            return Trace(parsed[0]) if parsed[1] else None
        trace_id = new_trace_id()
        return Trace(SpanContext(trace_id, 0)) if trace_id & ((1 << 64) - 1) < self._bound else None

    def send(self, build: Callable[[], list[Span]]) -> None:
        """Have spans built and sent, both by the tracer's thread. When that is far behind, they are lost and counted.

        Args:
            build: makes them; reads what nobody writes any more.
        """
        try:
            self._queue.put_nowait(build)
        except queue.Full:
            self._lost.inc()

    def close(self) -> None:
        """Send what is there, for two seconds at most. Idempotent."""
        try:
            self._queue.put(None, timeout=_CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_TIMEOUT_S)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        export = _exporter(self._endpoint, self._peer, self._role)
        more = True
        while more:
            spans: list[Span] = []
            more = self._gather(spans)
            if not spans:
                continue
            if export(spans):
                self._sent.inc(len(spans))
            else:
                self._lost.inc(len(spans))
                _log.warning("export", "spans do not get to %s: %d are lost", self._endpoint, len(spans))

    def _gather(self, spans: list[Span]) -> bool:
        """Those of some requests that end together; whether others may follow."""
        build = self._queue.get()
        while build is not None:
            try:
                spans += build()
            except Exception as error:  # noqa: BLE001 - a mistake in a span must not end those of others
                self._lost.inc()
                _log.warning("build", "a span could not be made: %s: %s", type(error).__name__, error)
            if len(spans) >= _MAX_TOGETHER:
                return True
            try:
                build = self._queue.get(timeout=_GATHER_S)
            except queue.Empty:
                return True
        return False


def open_tracer(peer: PeerId, role: str, config: TracesConfig, counter: Counter) -> Tracer | None:
    """The process's tracer; None: nothing is traced. Arguments and errors as of `Tracer`."""
    return None if config.endpoint is None else Tracer(peer, role, config, counter)


def _exporter(endpoint: str, peer: PeerId, role: str) -> Callable[[list[Span]], bool]:
    """Sends spans, and tells whether they have arrived. Blocks."""
    # Imported here, by the thread: half a second, and nothing where nothing is traced.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext as Place
    from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags

    resource = Resource.create(
        {
            "service.name": f"tandem-{role}",
            "service.namespace": "tandem",
            "service.instance.id": peer,
            "service.version": version("tandem"),
            "tandem.worker": worker_of(peer),
        }
    )
    scope = InstrumentationScope("tandem", version("tandem"))
    sampled = TraceFlags(TraceFlags.SAMPLED)
    exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)

    def event(mark: Mark) -> Any:
        return Event(mark.name, {"detail": mark.detail} if mark.detail else {}, _ns(mark.at_s))

    def readable(span: Span) -> Any:
        trace_id, span_id = span.context
        parent = Place(trace_id, span.parent_id, is_remote=True, trace_flags=sampled) if span.parent_id else None
        return ReadableSpan(
            span.name,
            Place(trace_id, span_id, is_remote=False, trace_flags=sampled),
            parent,
            resource,
            span.attributes,
            [event(mark) for mark in span.events],
            kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
            start_time=_ns(span.start_s),
            end_time=_ns(span.end_s),
            instrumentation_scope=scope,
        )

    def export(spans: list[Span]) -> bool:
        return bool(exporter.export([readable(span) for span in spans]) is SpanExportResult.SUCCESS)

    return export


def _ns(at_s: float) -> int:
    return round(at_s * _NS)
