"""Who goes first: in a worker's queues, when blocks run out, and in a gateway that is full."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.dispatching import Gateway
from support.pair import Pair
from tandem.cluster.gateway.live import LiveRequest
from tandem.cluster.gateway.schema import CompletionBody, parse
from tandem.core.bounds import MAX_PRIORITY
from tandem.core.config import Config
from tandem.core.errors import CapacityError, RequestError
from tandem.core.messages import (
    Abort,
    Accepted,
    FinishReason,
    Message,
    Moved,
    Prefill,
    Prefilled,
    Update,
    Usage,
)
from tandem.core.urgency import level_of

BLOCK_BYTES = 3 * 2 * 2 * 8 * 16 * 4
"""Of 8 tokens: layers, keys and values, heads, tokens, dimensions, bytes of a float32."""


def prompt_of(i: int, size: int = 40) -> list[int]:
    return [token % 131 for token in range(i, i + size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    make_checkpoint("qwen3_moe", folder)
    return folder


class Make:
    """Makes pairs, and looks at the end whether anything leaked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: list[Pair] = []

    def __call__(self, pools: dict[str, object], *, overlap: bool = False, blocks: int = 200) -> Pair:
        config = {
            "model": {"path": str(self._folder), "max_model_len": 256},
            "kv": {"block_tokens": 8, "capacity": blocks * BLOCK_BYTES},
            "routing": {"local_prefill": "never"},
            "pools": pools,
        }
        pair = Pair(Config.model_validate(config), overlap)
        self._pairs.append(pair)
        return pair

    def check(self) -> None:
        for pair in self._pairs:
            pair.run()
            for node in pair.nodes.values():
                node.check_idle()
            pair.close()


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    maker = Make(folder)
    yield maker
    maker.check()


def turn_until(pair: Pair, condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        pair.turn()
    raise AssertionError("it does not come")


def ended(pair: Pair, tickets: list[int]) -> list[int]:
    """Run until all have ended; in which order they did."""
    order: list[int] = []

    def all_ended() -> bool:
        order.extend(ticket for ticket in tickets if pair.outputs[ticket].finish and ticket not in order)
        return len(order) == len(tickets)

    turn_until(pair, all_ended)
    return order


# ---- workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize(
    "pools",
    [{"prefill": {}, "decode": {"max_running": 1}}, {"colocated": {"max_running": 1}}],
    ids=["separate", "colocated"],
)
def test_streams_start_by_priority_and_then_by_arrival(make: Make, pools: dict[str, object], *, overlap: bool) -> None:
    pair = make(pools, overlap=overlap)
    priorities = [0, 5, 0, -3, MAX_PRIORITY, 5, -MAX_PRIORITY, 0]
    tickets = [pair.submit(prompt_of(i), max_tokens=6, priority=p) for i, p in enumerate(priorities)]
    wanted = sorted(tickets, key=lambda ticket: (priorities[tickets.index(ticket)], ticket))
    assert ended(pair, tickets) == wanted


def test_an_output_that_has_begun_comes_first_among_its_priority_alone(make: Make) -> None:
    pair = make({"prefill": {}, "decode": {"max_running": 1}})
    normal = pair.submit(prompt_of(1), max_tokens=6)
    urgent = pair.submit(prompt_of(2), max_tokens=6, priority=-1)
    begun = pair.submit(prompt_of(3), max_tokens=6, num_prompt_tokens=36)
    assert ended(pair, [normal, urgent, begun]) == [urgent, begun, normal]


class Prefills:
    """What a pair's workers say of prompts, in order: (kind, request)."""

    def __init__(self, pair: Pair) -> None:
        self.said: list[tuple[str, str]] = []
        self.priorities: dict[str, int] = {}
        self._requests: dict[int, str] = {}
        pair.deliver = self._see

    def of(self, kind: str) -> list[str]:
        return [request for said, request in self.said if said == kind]

    def _see(self, sender: str, to: str, message: Message) -> bool:
        match message:
            case Prefill():
                self._requests[message.number] = message.request_id
                self.priorities[message.request_id] = message.priority
            case Accepted() | Prefilled():
                self.said.append((type(message).__name__, self._requests[message.number]))
        return True


def test_a_prefill_worker_begins_by_priority_and_then_by_arrival(make: Make) -> None:
    """Its own queue: what is urgent comes after the rest has been asked for."""
    pair = make({"prefill": {"max_running": 1}, "decode": {}})
    seen = Prefills(pair)
    for i, priority in enumerate([0, 0, 7, 0, 7]):
        pair.submit(prompt_of(i), max_tokens=2, priority=priority, request_id=f"{priority} {i}")
    for _ in range(2):
        pair.turn()
    assert len(seen.priorities) == 5, "all have been asked for"
    for i, priority in enumerate([-2, 0, -2], 5):
        pair.submit(prompt_of(i), max_tokens=2, priority=priority, request_id=f"{priority} {i}")
    pair.run()
    assert seen.of("Accepted") == ["0 0", "-2 5", "-2 7", "0 1", "0 3", "0 6", "7 2", "7 4"]
    assert seen.priorities == {name: int(name.split()[0]) for name in seen.of("Accepted")}


