"""Inside the gateway: text and stop strings, request bodies, replays, timelines."""

from __future__ import annotations

import asyncio

import pytest
from support.dispatching import Gateway
from tandem.cluster.gateway.live import LiveRequest
from tandem.cluster.gateway.schema import ChatBody, CompletionBody, parse
from tandem.cluster.gateway.timeline import Timelines
from tandem.core.clock import ManualClock
from tandem.core.errors import CapacityError, NotFoundError, RequestError, TandemError, WorkerError
from tandem.core.messages import (
    Abort,
    Child,
    ChildUpdate,
    FinishReason,
    Member,
    Membership,
    Moved,
    PromptLogprobs,
    Refused,
    Report,
    Sampling,
    Stage,
    TokenLogprobs,
    Update,
    Usage,
)

# ---- bodies ---------------------------------------------------------------------------------------------------------


def test_defaults_are_openais() -> None:
    body = parse(CompletionBody, b'{"prompt": "x"}')
    assert body.sampling(-1) == Sampling(temperature=1.0)
    assert body.prompts == ["x"]
    assert parse(CompletionBody, b'{"prompt": [1, 2]}').prompts == [[1, 2]]
    assert parse(CompletionBody, b'{"prompt": ["a", "b"]}').prompts == ["a", "b"]
    assert parse(CompletionBody, b'{"prompt": [[1], [2]], "stop": "x"}').stops == ["x"]
    assert parse(CompletionBody, b'{"prompt": "x", "top_k": -1}').sampling(3) == Sampling(temperature=1.0, logprobs=3)


def test_content_parts_are_joined() -> None:
    body = parse(
        ChatBody,
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}',
    )
    assert body.template_messages() == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"prompt": "x", "max_token": 3}', "unknown field 'max_token'; did you mean max_tokens?", "max_token"),
        (b'{"prompt": "x", "n": 1000000}', "n: Input should be less than or equal to 128, found 1000000", "n"),
        (b"{", "the body is not JSON", None),
        (b'{"prompt": "x", "temperature": NaN}', "temperature: Input should be a finite number", "temperature"),
        (b"{}", "prompt: Field required", "prompt"),
    ],
)
def test_complaints_name_the_field(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, body)
    assert message in caught.value.message
    assert caught.value.param == param


# ---- requests and their workers -------------------------------------------------------------------------------------


async def drain(live: LiveRequest) -> list[tuple[int, int]]:
    """What has come so far: (output, token)."""
    told = asyncio.Event()
    live.on_news = told.set
    await asyncio.wait_for(told.wait(), 2)
    return [(update.index, token) for update in live.take() for token in update.tokens]


def test_tokens_reach_their_request() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit()
        [(peer, sent)] = gateway.generates()
        assert peer == "decode-0#1"
        assert (sent.tokens, sent.prefill) == ([1, 2, 3], "prefill-0#1")
        gateway.tokens(sent.ticket, 0, 7)
        gateway.tokens(sent.ticket, 0, 8, finish=FinishReason.LENGTH)
        assert await drain(live) == [(0, 7), (0, 8)]
        gateway.tokens(sent.ticket, 0, 9)
        gateway.dispatcher.finish(live)
        gateway.check_idle()
        assert not any(isinstance(message, Abort) for _, message in gateway.sent)

    asyncio.run(run())


def test_tokens_that_nobody_has_taken_come_together() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(outputs=2)
        said = [TokenLogprobs(-float(number)) for number in range(3)]
        live.push(ChildUpdate(1, 1, [1], [said[0]], None))
        live.push(ChildUpdate(1, 0, [5], None, None))
        live.push(ChildUpdate(1, 1, [2, 3], said[1:], FinishReason.STOP))
        assert live.take() == [
            ChildUpdate(1, 1, [1, 2, 3], said, FinishReason.STOP),
            ChildUpdate(1, 0, [5], None, None),
        ]
        live.push(ChildUpdate(1, 0, [6], None, None))
        assert live.take() == [ChildUpdate(1, 0, [6], None, None)]

    asyncio.run(run())


def test_strangers_cannot_speak_for_a_worker() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit()
        [(_, sent)] = gateway.generates()
        gateway.tokens(sent.ticket, 0, 666, peer="decode-9#1")
        gateway.dispatcher.receive("decode-9#1", Refused(sent.ticket, 500, "no"))
        gateway.dispatcher.receive("decode-0#1", Update(
            children=[ChildUpdate(999, 0, [1]), ChildUpdate(sent.ticket, 5, [1])], stages=[Stage(999, "x", 0.0)],
            prompt_logprobs=[PromptLogprobs(sent.ticket, 10**6, [TokenLogprobs(0.0)])], usages=[Usage(999, 0, 0, 0, 0,
            0)],
        ))  # fmt: skip
        gateway.tokens(sent.ticket, 0, 7)
        assert await drain(live) == [(0, 7)]
        gateway.dispatcher.finish(live)

    asyncio.run(run())


