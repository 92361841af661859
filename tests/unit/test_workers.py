"""Prefill and decode workers, single-stepped: aborts, failures, expiry, preemption, several outputs, bad requests."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.pair import GATEWAY, Node, Pair
from tandem.core.config import Config
from tandem.core.messages import (
    Accepted,
    BlocksReady,
    Child,
    FailureReason,
    FinishReason,
    Generate,
    Member,
    Membership,
    Message,
    Prefill,
    Prefilled,
    PrefillFailed,
    Release,
    Sampling,
    Stopping,
    Table,
)
from tandem.core.metrics import render
from tandem.decode.cost import CostModel
from tandem.decode.stream import StreamState
from tandem.decode.worker import DecodeWorker
from tandem.engine.engine import Engine
from tandem.kv_transfer.transports import Read, TransferResult
from tandem.prefill.worker import PrefillWorker

PROMPT = list(range(1, 51))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    make_checkpoint("qwen3_moe", folder)
    return folder


class Make:
    """Makes pairs, and looks at the end whether anything leaked."""

    def __init__(self, folder: Path, overlap: bool) -> None:
        self._folder = folder
        self._overlap = overlap
        self._pairs: list[Pair] = []

    def __call__(self, *, prefill_kv: dict[str, object] | None = None, **sections: dict[str, object]) -> Pair:
        kv = {"block_tokens": 8, "capacity": "4MiB"} | sections.pop("kv", {})
        model = {"path": str(self._folder), "max_model_len": 256} | sections.pop("model", {})
        base: dict[str, object] = {"model": model, "kv": kv, "routing": {"local_prefill": "never"}} | sections
        prefill = Config.model_validate(base | {"kv": kv | (prefill_kv or {})})
        pair = Pair(Config.model_validate(base), self._overlap, prefill)
        self._pairs.append(pair)
        return pair

    def check(self) -> None:
        for pair in self._pairs:
            pair.run()
            for node in pair.nodes.values():
                node.check_idle()
                assert node.worker.drained()
            pair.close()


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def make(request: pytest.FixtureRequest, folder: Path) -> Iterator[Make]:
    maker = Make(folder, request.param)
    yield maker
    maker.check()


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[tuple[int, ...], list[int]]:
    """Undisturbed outputs of prompts, by their start and length."""
    pair = Pair(
        Config.model_validate({"model": {"path": str(folder), "max_model_len": 256}, "pools": {"colocated": {}}})
    )
    prompts = [list(range(i, i + 30 + i)) for i in range(1, 40)]
    outputs = pair.generate(prompts, max_tokens=20)
    pair.close()
    return {tuple(prompt): output for prompt, output in zip(prompts, outputs, strict=True)}


def prompt_of(i: int) -> list[int]:
    return list(range(i, i + 30 + i))


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_length_and_stop(make: Make) -> None:
    pair = make()
    ticket = pair.submit(PROMPT, max_tokens=12)
    pair.run()
    whole = pair.outputs[ticket]
    assert whole.finish == {0: FinishReason.LENGTH}
    assert len(whole.tokens[0]) == 12
    stop = whole.tokens[0][5]
    first = whole.tokens[0].index(stop)
    ticket = pair.submit(PROMPT, max_tokens=12, stop_ids=[stop])
    pair.run()
    assert pair.outputs[ticket].tokens[0] == whole.tokens[0][: first + 1]
    assert pair.outputs[ticket].finish == {0: FinishReason.STOP}


def test_the_context_is_an_end(make: Make) -> None:
    pair = make()
    ticket = pair.submit(list(range(100)) * 2, max_tokens=1000)
    pair.run()
    assert len(pair.outputs[ticket].tokens[0]) == 256 - 200
    assert pair.outputs[ticket].finish == {0: FinishReason.LENGTH}


def test_one_token_needs_no_transfer(make: Make) -> None:
    pair = make()
    ticket = pair.submit(PROMPT, max_tokens=1)
    pair.run()
    assert len(pair.outputs[ticket].tokens[0]) == 1
    assert "decode.started" not in pair.outputs[ticket].stages


def test_the_first_token_comes_before_the_kv(make: Make) -> None:
    pair = make()
    pair.decode.connector.poll = lambda: []  # type: ignore[method-assign] - the reads take for ever
    ticket = pair.submit(PROMPT)
    for _ in range(20):
        pair.turn()
    assert len(pair.outputs[ticket].tokens[0]) == 1
    del pair.decode.connector.poll
    pair.run()
    assert len(pair.outputs[ticket].tokens[0]) == 8


# ---- several outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pools", [{}, {"colocated": {}}], ids=["apart", "together"])
def test_several_outputs_are_computed_from_one_prompt(make: Make, pools: dict[str, object]) -> None:
    sampling = Sampling(temperature=1.5)
    pair = make(pools=pools)
    ticket = pair.submit(PROMPT, max_tokens=10, sampling=sampling, seeds=[7, 8, 9])
    pair.run()
    worker = pair.decode if pools else pair.prefill
    assert worker.worker.report().prompt_tokens == len(PROMPT)
    together = pair.outputs[ticket].tokens
    assert set(together) == {0, 1, 2}
    for index, seed in enumerate([7, 8, 9]):
        alone = pair.submit(PROMPT, max_tokens=10, sampling=sampling, seeds=[seed])
        pair.run()
        assert pair.outputs[alone].tokens[0] == together[index]


def test_outputs_that_end_with_their_first_token(make: Make) -> None:
    sampling = Sampling(temperature=5.0)
    pair = make()
    ticket = pair.submit(PROMPT, max_tokens=6, sampling=sampling, seeds=[1, 2, 3, 4])
    pair.run()
    firsts = [pair.outputs[ticket].tokens[i][0] for i in range(4)]
    ticket = pair.submit(PROMPT, max_tokens=6, sampling=sampling, seeds=[1, 2, 3, 4], stop_ids=firsts[:2])
    pair.run()
    output = pair.outputs[ticket]
    assert output.tokens[0] == [firsts[0]]
    assert output.tokens[1] == [firsts[1]]
    assert output.finish[0] == FinishReason.STOP
    assert set(output.finish) == {0, 1, 2, 3}


def test_one_of_several_outputs_is_aborted(make: Make) -> None:
    pair = make()
    for turns in range(0, 12):
        ticket = pair.submit(PROMPT, max_tokens=30, sampling=Sampling(temperature=1.0), seeds=[1, 2, 3])
        for _ in range(turns):
            pair.turn()
        pair.abort(ticket, child=1)
        pair.run()
        output = pair.outputs[ticket]
        assert set(output.finish) == {0, 2}, turns
        assert len(output.tokens[0]) == len(output.tokens[2]) == 30


def test_several_outputs_with_hardly_any_blocks(make: Make, folder: Path) -> None:
    block_bytes = 3 * 2 * 2 * 8 * 16 * 4
    pair = make(kv={"capacity": 33 * block_bytes})
    tickets = [
        pair.submit(PROMPT, max_tokens=40, sampling=Sampling(temperature=1.0), seeds=list(range(10 * i, 10 * i + 4)))
        for i in range(3)
    ]
    pair.run()
    assert pair.decode.metrics.preemptions._value.get() > 0
    roomy = make(pools={"colocated": {}})
    for i, ticket in enumerate(tickets):
        want = roomy.submit(
            PROMPT, max_tokens=40, sampling=Sampling(temperature=1.0), seeds=list(range(10 * i, 10 * i + 4))
        )
        roomy.run()
        assert pair.outputs[ticket].tokens == roomy.outputs[want].tokens


# ---- aborts ---------------------------------------------------------------------------------------------------------


def test_a_thousand_aborts_in_every_state(make: Make) -> None:
    """After each, both sides are back where they were; neighbours say what they would have said."""
    rng = random.Random(0)
    pair = make(
        pools={"prefill": {"max_batched_tokens": 16}, "decode": {"max_running": 4, "max_batched_tokens": 16}},
        kv={"capacity": "1MiB"},
    )
    seen: Counter[StreamState] = Counter()
    neighbour = pair.generate([PROMPT], max_tokens=20)[0]
    for _ in range(250):
        kept = pair.submit(PROMPT, max_tokens=20)
        doomed = [
            pair.submit(
                [rng.randrange(131) for _ in range(rng.randrange(1, 120))],
                max_tokens=rng.randrange(1, 30),
                seeds=list(range(rng.choice([1, 1, 1, 3]))),
                prefill="" if rng.random() < 0.2 else None,
            )
            for _ in range(4)
        ]
        for ticket in doomed:
            for _ in range(rng.randrange(0, 9)):
                pair.turn()
            for stream in pair.decode.worker._scheduler:  # type: ignore[union-attr]
                if stream.request.ticket == ticket:
                    seen[stream.state] += 1
            pair.abort(ticket)
        pair.run()
        assert pair.outputs[kept].tokens[0] == neighbour
        for node in pair.nodes.values():
            node.check_idle()
    wanted = {StreamState.WAITING, StreamState.LOADING, StreamState.PREFILLING, StreamState.RUNNING}
    assert wanted <= set(seen), seen
    assert all(seen[state] >= 20 for state in wanted), seen


def test_an_abort_while_reads_are_under_way_waits_for_them(make: Make) -> None:
    """Blocks that a read may still write into are not given to anybody else."""
    pair = make()
    transport = pair.decode.transport
    poll, cancel = transport.poll, transport.cancel
    stuck: set[int] = set()
    transport.poll = lambda: []  # type: ignore[method-assign]
    transport.cancel = lambda numbers: stuck.update(numbers) or set(numbers)  # type: ignore[func-returns-value,method-assign]
    ticket = pair.submit(PROMPT)
    for _ in range(10):
        pair.turn()
    free = pair.decode.engine.pool.num_free
    pair.abort(ticket)
    for _ in range(10):
        pair.turn()
    assert stuck
    assert pair.decode.engine.pool.num_free == free
    transport.poll, transport.cancel = poll, cancel  # type: ignore[method-assign]
    pair.run()
    pair.decode.check_idle()


def test_a_gateway_that_goes_away_takes_its_requests_with_it(make: Make) -> None:
    pair = make()
    for turns in (0, 2, 5, 9):
        pair.submit(PROMPT, max_tokens=100)
        for _ in range(turns):
            pair.turn()
        pair.decode.worker.peer_lost(GATEWAY)
        pair.run()
        for node in pair.nodes.values():
            node.check_idle()


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(0, 14, 1))
def test_prefill_dies_at_any_moment(make: Make, golden: dict[tuple[int, ...], list[int]], turns: int) -> None:
    pair = make(pools={"prefill": {"max_batched_tokens": 16}, "decode": {}})
    prompts = [prompt_of(i) for i in (3, 9, 20)]
    tickets = [pair.submit(prompt, max_tokens=20) for prompt in prompts]
    for _ in range(turns):
        pair.turn()
    pair.remove("prefill-0#1")
    pair.run()
    assert [pair.outputs[t].tokens[0] for t in tickets] == [golden[tuple(p)] for p in prompts]


def test_another_prefill_takes_over(make: Make, golden: dict[tuple[int, ...], list[int]]) -> None:
    pair = make(pools={"prefill": {"max_batched_tokens": 16}, "decode": {}})
    other = pair.add("prefill-1#1", "prefill")
    pair.announce()
    pair.pump()
    pair.pump()
    ticket = pair.submit(prompt_of(20), max_tokens=20, prefill="prefill-0#1")
    for _ in range(3):
        pair.turn()
    pair.remove("prefill-0#1")
    pair.run()
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(20))]
    assert other.worker.report().prompt_tokens > 0


@pytest.mark.parametrize("num_prefills", [1, 2])
def test_a_prefill_that_leaves_finishes_what_it_has_begun(
    make: Make, golden: dict[tuple[int, ...], list[int]], num_prefills: int
) -> None:
    """What it has not begun goes to another, if there is one; it stays until no reader will ask it for more."""
    pair = make(pools={"prefill": {"max_batched_tokens": 16, "max_running": 1}, "decode": {}})
    if num_prefills == 2:
        pair.add("prefill-1#1", "prefill")
        pair.announce()
        pair.pump()
        pair.pump()
    leaver = pair.nodes["prefill-0#1"].worker
    tickets = [pair.submit(prompt_of(i), max_tokens=20, prefill="prefill-0#1") for i in (20, 21, 22)]
    for _ in range(3):
        pair.turn()
    pair.announce(ending=("prefill-0#1",))
    late = pair.submit(prompt_of(23), max_tokens=20, prefill="prefill-0#1")
    assert not leaver.drained()
    pair.run()
    for i, ticket in zip((20, 21, 22, 23), (*tickets, late), strict=True):
        assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(i))]
    assert leaver.drained()
    wanted = {1: [20, 21, 22], 2: [20]}[num_prefills]
    assert leaver.report().prompt_tokens == sum(len(prompt_of(i)) for i in wanted)
    assert "tandem_kv_load_failures_total{" not in render(pair.decode.metrics.registry)


def test_a_prefill_that_leaves_waits_for_those_who_have_not_heard_of_it(make: Make) -> None:
    pair = make()
    leaver = pair.nodes["prefill-0#1"]
    with leaver.here():
        members = [
            Member("prefill-0#1", "prefill", "node", "", ready=False),
            Member("decode-0#1", "decode", "node", ""),
        ]
        leaver.worker.handle("controller", Membership(2, members))
    assert not leaver.worker.drained(), "the decode worker may have asked for something"
    pair.announce(ending=("prefill-0#1",))
    assert not leaver.worker.drained()
    pair.pump()  # it is greeted only now
    pair.pump()
    assert leaver.worker.drained()


def test_a_prefill_that_comes_back_is_used_again(make: Make, golden: dict[tuple[int, ...], list[int]]) -> None:
    pair = make()
    pair.remove("prefill-0#1")
    again = pair.add("prefill-0#2", "prefill")
    pair.announce()
    pair.pump()
    pair.pump()
    assert pair.generate([prompt_of(5)], max_tokens=20) == [golden[tuple(prompt_of(5))]]
    assert again.worker.report().prompt_tokens == len(prompt_of(5))


def poison(engine: Engine) -> None:
    """Whatever is not in use holds NaN: if it were ever read, the output would tell."""
    free = [*engine.pool._empty, *engine.pool._cached]
    engine.cache.tensor[free] = float("nan")


def test_an_expired_lease_is_noticed_never_read(make: Make, golden: dict[tuple[int, ...], list[int]]) -> None:
    """The reader stalls past the lease; the blocks are reused and poisoned: it must compute the prompt itself."""
    pair = make(kv={"prefix_cache": False, "capacity": "1MiB"})
    pair.decode.transport.poll = lambda: []  # type: ignore[method-assign]
    pair.deliver = lambda sender, to, message: not isinstance(message, PrefillFailed)
    ticket = pair.submit(prompt_of(12), max_tokens=20)
    for _ in range(10):
        pair.turn()
    pair.clock.advance(31)
    pair.prefill.worker.tick()
    pair.prefill.check_idle()
    poison(pair.prefill.engine)
    # The pool gives the blocks to somebody else.
    blocks = pair.prefill.engine.pool.allocate(pair.prefill.engine.pool.num_blocks)
    assert blocks is not None
    pair.prefill.engine.pool.release(blocks)
    del pair.decode.transport.poll
    pair.run()
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(12))]
    assert "transfer.failed" in pair.outputs[ticket].stages
    assert pair.decode.metrics.load_failures.labels("generation")._value.get() == 1


def test_a_lease_is_renewed_while_it_is_needed(make: Make, golden: dict[tuple[int, ...], list[int]]) -> None:
    pair = make()
    pair.decode.transport.poll = lambda: []  # type: ignore[method-assign]
    ticket = pair.submit(prompt_of(12), max_tokens=20)
    for _ in range(5):
        for _ in range(4):
            pair.turn()
        pair.clock.advance(10)
    assert not pair.prefill.worker.drained()
    del pair.decode.transport.poll
    pair.run()
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(12))]
    assert "transfer.failed" not in pair.outputs[ticket].stages


def test_a_prefill_that_stands_still_is_given_up(make: Make, golden: dict[tuple[int, ...], list[int]]) -> None:
    pair = make()
    pair.deliver = lambda sender, to, message: not isinstance(message, Prefilled | BlocksReady)
    ticket = pair.submit(prompt_of(12), max_tokens=20)
    for _ in range(10):
        pair.turn()
    pair.clock.advance(61)
    pair.run()
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(12))]
    assert pair.decode.metrics.load_failures.labels("timeout")._value.get() == 1


@pytest.mark.parametrize("kind", [Accepted, Prefilled, BlocksReady, Release, Prefill])
def test_lost_messages_cost_time_not_tokens(
    make: Make, golden: dict[tuple[int, ...], list[int]], kind: type[Message]
) -> None:
    pair = make()
    dropped = 0

    def deliver(sender: str, to: str, message: Message) -> bool:
        nonlocal dropped
        if isinstance(message, kind) and dropped == 0:
            dropped += 1
            return False
        return True

    pair.deliver = deliver
    ticket = pair.submit(prompt_of(12), max_tokens=20)
    for _ in range(4):
        for _ in range(30):
            pair.turn()
        pair.clock.advance(31)
    pair.run()
    assert dropped == 1
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(12))]


@pytest.mark.parametrize("read", range(12))
def test_only_what_did_not_arrive_is_computed_again(
    make: Make, golden: dict[tuple[int, ...], list[int]], read: int
) -> None:
    """Four chunks of three layer groups are twelve pulls; each in turn fails, when the prompt is computed."""
    pair = make(pools={"prefill": {"max_batched_tokens": 16}, "decode": {}}, kv={"layer_groups": 3})
    prompt = prompt_of(34)
    want = pair.generate([prompt], max_tokens=20, salt="undisturbed")
    transport = pair.decode.transport
    submit, poll = transport.submit, transport.poll
    submitted: list[int] = []
    held: list[TransferResult] = []

    def submit_and_count(asked: Read) -> int:
        number = submit(asked)
        if asked.source == "blocks":
            submitted.append(number)
        return number

    def poll_late() -> list[TransferResult]:
        """The doomed read ends last of all."""
        for landed in poll():
            doomed = len(submitted) > read and landed.number == submitted[read]
            (held if doomed else ended).append(landed)
        prefilled = "prefill.done" in pair.outputs[ticket].stages
        results = [*ended, *(TransferResult(result.number, "broken") for result in held if prefilled and not ended)]
        ended.clear()
        held[:] = [] if results and results[-1].error else held
        return results

    ended: list[TransferResult] = []
    transport.submit, transport.poll = submit_and_count, poll_late  # type: ignore[method-assign]
    before = pair.decode.worker.report().prompt_tokens
    ticket = pair.submit(prompt, max_tokens=20)
    pair.run()
    assert [pair.outputs[ticket].tokens[0]] == want
    assert len(submitted) == 12
    arrived = 16 * (read // 3)  # the chunks before the first that lacks a layer
    assert pair.decode.worker.report().prompt_tokens - before == 64 - arrived


@pytest.mark.parametrize("kind", ["error", "corrupt"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_injected_faults_cost_time_or_the_request(
    make: Make, golden: dict[tuple[int, ...], list[int]], kind: str, policy: str
) -> None:
    pair = make(
        pools={"prefill": {"max_batched_tokens": 16}, "decode": {}},
        kv={"inject_faults": {"share": 0.1, "kind": kind}, "on_load_failure": policy, "poison_freed": True},
    )
    failed = 0
    for i in range(1, 40):
        ticket = pair.submit(prompt_of(i), max_tokens=20)
        pair.run()
        output = pair.outputs[ticket]
        if output.refused is None:
            assert output.tokens[0] == golden[tuple(prompt_of(i))]
        else:
            assert (output.refused.status, policy) == (503, "fail")
            failed += 1
    failures = sum(
        pair.decode.metrics.load_failures.labels(reason)._value.get() for reason in ("transport", "generation")
    )
    assert failures > 5
    assert failed == (failures if policy == "fail" else 0)


@pytest.mark.parametrize("state", ["requested", "pulling", "draining"])
def test_preemption_leaves_transfers_alone(make: Make, golden: dict[tuple[int, ...], list[int]], state: str) -> None:
    """While one prompt's handoff stands in a state, others take each other's blocks until they are done."""
    pair = make(kv={"capacity": 36 * 3 * 2 * 2 * 8 * 16 * 4, "poison_freed": True})
    transport = pair.decode.transport
    poll, cancel = transport.poll, transport.cancel
    pair.run()  # they greet each other
    # It comes first: it is the oldest, and holds its blocks all the time.
    slow = pair.submit(prompt_of(12), max_tokens=20)
    if state == "requested":
        pair.deliver = lambda sender, to, message: sender != "prefill-0#1"
    else:
        transport.poll = lambda: []  # type: ignore[method-assign]
        transport.cancel = lambda numbers: set(numbers)  # type: ignore[method-assign]
    for _ in range(6):
        pair.turn()
    if state == "draining":
        pair.abort(slow)
        pair.turn()
    others = [
        pair.submit(prompt_of(i), max_tokens=20, prefill="", sampling=Sampling(), seeds=[0, 1, 2]) for i in (20, 21, 22)
    ]
    for _ in range(150):
        pair.turn()
    assert pair.decode.metrics.preemptions._value.get() > 0
    for ticket, i in zip(others, (20, 21, 22), strict=True):
        assert all(tokens == golden[tuple(prompt_of(i))] for tokens in pair.outputs[ticket].tokens.values())
        assert len(pair.outputs[ticket].finish) == 3
    assert not pair.outputs[slow].finish
    transport.poll, transport.cancel = poll, cancel  # type: ignore[method-assign]
    pair.deliver = lambda sender, to, message: True
    if state == "requested":  # what was said is lost
        pair.clock.advance(61)
    pair.run()
    if state != "draining":
        assert pair.outputs[slow].tokens[0] == golden[tuple(prompt_of(12))]
    assert pair.outputs[slow].stages.count("decode.handoff") == 1


def test_first_tokens_are_told_once(make: Make, golden: dict[tuple[int, ...], list[int]]) -> None:
    """The KV fails after the first token is out, the prompt is computed here, gives its blocks up to an older one, and
    comes from a peer after all."""
    pair = make(
        pools={"prefill": {}, "decode": {"max_batched_tokens": 16}},
        model={"max_model_len": 96},
        kv={"capacity": 14 * 3 * 2 * 2 * 8 * 16 * 4, "poison_freed": True},
    )
    pair.run()
    older = pair.submit(prompt_of(2), max_tokens=20)
    while len(pair.outputs[older].tokens.get(0, ())) < 2:
        pair.turn()
    transport = pair.decode.transport
    poll, late = transport.poll, list[TransferResult]()

    def poll_late() -> list[TransferResult]:
        late.extend(poll())
        if len(pair.outputs[older].tokens[0]) < 14:  # it needs a block soon, and none is left
            return []
        failed = [result._replace(error="broken") for result in late]
        late.clear()
        return failed

    ticket = pair.submit(prompt_of(34), max_tokens=20)
    transport.poll = poll_late  # type: ignore[method-assign]
    while "decode.prefill" not in pair.outputs[ticket].stages:
        pair.turn()
    transport.poll = poll  # type: ignore[method-assign]
    pair.run()
    stages = pair.outputs[ticket].stages
    assert stages.count("decode.handoff") == 2
    assert stages.index("decode.preempted") > stages.index("decode.prefill")
    assert pair.outputs[older].tokens[0] == golden[tuple(prompt_of(2))]
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(34))]


def test_failures_can_fail_the_request_instead(make: Make) -> None:
    pair = make(kv={"on_load_failure": "fail"})
    ticket = pair.submit(PROMPT)
    pair.turn()
    pair.remove("prefill-0#1")
    pair.run()
    refused = pair.outputs[ticket].refused
    assert refused is not None
    assert refused.status == 503
    assert refused.retryable
    assert "peer_lost" in refused.message


def test_a_peer_that_breaks_the_protocol_harms_itself_alone(
    make: Make, golden: dict[tuple[int, ...], list[int]]
) -> None:
    pair = make()
    ticket = pair.submit(prompt_of(12), max_tokens=20)
    pair.turn()
    pair.decode.worker.handle("prefill-0#1", BlocksReady(1, 0, 8))
    pair.decode.worker.handle("prefill-0#1", Accepted(1, [Table(0, [1], [1])], 0))
    pair.decode.worker.handle("prefill-7#1", PrefillFailed(1, FailureReason.EXPIRED, "not mine"))
    pair.run()
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(12))]


def test_mismatched_workers_never_exchange_kv(make: Make, folder: Path, tmp_path: Path) -> None:
    """A difference that cannot be made up for is refused in the handshake, named with both values; requests are served
    without."""
    make_checkpoint("qwen3_moe", tmp_path, seed=1)
    base = {"model": {"path": str(folder), "max_model_len": 256}, "kv": {"block_tokens": 8, "capacity": "4MiB"}}
    pair = make()
    pair.prefill_config = Config.model_validate(base | {"model": {"path": str(tmp_path), "max_model_len": 256}})
    pair.add("prefill-1#1", "prefill")
    pair.announce()
    pair.run()
    refusal = pair.decode.connector.refusal("prefill-1#1")
    assert all(word in refusal for word in ("model", "prefill-1#1", "decode-0#1")), refusal
    assert pair.decode.worker.report().peers == ["prefill-0#1"]
    ticket = pair.submit(PROMPT, prefill="prefill-1#1")
    pair.run()
    assert len(pair.outputs[ticket].tokens[0]) == 8


# ---- unequal ends ---------------------------------------------------------------------------------------------------


def unequal(make: Make, prefill: dict[str, object], **decode: object) -> Pair:
    """A pair whose prefill worker has other ``kv`` keys than its decode worker; KV of other dtypes is for a model in
    bfloat16, as a CPU's float32 kernels know but one."""
    model: dict[str, object] = {"dtype": "bfloat16"} if "dtype" in decode else {}
    pools: dict[str, object] = {"prefill": {"max_batched_tokens": 16}, "decode": {}}
    pair = make(prefill_kv=prefill, kv=decode, model=model, pools=pools)
    pair.pump()
    assert pair.decode.connector.connected("prefill-0#1"), pair.decode.connector.refusal("prefill-0#1")
    return pair


