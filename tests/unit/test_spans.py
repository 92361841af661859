"""Spans are made of marks: what begins, what ends, and what hangs on what."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tandem.core.config import TracesConfig
from tandem.core.errors import ConfigError
from tandem.core.messages import Generate, decode, encode
from tandem.core.metrics import WorkerMetrics
from tandem.core.spans import Span, SpanContext, Trace, parse_traceparent
from tandem.core.tracer import Tracer, open_tracer
from tandem.decode.spans import spans_of
from tandem.prefill.spans import spans_of as prefill_spans_of

PARENT = SpanContext(7, 9)


def decoded(*marks: tuple[str, float], end_s: float = 100.0) -> list[tuple[str, float, float]]:
    """Name, start and end of each span below the stream's own."""
    trace = Trace(PARENT)
    for name, at_s in marks:
        (trace.mark_handover if name == "decode.handoff" else trace.mark)(name, at_s)
    whole, *spans = spans_of(trace, end_s)
    assert (whole.name, whole.parent_id, whole.start_s, whole.end_s) == ("decode", 9, marks[0][1], end_s)
    assert [mark.name for mark in whole.events] == [name for name, _ in marks]
    return sorted((span.name, span.start_s, span.end_s) for span in spans)


def test_what_tiers_have_is_fetched_before_the_rest_is_computed() -> None:
    assert decoded(
        ("decode.received", 1), ("decode.fetch", 2), ("decode.fetched", 5), ("decode.prefill", 6), ("decode.started", 9)
    ) == [("fetch", 2, 5), ("generate", 9, 100), ("prefill", 6, 9), ("queue", 1, 2), ("queue", 5, 6)]  # fmt: skip


def test_a_handoff_that_fails_is_followed_by_another() -> None:
    trace = Trace(PARENT)
    trace.mark("decode.received", 1)
    told = []
    for start_s in (2, 10):
        trace.mark_handover("decode.handoff", start_s, "600 tokens from prefill-0#1")
        told.append(parse_traceparent(trace.handed_over()))
        trace.mark("transfer.started", start_s + 1)
        trace.mark(*("transfer.failed", 10, "peer_lost") if start_s == 2 else ("transfer.done", 15, "8 bytes"))
    trace.mark("decode.started", 15)
    spans = spans_of(trace, 20)
    handoffs = [span for span in spans if span.name == "handoff"]
    transfers = [span for span in spans if span.name == "transfer"]
    assert [(span.start_s, span.end_s, span.error) for span in handoffs] == [(2, 10, "peer_lost"), (10, 15, "")]
    assert [span.parent_id for span in transfers] == [span.context.span_id for span in handoffs]
    assert [parsed[0] for parsed in told if parsed] == [span.context for span in handoffs]


def test_a_preempted_stream_waits_and_computes_again() -> None:
    assert decoded(
        ("decode.received", 1), ("decode.prefill", 2), ("decode.started", 3), ("decode.preempted", 4),
        ("decode.prefill", 5), ("decode.started", 6),
    ) == [("generate", 3, 4), ("generate", 6, 100), ("prefill", 2, 3), ("prefill", 5, 6), ("queue", 1, 2), ("queue", 4, 5)]  # fmt: skip


MARKS = [
    "decode.fetch", "decode.fetched", "decode.handoff", "transfer.started", "prefill.started", "transfer.failed",
    "transfer.done", "decode.prefill", "decode.started", "decode.preempted",
]  # fmt: skip


@given(st.lists(st.sampled_from(MARKS), max_size=300))
def test_whatever_happens_spans_lie_within_the_streams(names: list[str]) -> None:
    trace = Trace(PARENT)
    for at_s, name in enumerate(["decode.received", *names]):
        (trace.mark_handover if name == "decode.handoff" else trace.mark)(name, float(at_s))
    whole, *spans = spans_of(trace, len(names) + 1.0)
    ids = {whole.context.span_id} | {span.context.span_id for span in spans}
    assert len(ids) == len(spans) + 1
    for span in spans:
        assert whole.start_s <= span.start_s <= span.end_s <= whole.end_s
        assert span.parent_id in ids


def test_a_prompt_that_was_never_begun_has_waited() -> None:
    trace = Trace(PARENT)
    trace.mark("prefill.received", 1)
    trace.error = "the lease expired"
    whole, *spans = prefill_spans_of(trace, 31)
    assert whole.error == "the lease expired"
    assert [(span.name, span.start_s, span.end_s) for span in spans] == [("queue", 1, 31)]


@pytest.mark.parametrize("text", ["", "00", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "0" * 10_000, "00-é-é-01"])
def test_what_is_no_traceparent_counts_as_none(text: str) -> None:
    assert parse_traceparent(text) is None


def test_traceparents_are_read_as_they_are_written() -> None:
    context = SpanContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xF067AA0BA902B7)
    assert context.traceparent() == "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert parse_traceparent(context.traceparent()) == (context, True)
    assert parse_traceparent("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more") == (context, False)


def test_the_share_that_is_traced_is_as_configured() -> None:
    metrics = WorkerMetrics(CollectorRegistry())
    assert open_tracer("gateway-0#1", "gateway", TracesConfig(), metrics.spans) is None
    for ratio, least, most in ((0.0, 0, 0), (0.25, 350, 650), (1.0, 2000, 2000)):
        tracer = Tracer("gateway-0#1", "gateway", _traces(sample_ratio=ratio), metrics.spans)
        try:
            assert least <= sum(tracer.begin(None) is not None for _ in range(2000)) <= most
            assert tracer.begin(SpanContext(1, 2).traceparent()) is not None
            assert tracer.begin("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00") is None
        finally:
            tracer.close()


def test_a_library_that_is_missing_is_told_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tandem\[otel\]"):
        Tracer("decode-0#1", "decode", _traces(), WorkerMetrics(CollectorRegistry()).spans)


def test_a_span_that_cannot_be_made_is_counted_and_a_full_queue_waits_for_nobody() -> None:
    metrics = WorkerMetrics(CollectorRegistry())
    tracer = Tracer("decode-0#1", "decode", _traces(), metrics.spans)

    def broken() -> list[Span]:
        raise KeyError("a mistake")

    tracer.send(broken)
    tracer.close()
    tracer.send(broken)  # too late, and nobody minds
    assert metrics.spans.labels("lost")._value.get() == 1
    assert not tracer._thread.is_alive()


def test_old_peers_and_new_ones_understand_each_other() -> None:
    """A message without the field is one of a request that is not traced."""
    import msgspec
    from tandem.core.messages import Child, Sampling, Stopping

    message = Generate(1, "cmpl-1", [1], 1, [Child(0, 1)], Sampling(), Stopping(1), trace=PARENT.traceparent())
    assert decode(encode(message)) == message
    fields = msgspec.msgpack.decode(encode(message))
    del fields["trace"]
    told = decode(msgspec.msgpack.encode(fields))
    assert isinstance(told, Generate)
    assert told.trace == ""
    for wrong in ("x", "00-1-1-01", PARENT.traceparent() + "\n"):
        with pytest.raises(msgspec.DecodeError):
            decode(msgspec.msgpack.encode({**fields, "trace": wrong}))


def _traces(**more: object) -> TracesConfig:
    return TracesConfig.model_validate({"endpoint": "http://127.0.0.1:9/v1/traces", **more})
