"""A decode worker that ends hands running sequences over with their KV: single-stepped, with the real workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.pair import GATEWAY, Output, Pair
from tandem.core.config import Config
from tandem.core.messages import Abort, Child, Generate, Message, Prefill, Sampling
from tandem.decode.worker import DecodeWorker

SOURCE, OTHER = "decode-0#1", "decode-1#1"
FAMILIES = ["qwen3_moe", "gpt_oss", "qwen3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One family whose layers all see everything, and one with windows."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        make_checkpoint(family, folder)
    return folders


class Cluster:
    """A pair with a second decode worker, and a gateway that sends on what is moved, as the dispatcher does."""

    def __init__(self, folder: Path, overlap: bool, **sections: dict[str, object]) -> None:
        base: dict[str, object] = {
            "model": {"path": str(folder), "max_model_len": 256}, "routing": {"local_prefill": "never"},
            "kv": {"block_tokens": 8, "capacity": "4MiB"} | sections.pop("kv", {}),
        }  # fmt: skip
        self.pair = Pair(Config.model_validate(base | sections), overlap)
        self.source = self.pair.decode
        self.other = self.pair.add(OTHER, "decode")
        self.pair.announce()
        self.pair.run()
        self.sent: list[tuple[str, str, Message]] = []
        self._requests: dict[int, Generate] = {}
        self._went_on: dict[tuple[int, int], int] = {}
        self.pair.deliver = self._deliver

    def _deliver(self, sender: str, to: str, message: Message) -> bool:
        self.sent.append((sender, to, message))
        if isinstance(message, Generate):
            self._requests[message.ticket] = message
        return True

    def end_source(self) -> None:
        self.pair.announce(ending=(SOURCE,))

    def turn(self) -> bool:
        """One of the pair's; then what was moved is sent to the other worker."""
        busy = self.pair.turn()
        for ticket, output in list(self.pair.outputs.items()):
            for index, moved in output.moved.items():
                if (ticket, index) not in self._went_on:
                    self._went_on[ticket, index] = self._go_on(self._requests[ticket], index, moved.readers)
                    busy = True
        return busy

    def run(self) -> None:
        for _ in range(100_000):
            if not self.turn():
                return
        raise AssertionError("the workers do not come to rest")

    def _go_on(self, request: Generate, index: int, readers: list[str]) -> int:
        assert not readers or readers == [OTHER]
        self.pair.decode = self.other
        child = next(child for child in request.children if child.index == index)
        return self.pair.submit(
            request.tokens + self.pair.outputs[request.ticket].tokens.get(index, []),
            max_tokens=request.stopping.max_tokens, stop_ids=request.stopping.stop_ids,
            num_prompt_tokens=request.num_prompt_tokens, sampling=request.sampling, children=[child],
            prefill=SOURCE if readers else None, request_id=request.request_id, salt=request.salt,
        )  # fmt: skip

    def output(self, ticket: int, index: int = 0) -> tuple[list[int], list[float]]:
        """A request's tokens and their log probabilities, wherever they came from."""
        output: Output = self.pair.outputs[ticket]
        tokens = list(output.tokens.get(index, []))
        logprobs = [value.chosen for value in output.logprobs.get(index, [])]
        after = self._went_on.get((ticket, index))
        if after is not None:
            later = self.output(after, index)
            tokens, logprobs = tokens + later[0], logprobs + later[1]
        return tokens, logprobs

    def pulled(self) -> int:
        """Tokens whose KV the other worker had from the source, or asked it for."""
        asked = [m for _, to, m in self.sent if isinstance(m, Prefill) and to == SOURCE]
        return sum(len(message.tokens) - message.skip_tokens for message in asked)

    def salt(self) -> str:
        """Under which nothing is in any prefix cache."""
        return f"salt {len(self.sent)}"

    def check(self) -> None:
        self.run()
        for node in self.pair.nodes.values():
            node.check_idle()
            assert node.worker.drained()
        self.pair.close()


@pytest.fixture
def cluster(folders: dict[str, Path]) -> Iterator[Cluster]:
    cluster = Cluster(folders["gpt_oss"], overlap=True)
    yield cluster
    cluster.check()


def prompt_of(i: int) -> list[int]:
    return [(7 * i + 3 * j) % 120 + 1 for j in range(20 + 9 * i)]