@pytest.mark.parametrize("checksums", [False, True], ids=["", "checksums"])
@pytest.mark.parametrize(
    "prefill",
    [
        {"block_tokens": 2}, {"block_tokens": 16}, {"block_tokens": 64}, {"block_tokens": 12}, {"block_tokens": 5},
        {"layer_groups": 3}, {"layer_groups": 1}, {"layer_groups": 3, "block_tokens": 24}, {"prefix_cache": False},
    ],
    ids=lambda kv: "-".join(f"{name}-{value}" for name, value in kv.items()),
)  # fmt: skip
def test_other_blocks_and_layer_groups_give_the_same_tokens(
    make: Make, golden: dict[tuple[int, ...], list[int]], prefill: dict[str, object], checksums: bool
) -> None:
    pair = unequal(make, prefill, checksums=checksums)
    prompts = [prompt_of(i) for i in (3, 12, 20, 39)]
    assert pair.generate(prompts, max_tokens=20) == [golden[tuple(prompt)] for prompt in prompts]
    # What decode has of a prompt may end inside one of prefill's blocks.
    longer = [*prompt_of(12), *golden[tuple(prompt_of(12))]]
    before = pair.decode.metrics.transfer_bytes.labels("inproc", "prefill-0")._value.get()
    ticket = pair.submit([*longer, 5, 6], max_tokens=4)
    pair.run()
    alone = make(pools={"colocated": {}})
    assert [pair.outputs[ticket].tokens[0]] == alone.generate([[*longer, 5, 6]], max_tokens=4)
    moved = pair.decode.metrics.transfer_bytes.labels("inproc", "prefill-0")._value.get() - before
    assert 0 < moved <= 2 * pair.decode.engine.cache.layout.block_bytes
    assert all(not o.stages.count("transfer.failed") for o in pair.outputs.values())