def test_a_lost_worker_is_replaced_from_where_it_stood() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(outputs=3)
        [(_, first)] = gateway.generates()
        gateway.tokens(first.ticket, 0, 7, 8)
        gateway.tokens(first.ticket, 1, 9, finish=FinishReason.STOP)
        gateway.follow("decode-1#1", "prefill-0#1")
        later = gateway.generates()[1:]
        assert [(peer, sent.tokens, [c.index for c in sent.children]) for peer, sent in later] == [
            ("decode-1#1", [1, 2, 3], [2]), ("decode-1#1", [1, 2, 3, 7, 8], [0]),
        ]  # fmt: skip
        assert all(sent.num_prompt_tokens == 3 for _, sent in later)
        assert later[1][1].children == [Child(0, 10)], "the same seed"
        # Late words of the dead are not heard.
        gateway.tokens(first.ticket, 0, 666)
        gateway.tokens(later[1][1].ticket, 0, 10, finish=FinishReason.LENGTH, peer="decode-1#1")
        gateway.tokens(later[0][1].ticket, 2, 11, finish=FinishReason.LENGTH, peer="decode-1#1")
        assert await drain(live) == [(0, 7), (0, 8), (0, 10), (1, 9), (2, 11)]
        assert gateway.metrics.replays._value.get() == 1
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_what_a_worker_moves_goes_on_where_its_kv_can_be_read() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(outputs=3)
        [(_, first)] = gateway.generates()
        gateway.follow("decode-0#1", "decode-1#1", "decode-2#1", "prefill-0#1")
        gateway.tokens(first.ticket, 2, 6, finish=FinishReason.STOP)
        moves = [Moved(first.ticket, index, ["decode-2#1"]) for index in (0, 1, 1, 2, 9)]
        gateway.dispatcher.receive("decode-9#1", Update(moved=moves))  # a stranger
        gateway.dispatcher.receive(
            "decode-0#1",
            Update(children=[ChildUpdate(first.ticket, 0, [7, 8]), ChildUpdate(first.ticket, 1, [9])], moved=moves),
        )
        await asyncio.sleep(0)
        later = gateway.generates()[1:]
        assert [(peer, sent.prefill, sent.tokens) for peer, sent in later] == [
            ("decode-2#1", "decode-0#1", [1, 2, 3, 7, 8]), ("decode-2#1", "decode-0#1", [1, 2, 3, 9]),
        ]  # fmt: skip
        assert gateway.metrics.moves._value.get() == 2
        gateway.tokens(later[0][1].ticket, 0, 10, peer="decode-2#1")
        # What nobody has taken yet joins what its output has already.
        assert await drain(live) == [(2, 6), (0, 7), (0, 8), (0, 10), (1, 9)]
        gateway.dispatcher.finish(live)
        aborts = [(peer, message) for peer, message in gateway.sent if isinstance(message, Abort)]
        assert aborts == [
            ("decode-2#1", Abort([later[0][1].ticket])), ("decode-2#1", Abort([later[1][1].ticket])),
            ("decode-0#1", Abort([first.ticket], 1)),
        ], "what has not gone on yet is still held"  # fmt: skip
        gateway.check_idle()

    asyncio.run(run())


def test_what_was_moved_without_kv_begins_anew_together() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(outputs=2)
        [(_, first)] = gateway.generates()
        gateway.follow("decode-1#1", "decode-0#1", "prefill-0#1")
        gateway.dispatcher.receive("decode-0#1", Update(moved=[Moved(first.ticket, 0), Moved(first.ticket, 1)]))
        await asyncio.sleep(0)
        [(_, again)] = gateway.generates()[1:]
        assert (again.prefill, [child.index for child in again.children]) == ("prefill-0#1", [0, 1])
        assert gateway.metrics.moves._value.get() == 0
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_whoever_leaves_before_his_output_goes_on_is_forgotten_by_its_holder() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit()
        [(_, first)] = gateway.generates()
        gateway.tokens(first.ticket, 0, 7)
        gateway.dispatcher.receive("decode-0#1", Update(moved=[Moved(first.ticket, 0, ["decode-1#1"])]))
        gateway.dispatcher.finish(live)
        await asyncio.sleep(0)
        assert gateway.sent[-1] == ("decode-0#1", Abort([first.ticket], 0))
        gateway.check_idle()

    asyncio.run(run())


