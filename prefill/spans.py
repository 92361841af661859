"""The spans of a prompt on a prefill worker, made of its marks when it is over: `prefill`, and below it `queue` and
`compute`."""

from __future__ import annotations

from ..core.spans import Span, Trace


def spans_of(trace: Trace, end_s: float) -> list[Span]:
    """All of them.

    Args:
        trace: nobody adds to it any more.
        end_s: when the prompt was computed or given up, on the wall clock.
    """
    begun_s = next((mark.at_s for mark in trace.marks if mark.name == "prefill.begun"), end_s)
    whole = trace.whole("prefill", end_s, tuple(trace.marks))
    spans = [whole, trace.child("queue", whole.start_s, begun_s)]
    if begun_s < end_s:
        spans.append(trace.child("compute", begun_s, end_s))
    return spans