@pytest.mark.parametrize("prefill", [{}, {"block_tokens": 16}, {"layer_groups": 3}], ids=["", "blocks", "layers"])
@pytest.mark.parametrize("once", [False, True], ids=["always", "once"])
def test_bytes_that_change_on_the_way_are_never_tokens(
    make: Make, golden: dict[tuple[int, ...], list[int]], prefill: dict[str, object], once: bool
) -> None:
    pair = unequal(make, prefill, checksums=True)
    other = pair.add("prefill-1#1", "prefill")
    pair.announce()
    for _ in range(3):
        pair.pump()
    transport = pair.decode.transport
    copy, flipped = transport._copy, 0

    def corrupt(read: Read) -> str:
        nonlocal flipped
        error = copy(read)
        if read.source == "blocks" and not (once and flipped):
            flipped += 1
            target = transport._regions[read.target].buffer.array
            target[read.runs.target_offsets[-1] + read.runs.sizes[-1] - 1] ^= 0x80  # a sign
        return error

    transport._copy = corrupt  # type: ignore[method-assign]
    ticket = pair.submit(prompt_of(30), max_tokens=20, prefill="prefill-0#1")
    pair.run()
    assert flipped
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(30))]
    assert pair.outputs[ticket].stages.count("transfer.failed") == (1 if once else 2)
    assert pair.decode.metrics.load_failures.labels("checksum")._value.get() == (1 if once else 2)
    assert (other.worker.report().prompt_tokens > 0) or once