def test_a_request_waits_for_a_worker_to_appear() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit()
        gateway.follow("prefill-0#1")
        assert len(gateway.generates()) == 1
        gateway.follow("decode-0#2", "prefill-0#1")
        assert gateway.generates()[-1][0] == "decode-0#2"
        gateway.dispatcher.finish(live)
        assert gateway.sent[-1] == ("decode-0#2", Abort([gateway.generates()[-1][1].ticket]))
        gateway.check_idle()

    asyncio.run(run())


def test_a_request_waits_for_a_silent_worker_to_report() -> None:
    async def run() -> None:
        gateway = Gateway()
        gateway.dispatcher.lost("decode-0#1")
        live = gateway.submit()
        gateway.dispatcher.follow(Membership(2, [Member("decode-0#1", "decode", "n", "tcp://x:1")]))
        assert gateway.generates() == []
        gateway.dispatcher.receive("decode-0#1", Report(0, 0, 0, 1, 1))
        [(_, sent)] = gateway.generates()
        gateway.tokens(sent.ticket, 0, 5, finish=FinishReason.STOP)
        assert await drain(live) == [(0, 5)]
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_a_request_does_not_wait_for_ever() -> None:
    async def run() -> None:
        gateway = Gateway()
        gateway.follow()
        live = gateway.submit()
        assert await drain(live) == []
        assert isinstance(live.error, WorkerError)
        assert "no decode worker appeared" in live.error.message
        assert live.error.status == 503
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_prompt_logprobs_are_asked_for_until_they_are_known() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(prompt_logprobs=2)
        [(_, sent)] = gateway.generates()
        assert sent.prompt_logprobs == 2
        values = [TokenLogprobs(-1.0), TokenLogprobs(-2.0)]
        gateway.dispatcher.receive("decode-0#1", Update(prompt_logprobs=[PromptLogprobs(sent.ticket, 1, values[:1])]))
        gateway.follow("decode-1#1")
        again = gateway.generates()[-1][1]
        assert again.prompt_logprobs == 2
        gateway.dispatcher.receive("decode-1#1", Update(prompt_logprobs=[PromptLogprobs(again.ticket, 1, values)]))
        assert live.prompt_logprobs == [None, *values]
        gateway.follow("decode-2#1")
        assert gateway.generates()[-1][1].prompt_logprobs == -1
        gateway.dispatcher.finish(live)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestError), (404, NotFoundError), (429, CapacityError), (500, WorkerError), (503, WorkerError)],
)
def test_refusals_keep_their_status_and_come_after_the_tokens(status: int, kind: type[TandemError]) -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit()
        [(_, sent)] = gateway.generates()
        gateway.tokens(sent.ticket, 0, 7)
        gateway.dispatcher.receive("decode-0#1", Refused(sent.ticket, status, "because"))
        assert await drain(live) == [(0, 7)]
        assert type(live.error) is kind
        assert (live.error.message, live.error.status) == ("because", status)
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_an_output_that_ends_by_a_stop_string_is_stopped_at_the_worker() -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(outputs=2)
        [(_, sent)] = gateway.generates()
        gateway.dispatcher.finish_output(live, 1)
        gateway.dispatcher.finish_output(live, 1)
        assert [m for _, m in gateway.sent if isinstance(m, Abort)] == [Abort([sent.ticket], 1)]
        gateway.tokens(sent.ticket, 1, 666)
        gateway.tokens(sent.ticket, 0, 7, finish=FinishReason.STOP)
        assert await drain(live) == [(0, 7)]
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_room_is_bounded() -> None:
    async def run() -> None:
        gateway = Gateway(max_queued=2)
        lives = [gateway.submit() for _ in range(2)]
        with pytest.raises(CapacityError, match="max_queued is 2"):
            gateway.dispatcher.make_room(1)
        gateway.dispatcher.finish(lives[0])
        gateway.dispatcher.make_room(1)
        gateway.dispatcher.finish(lives[1])

    asyncio.run(run())


def test_timelines_are_ordered_and_bounded() -> None:
    clock = ManualClock()
    timelines = Timelines("gateway-0#1", clock, size=2)
    first = timelines.open("a")
    clock.advance(1.0)
    first.mark("gateway.sent")
    first.add("prefill.started", "prefill-0#1", 0.5, "5 tokens cached")
    for _ in range(2000):
        first.mark("again")
    told = first.as_json()
    assert [(s["stage"], s["ms"]) for s in told["stages"][:2]] == [("prefill.started", 0.0), ("gateway.sent", 500.0)]
    assert len(told["stages"]) == 512
    timelines.open("b")
    timelines.open("c")
    assert timelines.get("a") is None
    assert timelines.get("c") is not None
