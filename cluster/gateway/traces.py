"""A request's own span, made of its timeline when it is over. Names are OpenTelemetry's for generative AI."""

from __future__ import annotations

from functools import partial

from ...core.ids import PeerId
from ...core.spans import Mark, Span, Trace
from ...core.tracer import Tracer
from .live import LiveRequest


class RequestTraces:
    """Belongs to the gateway's event loop.

    Args:
        tracer: sends spans; None: nothing is traced.
        peer: who we are.
        model: the served model's name.
    """

    def __init__(self, tracer: Tracer | None, peer: PeerId, model: str) -> None:
        self._tracer = tracer
        self._peer = peer
        self._model = model

    def begin(self, traceparent: str | None, operation: str) -> Trace | None:
        """For a new request; None: it is not traced.

        Args:
            traceparent: the client's header, if there is one.
            operation: "chat" or "text_completion".
        """
        trace = self._tracer.begin(traceparent) if self._tracer is not None else None
        if trace is not None:
            trace.attributes |= {"gen_ai.operation.name": operation, "gen_ai.request.model": self._model}
        return trace

    def finished(self, live: LiveRequest) -> None:
        """The client has everything, or is gone."""
        if self._tracer is None or live.trace is None:
            return
        live.trace.marks = [Mark(mark.name, mark.at_s, mark.detail) for mark in live.timeline.marks_of(self._peer)]
        live.trace.attributes |= {
            "gen_ai.response.id": live.request_id,
            "gen_ai.usage.input_tokens": len(live.tokens),
            "gen_ai.usage.output_tokens": sum(len(output.tokens) for output in live.outputs.values()),
        }
        if live.usage is not None:
            live.trace.attributes["tandem.cached_tokens"] = live.usage.cached_tokens
        self._tracer.send(partial(_span, live.trace))


def _span(trace: Trace) -> list[Span]:
    name = f"{trace.attributes['gen_ai.operation.name']} {trace.attributes['gen_ai.request.model']}"
    return [trace.whole(name, trace.marks[-1].at_s, tuple(trace.marks), is_server=True)]