def test_a_checksum_that_is_lost_on_the_way_is_no_checksum(
    make: Make, golden: dict[tuple[int, ...], list[int]]
) -> None:
    pair = unequal(make, {}, checksums=True)
    dropped: list[Message] = []

    def deliver(sender: str, to: str, message: Message) -> bool:
        if isinstance(message, BlocksReady) and not dropped:
            dropped.append(message)
            return False
        return True

    pair.deliver = deliver
    ticket = pair.submit(prompt_of(30), max_tokens=20)
    pair.run()
    assert dropped
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(30))]
    assert pair.decode.metrics.load_failures.labels("checksum")._value.get() == 1


@pytest.mark.parametrize("checksums", [False, True], ids=["", "checksums"])
@pytest.mark.parametrize("block_tokens", [8, 24])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_kv_of_another_dtype_is_converted(
    make: Make, dtypes: tuple[str, str], block_tokens: int, checksums: bool
) -> None:
    """Decode's cache holds what prefill's does, rounded to its own dtype."""
    pair = unequal(make, {"dtype": dtypes[0], "block_tokens": block_tokens}, dtype=dtypes[1], checksums=checksums)
    prompt = prompt_of(12)
    found: dict[str, torch.Tensor] = {}

    def keep(node: Node, blocks: list[int]) -> None:
        """[layer, K|V, head, token, dim] of the prompt."""
        gathered = node.engine.cache.tensor[blocks].permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        found[node.peer] = gathered[:, :, :, : len(prompt)].clone()

    prefill, decode = pair.prefill.worker, pair.decode.worker
    assert isinstance(prefill, PrefillWorker)
    assert isinstance(decode, DecodeWorker)
    hold, begin = prefill._scheduler.hold, decode._prompts._on_here
    prefill._scheduler.hold = lambda job: keep(pair.prefill, job.sequence.tables[0]) or hold(job)  # type: ignore[func-returns-value,method-assign]
    decode._prompts._on_here = lambda stream: keep(pair.decode, stream.sequence.tables[0]) or begin(stream)  # type: ignore[func-returns-value,method-assign]
    ticket = pair.submit(prompt, max_tokens=20)
    pair.run()
    landed, sent = found[pair.decode.peer], found[pair.prefill.peer]
    assert landed.dtype != sent.dtype
    assert landed.abs().sum() > 0
    assert torch.equal(landed, sent.to(landed.dtype))
    assert len(pair.outputs[ticket].tokens[0]) == 20
    assert "transfer.failed" not in pair.outputs[ticket].stages


