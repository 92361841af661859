"""One request is one trace, from the gateway over prefill and transfer to its last token, as a collector receives it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from support.collector import Collector, Received
from support.processes import Processes

CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
"""Of the example in W3C's recommendation."""


class Traced(NamedTuple):
    """Real workers and a gateway, and where their spans go."""

    processes: Processes
    collector: Collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    collector = Collector()
    config = {
        "pools": {"prefill": {}, "decode": {"replicas": 2}},
        "routing": {"local_prefill": "never", "policy": "round_robin"},
        "observability": {"traces": {"endpoint": collector.endpoint}},
    }
    try:
        workers = {"prefill-0": {}, "decode-0": {}, "decode-1": {}}
        with Processes(tmp_path_factory.mktemp("traced"), config, workers) as processes:
            processes.serve()
            yield Traced(processes, collector)
    finally:
        collector.close()


def body(**more: object) -> dict[str, object]:
    return {"prompt": list(range(100, 700)), "max_tokens": 24, "temperature": 0, "ignore_eos": True, **more}


def named(spans: list[Received], name: str, process: str = "") -> Received:
    (found,) = [span for span in spans if span.name == name and span.process.startswith(process)]
    return found


def whole(spans: list[Received]) -> bool:
    """Both workers and the gateway have told."""
    return {"decode", "prefill", "generate"} <= {span.name for span in spans} and any(span.kind == 2 for span in spans)


def test_one_request_is_one_trace_with_the_right_parents_and_durations(traced: Traced) -> None:
    start_s = time.time()
    answer = traced.processes.complete(**body())
    end_s = time.time()
    spans = traced.collector.trace(answer["id"], whole)
    root = named(spans, "text_completion tandem-demo", "gateway-0")
    decode, handoff = named(spans, "decode", "decode-"), named(spans, "handoff", "decode-")
    transfer, generate = named(spans, "transfer", "decode-"), named(spans, "generate", "decode-")
    prefill, compute = named(spans, "prefill", "prefill-0"), named(spans, "compute", "prefill-0")
    waits = {span.process.partition("-")[0]: span for span in spans if span.name == "queue"}
    assert len(spans) == 9
    assert len({span.trace_id for span in spans}) == 1
    assert len({span.span_id for span in spans}) == len(spans)
    assert root.parent_id == ""
    assert {span.parent_id for span in (decode,)} == {root.span_id}
    assert {span.parent_id for span in (handoff, generate, waits["decode"])} == {decode.span_id}
    assert {span.parent_id for span in (transfer, prefill)} == {handoff.span_id}
    assert {span.parent_id for span in (compute, waits["prefill"])} == {prefill.span_id}
    assert not any(span.error for span in spans)

    # One clock, one host: what hangs on a span lies within it, but that the gateway hears a little later of the end.
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start_s <= span.end_s
        if span.parent_id:
            parent = by_id[span.parent_id]
            assert parent.start_s <= span.start_s
            assert span.end_s <= parent.end_s or parent is root
    assert start_s <= root.start_s
    assert root.end_s <= end_s
    assert waits["decode"].end_s == handoff.start_s
    assert handoff.end_s == transfer.end_s <= generate.start_s
    assert compute.start_s == waits["prefill"].end_s
    assert generate.end_s == decode.end_s
    assert root.attributes["gen_ai.usage.input_tokens"] == 600
    assert root.attributes["gen_ai.usage.output_tokens"] == 24
    assert root.events[:2] == ["gateway.received", "gateway.sent"]
    assert "gateway.first_token" in root.events


def test_a_clients_trace_goes_on_and_its_word_counts(traced: Traced) -> None:
    trace_id, span_id = CLIENT
    client = traced.processes.client
    answer = client.post("/v1/completions", json=body(), headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
    spans = traced.collector.trace(answer.json()["id"], whole)
    assert {span.trace_id for span in spans} == {trace_id}
    assert named(spans, "text_completion tandem-demo").parent_id == span_id

    # Not sampled by the client: nothing comes, though everything else is traced. The next one's spans come after it.
    other = trace_id.replace("4", "5")
    client.post("/v1/completions", json=body(), headers={"traceparent": f"00-{other}-{span_id}-00"})
    for nonsense in ("", "00-0-0-01", f"ff-{trace_id}-{span_id}-01", f"00-{'0' * 32}-{span_id}-01", "x" * 5000):
        answer = client.post("/v1/completions", json=body(), headers={"traceparent": nonsense})
        root = named(traced.collector.trace(answer.json()["id"], whole), "text_completion tandem-demo")
        assert root.parent_id == ""
    assert not [span for span in traced.collector.spans() if span.trace_id == other]


def test_several_outputs_have_a_span_each(traced: Traced) -> None:
    answer = traced.processes.complete(**body(n=3, temperature=1.0))
    spans = traced.collector.trace(answer["id"], lambda spans: whole(spans) and _count(spans, "generate") == 3)
    decodes = {span.span_id: span for span in spans if span.name == "decode"}
    assert len(decodes) == 3
    assert _count(spans, "prefill") == _count(spans, "transfer") == 1
    assert {span.parent_id for span in spans if span.name == "generate"} == set(decodes)


def test_a_request_that_outlives_its_worker_shows_both(traced: Traced) -> None:
    processes = traced.processes
    with processes.client.stream("POST", "/v1/completions", json=body(max_tokens=3000, stream=True)) as stream:
        request_id, lines = stream.headers["x-request-id"], stream.iter_lines()
        next(lines)
        stages = processes.client.get(f"/debug/requests/{request_id}").json()["stages"]
        [sent] = [stage["detail"] for stage in stages if stage["stage"] == "gateway.sent"]
        victim = sent.removeprefix("to ").partition("#")[0]
        processes.kill(victim)
        assert "data: [DONE]" in list(lines)
    spans = traced.collector.trace(request_id, whole)
    root = named(spans, "text_completion tandem-demo")
    assert root.events.count("gateway.replay") == 1
    assert root.events.count("gateway.sent") == 2
    decode = named(spans, "decode")
    assert decode.parent_id == root.span_id
    assert not decode.process.startswith(victim)


def test_without_a_collector_requests_are_served_and_spans_counted_as_lost(traced: Traced) -> None:
    traced.collector.close()
    traced.processes.complete(**body())
    traced.processes.wait_metric("tandem_spans_total", 3, outcome="lost")
    assert traced.processes.metric("tandem_spans_total", outcome="sent") > 0
    assert "spans do not get to" in traced.processes.logs()
    assert "Traceback" not in traced.processes.logs()


def _count(spans: list[Received], name: str) -> int:
    return sum(span.name == name for span in spans)