def ask(pair: Pair, i: int, **changes: object) -> int:
    sampling = Sampling(temperature=1.0, logprobs=1, repetition_penalty=1.2 if i % 2 else 1.0)
    return pair.submit(prompt_of(i), **({"max_tokens": 30, "sampling": sampling, "seeds": [i]} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES[:2])
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_it_goes_on_from_the_very_next_token_whenever_it_is_moved(
    folders: dict[str, Path], family: str, overlap: bool
) -> None:
    cluster = Cluster(folders[family], overlap)
    for turns in (0, 1, 2, 3, 4, 6, 9, 15, 25):
        move_after(cluster, turns)
        cluster.pair.decode = cluster.source
        cluster.pair.announce()
    cluster.check()


def move_after(cluster: Cluster, turns: int) -> None:
    tickets = [ask(cluster.pair, i) for i in range(4)]
    cluster.run()
    want = [cluster.output(ticket) for ticket in tickets]
    tickets = [ask(cluster.pair, i, salt=cluster.salt()) for i in range(4)]
    for _ in range(turns):
        cluster.turn()
    begun = sum(bool(cluster.pair.outputs[ticket].tokens) for ticket in tickets)
    pulled = cluster.pulled()
    before = cluster.source.worker.report().prompt_tokens
    cluster.end_source()
    cluster.run()
    got = [cluster.output(ticket) for ticket in tickets]
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    for (_, ours), (_, theirs) in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    if 3 < turns < 25 and begun:
        assert cluster.pulled() > pulled
    assert cluster.source.worker.report().prompt_tokens == before, "the source computes nothing again"
    assert cluster.source.worker.drained()


def test_outputs_that_have_begun_come_first(folders: dict[str, Path]) -> None:
    cluster = Cluster(folders["qwen3_moe"], overlap=True, pools={"prefill": {}, "decode": {"max_running": 1}})
    pair = cluster.pair
    waiting = [ask(pair, i) for i in range(3)]
    begun = pair.submit(prompt_of(3), max_tokens=30, num_prompt_tokens=len(prompt_of(3)) - 4)
    ended: list[int] = []
    while len(ended) < 4:
        pair.turn()
        ended += [t for t in (*waiting, begun) if pair.outputs[t].finish and t not in ended]
    assert ended == [begun, *waiting]
    cluster.check()


def test_several_outputs_of_one_request_are_moved(cluster: Cluster) -> None:
    want = ask(cluster.pair, 3, seeds=[1, 2, 3])
    cluster.run()
    ticket = ask(cluster.pair, 3, seeds=[1, 2, 3], salt=cluster.salt())
    while len(cluster.pair.outputs[ticket].tokens.get(2, [])) < 5:
        cluster.turn()
    cluster.end_source()
    cluster.run()
    assert len(cluster.pair.outputs[ticket].moved) == 3
    for index in range(3):
        assert cluster.output(ticket, index)[0] == cluster.output(want, index)[0]
    prefills = [m for _, to, m in cluster.sent if isinstance(m, Prefill) and m.salt and to != SOURCE]
    assert len(prefills) == 1, "its prompt was computed once"


def test_who_is_alone_finishes(cluster: Cluster) -> None:
    """Nobody has greeted it who could take over."""
    cluster.pair.remove(OTHER)
    ticket = ask(cluster.pair, 2)
    for _ in range(8):
        cluster.turn()
    cluster.end_source()
    cluster.run()
    assert not cluster.pair.outputs[ticket].moved
    assert len(cluster.output(ticket)[0]) == 30


@pytest.mark.parametrize("when", ["moved", "asked", "reading"])
def test_when_the_source_dies_it_is_computed_again(cluster: Cluster, when: str) -> None:
    want = ask(cluster.pair, 2)
    cluster.run()
    ticket = ask(cluster.pair, 2, salt=cluster.salt())
    while len(cluster.pair.outputs[ticket].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    while not cluster.pair.outputs[ticket].moved:
        cluster.turn()
    if when == "reading":
        cluster.other.connector.poll = lambda: []  # type: ignore[method-assign] - the reads take for ever
    for _ in range({"moved": 0, "asked": 2, "reading": 6}[when]):
        cluster.turn()
    cluster.pair.remove(SOURCE)
    if when == "reading":
        del cluster.other.connector.poll
    cluster.run()
    assert cluster.output(ticket)[0] == cluster.output(want)[0]


def test_what_nobody_asks_for_is_given_up(cluster: Cluster) -> None:
    ticket = ask(cluster.pair, 2)
    while len(cluster.pair.outputs[ticket].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    while not cluster.pair.outputs[ticket].moved:
        cluster.pair.turn()  # the gateway does nothing
    assert not cluster.source.worker.drained()
    cluster.pair.clock.advance(31)
    cluster.pair.run()
    assert cluster.source.worker.drained()


def test_an_abort_ends_what_is_held_too(cluster: Cluster) -> None:
    ticket = ask(cluster.pair, 2)
    while len(cluster.pair.outputs[ticket].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    while not cluster.pair.outputs[ticket].moved:
        cluster.pair.turn()
    cluster.pair.post(GATEWAY, SOURCE, Abort([ticket], 0))
    cluster.pair.run()
    assert cluster.source.worker.drained()


def test_only_the_very_sequence_is_lent(cluster: Cluster) -> None:
    """Other tokens, another salt, another output: refused, and computed as any other prompt."""
    ticket = ask(cluster.pair, 2)
    while len(cluster.pair.outputs[ticket].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    while not cluster.pair.outputs[ticket].moved:
        cluster.pair.turn()
    tokens = prompt_of(2) + cluster.pair.outputs[ticket].tokens[0]
    cluster.pair.decode = cluster.other
    lender = cluster.source.worker
    assert isinstance(lender, DecodeWorker)
    common = {"prefill": SOURCE, "request_id": f"r{ticket}", "num_prompt_tokens": len(prompt_of(2)), "max_tokens": 12}
    sampling = Sampling(temperature=1.0, logprobs=1)
    strangers = [
        cluster.pair.submit([1, *tokens[1:]], children=[Child(0, 2)], sampling=sampling, **common),  # type: ignore[arg-type]
        cluster.pair.submit(tokens, children=[Child(0, 2)], sampling=sampling, salt="other", **common),  # type: ignore[arg-type]
        cluster.pair.submit(tokens, children=[Child(1, 9)], sampling=sampling, **common),  # type: ignore[arg-type]
    ]
    cluster.pair.run()
    assert len(lender._lender) == 1, "still there for whoever it is for"
    for stranger in strangers:
        assert cluster.pair.outputs[stranger].finish


@pytest.mark.parametrize("decode", [{"tensor_parallel": 2}, {"max_running": 2}], ids=["ranks", "few"])
def test_workers_of_several_ranks_and_those_that_are_full(folders: dict[str, Path], decode: dict[str, object]) -> None:
    cluster = Cluster(folders["qwen3"], overlap=False, pools={"prefill": {}, "decode": decode})
    wants = [ask(cluster.pair, i) for i in range(3)]
    cluster.run()
    tickets = [ask(cluster.pair, i, salt="again") for i in range(3)]
    while len(cluster.pair.outputs[tickets[0]].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    cluster.run()
    for ticket, want in zip(tickets, wants, strict=True):
        assert cluster.output(ticket)[0] == cluster.output(want)[0]
    assert cluster.pulled() > 0
    cluster.check()


def test_a_failed_load_fails_no_request_where_it_would_a_prompts(folders: dict[str, Path]) -> None:
    cluster = Cluster(folders["qwen3_moe"], overlap=True, kv={"on_load_failure": "fail"})
    want = ask(cluster.pair, 2)
    cluster.run()
    ticket = ask(cluster.pair, 2, salt="again")
    while len(cluster.pair.outputs[ticket].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    while not cluster.pair.outputs[ticket].moved:
        cluster.turn()
    cluster.other.connector.poll = lambda: []  # type: ignore[method-assign] - the reads take for ever
    for _ in range(6):
        cluster.turn()
    cluster.pair.remove(SOURCE)
    del cluster.other.connector.poll
    cluster.run()
    assert cluster.other.metrics.load_failures.labels("peer_lost")._value.get() == 1
    assert cluster.output(ticket)[0] == cluster.output(want)[0]
    cluster.check()


def test_checksums_cover_it(folders: dict[str, Path]) -> None:
    cluster = Cluster(folders["gpt_oss"], overlap=True, kv={"checksums": True})
    want = ask(cluster.pair, 2)
    cluster.run()
    ticket = ask(cluster.pair, 2, salt=cluster.salt())
    while len(cluster.pair.outputs[ticket].tokens.get(0, [])) < 9:
        cluster.turn()
    cluster.end_source()
    cluster.run()
    assert cluster.output(ticket)[0] == cluster.output(want)[0]
    assert cluster.pulled() > 0
    assert cluster.other.metrics.load_failures.labels("checksum")._value.get() == 0
    cluster.check()