@pytest.mark.parametrize(("priority", "overtakes"), [(-1, True), (0, False), (1, False)])
def test_an_urgent_prompt_does_not_wait_for_a_long_one(make: Make, priority: int, *, overtakes: bool) -> None:
    pair = make({"prefill": {"max_batched_tokens": 16}, "decode": {}})
    seen = Prefills(pair)
    pair.submit(prompt_of(0, 200), max_tokens=2, request_id="long")
    turn_until(pair, lambda: bool(seen.of("Accepted")))
    pair.submit(prompt_of(3, 30), max_tokens=2, priority=priority, request_id="short")
    turn_until(pair, lambda: pair.prefill.worker.report().waiting + pair.prefill.worker.report().running == 2)
    report = pair.prefill.worker.report()
    before = report.before(level_of(priority))[1]
    assert 0 < before <= 30 if overtakes else before == report.queued_tokens
    assert (report.before(level_of(0))[1] < report.queued_tokens) is (priority > 0)
    turn_until(pair, lambda: "short" in seen.of("Prefilled"))
    assert (pair.prefill.worker.report().queued_tokens > 100) is overtakes
    assert ("long" not in seen.of("Prefilled")) is overtakes


@pytest.mark.parametrize(("priority", "overtakes"), [(-1, True), (0, False), (1, False)])
def test_nor_where_prompts_are_computed_by_who_decodes(make: Make, priority: int, *, overtakes: bool) -> None:
    pair = make({"colocated": {"max_batched_tokens": 16}})
    long = pair.submit(prompt_of(0, 200), max_tokens=2)
    turn_until(pair, lambda: "decode.prefill" in pair.outputs[long].stages)
    short = pair.submit(prompt_of(3, 30), max_tokens=2, priority=priority)
    turn_until(pair, lambda: pair.decode.worker.report().waiting == 2)
    report = pair.decode.worker.report()
    assert (report.before(level_of(priority))[0] == 1) is overtakes
    turn_until(pair, lambda: bool(pair.outputs[short].finish))
    assert (pair.decode.worker.report().queued_tokens > 100) is overtakes
    assert (not pair.outputs[long].finish) is overtakes


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("pools", [{"prefill": {}, "decode": {}}, {"colocated": {}}], ids=["separate", "colocated"])
def test_the_least_urgent_gives_its_blocks_up_and_of_these_the_latest(
    make: Make, pools: dict[str, object], *, overlap: bool
) -> None:
    """The urgent one comes last: by age it would go first."""
    roomy = make({"colocated": {}})
    wanted = roomy.generate([prompt_of(i) for i in range(4)], max_tokens=60)
    # Four prompts of 5 blocks, which grow to 13 each.
    pair = make(pools, overlap=overlap, blocks=34)
    lost: list[int] = []
    tickets = []
    for i, priority in enumerate([0, 4, 4, -1]):
        tickets.append(pair.submit(prompt_of(i), max_tokens=60, priority=priority))
        for _ in range(3):
            pair.turn()

    def all_ended() -> bool:
        for ticket in tickets:
            lost.extend([ticket] * (pair.outputs[ticket].stages.count("decode.preempted") - lost.count(ticket)))
        return all(pair.outputs[ticket].finish for ticket in tickets)

    turn_until(pair, all_ended)
    normal, low, latest, urgent = tickets
    assert lost[0] == latest
    assert low in lost
    assert lost.index(low) > lost.index(latest)
    assert urgent not in lost
    assert normal not in lost
    assert [pair.outputs[ticket].tokens[0] for ticket in tickets] == wanted


def test_priorities_change_no_tokens(make: Make) -> None:
    """Whatever is urgent when, and whoever has to wait: everybody gets what he would have got."""
    rng = random.Random(0)
    prompts = [prompt_of(i, rng.randrange(10, 90)) for i in range(24)]
    wanted = make({"colocated": {}}).generate(prompts, max_tokens=30)
    pair = make(
        {"prefill": {"max_running": 3, "max_batched_tokens": 32}, "decode": {"max_running": 5}}, overlap=True, blocks=40
    )
    tickets = []
    for prompt in prompts:
        tickets.append(pair.submit(prompt, max_tokens=30, priority=rng.randrange(-2, 3)))
        for _ in range(rng.randrange(6)):
            pair.turn()
    pair.run()
    assert pair.decode.metrics.preemptions._value.get() > 0
    assert [pair.outputs[ticket].tokens[0] for ticket in tickets] == wanted


# ---- the gateway ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["2147483648", "-2147483648", '"0"', "1.5", "true", "[]", "{}"])
def test_a_wrong_priority_is_named(value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, b'{"prompt": "x", "priority": %s}' % value.encode())
    assert (caught.value.param, caught.value.status) == ("priority", 400)
    assert caught.value.message.startswith("priority: ")