# ---- bad requests ---------------------------------------------------------------------------------------------------


def bad_requests() -> list[Generate]:
    def request(**changes: object) -> Generate:
        fields: dict[str, object] = {
            "ticket": 77, "request_id": "r", "tokens": PROMPT, "num_prompt_tokens": 50, "children": [Child(0, 0)],
            "sampling": Sampling(), "stopping": Stopping(8), "prefill": "prefill-0#1",
        }  # fmt: skip
        return Generate(**(fields | changes))  # type: ignore[arg-type]

    return [
        request(tokens=[131]),
        request(tokens=[2**31 - 1]),
        request(tokens=[1] * 256),
        request(tokens=[1] * 100_000),
        request(num_prompt_tokens=51),
    ]


@pytest.mark.parametrize("request_", bad_requests())
def test_bad_requests_are_refused_and_harm_nobody(
    make: Make, golden: dict[tuple[int, ...], list[int]], request_: Generate
) -> None:
    pair = make()
    ticket = pair.submit(prompt_of(5), max_tokens=20)
    pair.turn()
    pair.outputs[77] = type(pair.outputs[ticket])()
    pair.post(GATEWAY, pair.decode.peer, request_)
    pair.run()
    refused = pair.outputs[77].refused
    assert refused is not None
    assert refused.status == 400
    assert pair.outputs[ticket].tokens[0] == golden[tuple(prompt_of(5))]


