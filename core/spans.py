"""What a process notes of a traced request, and the spans that come of it: W3C Trace Context and OpenTelemetry's terms,
without its library.

While a request runs, times are noted and nothing else. Spans are made of them when it is over, by the tracer's thread.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
_MAX_MARKS = 256


class SpanContext(NamedTuple):
    """A span's place: of 128 and 64 bits, neither 0."""

    trace_id: int
    span_id: int

    def traceparent(self) -> str:
        """For the next process: https://www.w3.org/TR/trace-context/#traceparent-header."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{_SAMPLED:02x}"


def parse_traceparent(text: str) -> tuple[SpanContext, bool] | None:
    """The span that a header names, and whether it is sampled; None: it names none, and counts as not sent."""
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    context = SpanContext(int(match[2], 16), int(match[3], 16))
    return (context, bool(int(match[4], 16) & _SAMPLED)) if context.trace_id and context.span_id else None


def new_trace_id() -> int:
    """128 random bits, not all 0."""
    return secrets.randbits(128) or 1


def new_span_id() -> int:
    """64 random bits, not all 0."""
    return secrets.randbits(64) or 1


class Mark(NamedTuple):
    """Something that happened, at a time of this process's wall clock."""

    name: str
    at_s: float
    detail: str = ""
    span_id: int = 0
    """Of the span that begins with it, where others hang spans of theirs on it."""


class Span(NamedTuple):
    """A finished span."""

    name: str
    context: SpanContext
    parent_id: int
    """0: it has none."""
    start_s: float
    end_s: float
    attributes: Mapping[str, str | int | float] = MappingProxyType({})
    events: tuple[Mark, ...] = ()
    error: str = ""
    is_server: bool = False
    """Whether it answers somebody outside."""


class Trace:
    """One request in one process. Owned by one thread, until it is given to the tracer.

    Args:
        parent: the span that it hangs on; its ``span_id`` may be 0.
    """

    __slots__ = ("_handed_id", "attributes", "context", "error", "marks", "parent_id")

    def __init__(self, parent: SpanContext) -> None:
        self.context = SpanContext(parent.trace_id, new_span_id())
        self.parent_id = parent.span_id
        self._handed_id = 0
        """Of the last span that a peer is told of."""
        self.marks: list[Mark] = []
        self.attributes: dict[str, str | int | float] = {}
        self.error = ""

    @classmethod
    def of(cls, traceparent: str) -> Trace | None:
        """What hangs on a peer's span; None: it sent none."""
        parsed = parse_traceparent(traceparent) if traceparent else None
        return None if parsed is None else cls(parsed[0])

    def mark(self, name: str, at_s: float, detail: str = "") -> None:
        """Something happened."""
        if len(self.marks) < _MAX_MARKS:
            self.marks.append(Mark(name, at_s, detail))

    def mark_handover(self, name: str, at_s: float, detail: str = "") -> None:
        """A span begins that a peer is told of next."""
        self._handed_id = new_span_id()
        self.marks.append(Mark(name, at_s, detail, self._handed_id))

    def handed_over(self) -> str:
        """The traceparent of the span that began with the last `mark_handover`."""
        return SpanContext(self.context.trace_id, self._handed_id).traceparent()

    def child(self, name: str, start_s: float, end_s: float, parent_id: int = 0, span_id: int = 0) -> Span:
        """A span below this request's own, or below ``parent_id``."""
        context = SpanContext(self.context.trace_id, span_id or new_span_id())
        return Span(name, context, parent_id or self.context.span_id, start_s, max(start_s, end_s))

    def whole(self, name: str, end_s: float, events: tuple[Mark, ...] = (), *, is_server: bool = False) -> Span:
        """The request's own span, from its first mark."""
        start_s = self.marks[0].at_s if self.marks else end_s
        return Span(
            name,
            self.context,
            self.parent_id,
            start_s,
            max(start_s, end_s),
            self.attributes,
            events,
            self.error,
            is_server,
        )