@pytest.mark.parametrize(("value", "priority"), [("null", None), ("-3", -3), (str(MAX_PRIORITY), MAX_PRIORITY)])
def test_a_priority_is_optional(value: str, priority: int | None) -> None:
    assert parse(CompletionBody, b'{"prompt": "x", "priority": %s}' % value.encode()).priority == priority


async def news(live: LiveRequest) -> None:
    told = asyncio.Event()
    live.on_news = told.set
    await asyncio.wait_for(told.wait(), 2)


async def failure(live: LiveRequest) -> CapacityError:
    if live.error is None:
        await news(live)
    assert isinstance(live.error, CapacityError)
    return live.error


def drained(live: LiveRequest) -> list[int]:
    return [token for update in live.take() for token in update.tokens]


def test_a_full_gateway_gives_up_the_least_urgent_that_has_not_begun() -> None:
    async def run() -> None:
        gateway = Gateway(max_queued=6)
        lives = []
        for priority in (0, 9, 5, 8, 8, 8):
            lives.append(gateway.submit(priority=priority))
            gateway.clock.advance(1.0)
        begun, low, first, second, third = lives[1:]
        tickets = [sent.ticket for _, sent in gateway.generates()]
        gateway.tokens(tickets[1], 0, 7)
        for num_requests, priority in ((1, 8), (4, 5), (5, 0), (7, -1)):
            with pytest.raises(CapacityError, match="max_queued is 6"):
                gateway.dispatcher.make_room(num_requests, priority)
        assert gateway.dispatcher.num_live == 6, "who is refused takes nobody's place"
        gateway.dispatcher.make_room(1, 7)
        assert (await failure(third)).status == 429
        assert (gateway.sent[-1][1], gateway.dispatcher.num_live) == (Abort([tickets[5]]), 5)
        gateway.submit(priority=7)
        gateway.dispatcher.make_room(3, -1)
        assert [(await failure(live)).retry_after_s for live in (first, second)] == [1.0, 1.0]
        assert gateway.dispatcher.num_live == 3, "and the one of 7"
        assert gateway.metrics.displaced._value.get() == 4
        gateway.tokens(tickets[5], 0, 7)  # of one that is gone
        assert drained(begun) == [7]
        for live in (lives[0], begun, low):
            gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_one_that_waits_for_a_worker_may_be_given_up() -> None:
    async def run() -> None:
        gateway = Gateway(max_queued=1)
        gateway.follow()
        homeless = gateway.submit(priority=3)
        gateway.dispatcher.make_room(1)
        assert (await failure(homeless)).status == 429
        gateway.follow("decode-0#2")
        assert not gateway.generates()
        gateway.check_idle()

    asyncio.run(run())


def test_who_waits_for_a_worker_is_sent_by_priority() -> None:
    async def run() -> None:
        gateway = Gateway()
        gateway.follow()
        lives = [gateway.submit(priority=priority) for priority in (2, 0, -1, 0)]
        gateway.follow("decode-0#2")
        assert [sent.priority for _, sent in gateway.generates()] == [-1, 0, 0, 2]
        for live in lives:
            gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["dies", "ends"])
def test_a_request_keeps_its_priority_wherever_it_goes_on(how: str) -> None:
    async def run() -> None:
        gateway = Gateway()
        live = gateway.submit(priority=-4)
        [(_, first)] = gateway.generates()
        gateway.tokens(first.ticket, 0, 7)
        gateway.follow("decode-0#1", "decode-1#1")
        if how == "dies":
            gateway.follow("decode-1#1")
        else:
            gateway.dispatcher.receive("decode-0#1", Update(moved=[Moved(first.ticket, 0, ["decode-1#1"])]))
            await asyncio.sleep(0)
        (_, again) = gateway.generates()[-1]
        assert again.ticket != first.ticket
        assert (again.tokens, again.priority, first.priority) == ([1, 2, 3, 7], -4, -4)
        gateway.tokens(again.ticket, 0, 8, finish=FinishReason.LENGTH, peer="decode-1#1")
        gateway.dispatcher.finish(live)
        gateway.check_idle()

    asyncio.run(run())


def test_time_in_queues_is_counted_by_three_levels() -> None:
    async def run() -> None:
        gateway = Gateway()
        lives = [gateway.submit(priority=priority) for priority in (-7, -1, 0, 3)]
        usages = [Usage(sent.ticket, 2.0, 0.0, 0.0, 0, 0) for _, sent in gateway.generates()]
        gateway.dispatcher.receive("decode-0#1", Update(usages=usages))
        sums = {level: gateway.metrics.queue_s.labels(level)._sum.get() for level in ("high", "normal", "low")}
        assert sums == {"high": 4.0, "normal": 2.0, "low": 2.0}
        for live in lives:
            gateway.dispatcher.finish(live)

    asyncio.run(run())