def test_prefill_checks_for_itself(make: Make) -> None:
    pair = make()
    answers: list[Message] = []
    pair.prefill.worker._send = lambda to, message: answers.append(message)
    for tokens, skip, sums in (
        ([131], 0, (0, "")), ([1] * 300, 0, (0, "")), (PROMPT, 50, (0, "")), (PROMPT, 56, (0, "")),
        (PROMPT, 0, (8, "int7")),
    ):  # fmt: skip
        pair.prefill.worker.handle(
            "decode-0#1",
            Prefill(len(answers), "r", tokens, len(tokens), skip, [Child(0, 0)], Sampling(), -1, "", *sums),
        )
    assert [type(answer) for answer in answers] == [PrefillFailed] * 5
    assert pair.prefill.worker.drained()


def test_a_ticket_twice_and_unknown_tickets(make: Make) -> None:
    pair = make()
    ticket = pair.submit(PROMPT)
    request = Generate(ticket, "r", PROMPT, 50, [Child(0, 0)], Sampling(), Stopping(8))
    pair.post(GATEWAY, pair.decode.peer, request)
    pair.abort(12345)
    pair.run()
    assert len(pair.outputs[ticket].tokens[0]) == 8


def test_logits_that_are_no_numbers_end_that_request_alone(make: Make) -> None:
    pair = make()
    prompt = list(range(40, 90))
    [good] = pair.generate([prompt], max_tokens=8)
    bad_token = next(token for token in range(40) if token not in good)
    for node in pair.nodes.values():
        node.engine.model.embedding[bad_token] = float("nan")
    bad, fine = pair.submit([bad_token] * 20, max_tokens=8), pair.submit(prompt, max_tokens=8)
    pair.run()
    refused = pair.outputs[bad].refused
    assert refused is not None
    assert refused.status == 500
    assert "not a number" in refused.message
    assert pair.outputs[fine].tokens[0] == good
    # The decode worker computes it again, with no more luck.
    assert [node.metrics.invalid_logits._value.get() for node in pair.nodes.values()] == [1, 1]
    # What it left in the cache is not found again.
    for node in pair.nodes.values():
        node.engine.model.embedding[bad_token] = 0.0
    ticket = pair.submit([bad_token] * 20, max_tokens=8)
    pair.run()
    assert len(pair.outputs[ticket].tokens[0]) == 8


