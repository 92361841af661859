"""The spans of a stream, made of its marks when it is over.

::

    decode                    from its arrival to its last token
    ├─ queue                  until it was admitted; again after a preemption
    ├─ fetch                  tiers give to the prefix cache what they have
    ├─ handoff                until its KV is here, or did not arrive
    │  ├─ prefill             by the prefill worker, which makes it
    │  └─ transfer            from the first read to the last byte
    ├─ prefill                the prompt, or its rest, here
    └─ generate               steps
"""

from __future__ import annotations

from ..core.spans import Mark, Span, Trace

_ENDS = {
    "decode.fetch": {"queue"},
    "decode.fetched": {"fetch"},
    "decode.handoff": {"queue", "fetch", "handoff", "transfer"},
    "decode.prefill": {"queue", "fetch", "handoff", "transfer"},
    "transfer.done": {"transfer", "handoff"},
    "transfer.failed": {"transfer", "handoff"},
    "decode.started": {"queue", "handoff", "transfer", "prefill"},
    "decode.preempted": {"prefill", "generate"},
}
_BEGINS = {
    "decode.received": "queue",
    "decode.fetch": "fetch",
    "decode.fetched": "queue",
    "decode.handoff": "handoff",
    "transfer.started": "transfer",
    "decode.prefill": "prefill",
    "decode.started": "generate",
    "decode.preempted": "queue",
}
"""A mark's name → the span that begins with it. What begins or ends nothing else is an event of its own."""


def spans_of(trace: Trace, end_s: float) -> list[Span]:
    """All spans of a stream.

    Args:
        trace: nobody adds to it any more.
        end_s: when the stream ended, on the wall clock.
    """
    spans: list[Span] = []
    open_spans: dict[str, Mark] = {}
    handoff_id = 0

    def end(name: str, at_s: float, error: str = "") -> None:
        begun = open_spans.pop(name, None)
        if begun is not None:
            parent_id = handoff_id if name == "transfer" else 0
            span = trace.child(name, begun.at_s, at_s, parent_id, begun.span_id)
            attributes: dict[str, str | int | float] = {"tandem.detail": begun.detail} if begun.detail else {}
            spans.append(span._replace(attributes=attributes, error=error))

    for mark in trace.marks:
        error = mark.detail if mark.name == "transfer.failed" else ""
        for name in ("transfer", "handoff", "queue", "fetch", "prefill", "generate"):
            if name in _ENDS.get(mark.name, ()):
                end(name, mark.at_s, error)
        begins = _BEGINS.get(mark.name)
        if begins == "handoff":
            handoff_id = mark.span_id
        if begins is not None:
            open_spans[begins] = mark
    for name in ("transfer", "handoff", "queue", "fetch", "prefill", "generate"):
        end(name, end_s)
    return [trace.whole("decode", end_s, tuple(trace.marks)), *spans]