def test_a_step_that_breaks_ends_its_requests_and_the_worker_goes_on(make: Make) -> None:
    for name in ("prefill", "decode"):
        pair = make()
        engine: Engine = getattr(pair, name).engine
        submit = engine.submit

        def broken(*args: object) -> None:
            raise RuntimeError("out of memory")

        ticket = pair.submit(PROMPT, max_tokens=30)
        for _ in range(0 if name == "prefill" else 8):
            pair.turn()
        engine.submit = broken  # type: ignore[method-assign,assignment]
        for _ in range(4):
            pair.turn()
        engine.submit = submit  # type: ignore[method-assign]
        pair.run()
        if name == "decode":
            refused = pair.outputs[ticket].refused
            assert refused is not None
            assert "out of memory" in refused.message
        else:  # decode computed the prompt itself
            assert len(pair.outputs[ticket].tokens[0]) == 30
        assert len(pair.generate([PROMPT], max_tokens=5)[0]) == 5


# ---- sharing --------------------------------------------------------------------------------------------------------


def test_equal_prefixes_are_computed_once_and_salts_separate(make: Make) -> None:
    pair = make()
    pair.generate([PROMPT], max_tokens=4)
    before = pair.prefill.worker.report().prompt_tokens
    pair.generate([[*PROMPT[:48], 99, 98]], max_tokens=4)
    assert pair.prefill.worker.report().prompt_tokens - before == 2
    before = pair.prefill.worker.report().prompt_tokens
    pair.generate([PROMPT], max_tokens=4, salt="another tenant")
    assert pair.prefill.worker.report().prompt_tokens - before == len(PROMPT)


def test_prefixes_of_prompts_that_wait_together_are_shared(make: Make) -> None:
    pair = make(pools={"prefill": {"max_batched_tokens": 64}, "decode": {}})
    pair.generate([[*PROMPT, i] for i in range(10)], max_tokens=2)
    assert pair.prefill.worker.report().prompt_tokens < 4 * len(PROMPT)


def test_what_decode_has_is_not_fetched_again(make: Make) -> None:
    pair = make()
    first = pair.submit(PROMPT, max_tokens=20)
    pair.run()
    follow_up = PROMPT + pair.outputs[first].tokens[0]
    second = pair.submit(follow_up + [5, 6], max_tokens=4)
    pair.run()
    usage = pair.outputs[second].usage
    assert usage is not None
    assert usage.cached_tokens == (len(follow_up) - 1) // 8 * 8
    one_block = pair.decode.engine.cache.layout.block_bytes
    assert usage.transferred_bytes <= 2 * one_block


def test_kv_is_read_while_later_layers_and_chunks_still_compute(make: Make) -> None:
    pair = make(pools={"prefill": {"max_batched_tokens": 16}, "decode": {}}, kv={"layer_groups": 3})
    ready: list[tuple[int, int]] = []
    reads_before_the_end = 0

    def deliver(sender: str, to: str, message: Message) -> bool:
        nonlocal reads_before_the_end
        if isinstance(message, BlocksReady):
            ready.append((message.layer_group, message.num_tokens))
        if isinstance(message, Prefilled):
            reads_before_the_end = int(pair.decode.metrics.transfer_bytes.labels("inproc", "prefill-0")._value.get())
        return True

    pair.deliver = deliver
    pair.submit(PROMPT, max_tokens=4)
    pair.run()
    assert ready == [(group, tokens) for tokens in (16, 32, 48, 50) for group in range(3)]
    assert reads_before_the_end >= 4 * pair.decode.engine.cache.layout.block_bytes
    samples = {s.name: s.value for family in pair.decode.metrics.registry.collect() for s in family.samples}
    assert samples["tandem_transfer_hidden_seconds_count"] == samples["tandem_transfer_unhidden_seconds_count"] == 1


def test_membership_of_strangers_changes_nothing(make: Make) -> None:
    pair = make()
    members = [Member(peer, peer.split("-")[0], "n", "", True) for peer in (*pair.nodes, GATEWAY, "gateway-7#2")]
    pair.decode.worker.handle("controller", Membership(2, members))
    assert len(pair.generate([PROMPT], max_tokens=3)[0]) == 3


# ---- where prompts are computed -------------------------------------------------------------------------------------


def test_the_cost_model_prefers_what_is_sooner() -> None:
    cost = CostModel("auto", 512)
    cost.local_s_per_token = cost.remote_s_per_token = 1e-4
    cost.handoff_s = 5e-3
    assert cost.local_is_sooner(16, 0, 0, num_running=0)
    assert not cost.local_is_sooner(400, 0, 0, num_running=10)
    assert not cost.local_is_sooner(513, 0, 0, num_running=0)
    assert cost.local_is_sooner(16, 0, 0, num_running=2)
    assert not cost.local_is_sooner(100, 0, 0, num_running=2)
    # Queues count: a burst spreads over both.
    assert cost.local_is_sooner(100, 0, 300, num_running=2)
    assert not cost.local_is_sooner(100, 300, 300, num_running=2)
    assert CostModel("always", 1).local_is_sooner(10**6, 0, 0, 100)
    assert not CostModel("never", 10**6).local_is_sooner(1, 0, 0, 0)
    for _ in range(50):
        cost.computed_locally(100, 1.0)
        cost.handed_off(0.05, 0.0005)
    assert abs(cost.local_s_per_token - 0.01) < 1e-3
    assert abs(cost.handoff_s - 0.05) < 1e-3


def test_short_rests_are_computed_locally_in_auto(folder: Path) -> None:
    config = {"model": {"path": str(folder), "max_model_len": 256}, "kv": {"block_tokens": 8, "capacity": "4MiB"}}
    pair = Pair(Config.model_validate(config))
    ticket = pair.submit([1, 2, 3], max_tokens=3)
    pair.run()
    assert "decode.prefill" in pair.outputs[ticket].stages
    pair.close()
