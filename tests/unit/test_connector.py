"""Connectors of unequal workers: several ranks, block sizes, dtypes, KV groups with windows; what fails, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tandem.core.clock import ManualClock
from tandem.core.errors import ConfigError, TransferError
from tandem.core.messages import FailureReason, Hello, HelloReply, KVGroupSpec, RankSpec, Table, decode, encode
from tandem.core.metrics import WorkerMetrics
from tandem.kernels.convert_runs import DTYPES, convert
from tandem.kv_transfer import connector as connector_module
from tandem.kv_transfer.connector import Connector, PullResult
from tandem.kv_transfer.ends import End, first_end
from tandem.kv_transfer.fence import Fence
from tandem.kv_transfer.handoff import Handoff, Instruction, Loaded, Pull, Release
from tandem.kv_transfer.layout import KVGroup, KVLayout, group_layers, layer_groups
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.sum_queue import Pending
from tandem.kv_transfer.transports import Read, TransferResult
from tandem.kv_transfer.transports.inproc import InprocTransport

NUM_BLOCKS = 128
HEAD_DIM = 4

made: list[Side] = []


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    yield
    close_all()


def close_all() -> None:
    while made:
        made.pop().close()


class Wire(InprocTransport):
    """A transport in this process whose reads can be held back, broken, and corrupted on the way."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.held = False
        self.error = ""
        self.flip = -1
        """Byte of each read of blocks, from its start, that arrives changed."""
        self.reads: list[Read] = []

    def submit(self, read: Read) -> int:
        self.reads.append(read)
        return super().submit(read)

    def poll(self) -> list[TransferResult]:
        if self.held:
            return []
        pending = dict(self._pending)
        results = super().poll()
        for number in [result.number for result in results] if self.flip >= 0 else ():
            read = pending[number]
            if read.source == "blocks":
                self._regions[read.target].buffer.array[read.runs.target_offsets[0] + self.flip] ^= 0x40
        return [result._replace(error=self.error or result.error) for result in results]

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        wanted = set(numbers) & self._pending.keys()
        return wanted if self.held else super().cancel(numbers)


class Side:
    """A worker's memory, ranks and connector."""

    def __init__(
        self,
        peer: str,
        heads: list[range],
        *,
        groups: tuple[KVGroup, ...],
        starts: list[int],
        block_tokens: int = 4,
        dtype: str = "float32",
        checksums: bool = False,
        seed: int = 0,
    ) -> None:
        places = max(len(group.layers) for group in groups)
        self.heads, self.groups = heads, groups
        self.layout = KVLayout(places, len(heads[0]), HEAD_DIM, block_tokens, dtype)
        self.caches = [Buffer(NUM_BLOCKS * self.layout.block_bytes) for _ in heads]
        self.rng = np.random.default_rng(seed)
        for rank in range(len(heads)):
            values = torch.from_numpy(self.rng.normal(size=self.layout.shape(NUM_BLOCKS)) * 30)
            self.blocks(rank)[:] = convert(values, DTYPES[dtype])
        for rank, held in enumerate(heads):  # the ranks that hold the same heads hold the same KV
            self.caches[rank].array[:] = self.caches[heads.index(held)].array
        generations = Buffer(NUM_BLOCKS * 8)
        self.generations: np.ndarray = generations.array.view(np.uint64)
        self.generations[:] = self.rng.integers(1, 1000, NUM_BLOCKS)
        self.wires = [Wire() for _ in heads]
        ends = [
            first_end(held, {"inproc": wire}, cache, None if rank else generations)
            for rank, (held, wire, cache) in enumerate(zip(heads, self.wires, self.caches, strict=True))
        ]
        self.metrics = WorkerMetrics(CollectorRegistry())
        self.connector = Connector(
            peer, "model", self.layout, groups, starts, ends, "auto", 30.0, ManualClock(), self.metrics, checksums
        )
        self.tables: list[list[int]] = []
        self.buffers = [*self.caches, generations]
        made.append(self)

    def close(self) -> None:
        self.connector.close()
        for buffer in self.buffers:
            buffer.close()

    def blocks(self, rank: int) -> torch.Tensor:
        """[block, place, K|V, head, token, dim]."""
        layout = self.layout
        return torch.from_numpy(self.caches[rank].array).view(DTYPES[layout.dtype]).view(layout.shape(NUM_BLOCKS))

    def allocate(self, num_tokens: int, firsts: Iterable[int]) -> None:
        """A block table for each group, without blocks before the one that holds a group's first token."""
        size, free = self.layout.block_tokens, self.rng.permutation(NUM_BLOCKS).tolist()
        self.tables = [
            [-1 if (i + 1) * size <= first else free.pop() for i in range(-(-num_tokens // size))] for first in firsts
        ]

    def kv(self, layer: int, head: int, token: int) -> torch.Tensor:
        """[K|V, dim] of one token, from the first rank that has the head."""
        rank = next(rank for rank, held in enumerate(self.heads) if head in held)
        return self.kv_of(rank, layer, head, token)

    def kv_of(self, rank: int, layer: int, head: int, token: int) -> torch.Tensor:
        group = next(group for group in self.groups if layer in group.layers)
        block = self.tables[self.groups.index(group)][token // self.layout.block_tokens]
        place, at = group.layers.index(layer), token % self.layout.block_tokens
        return self.blocks(rank)[block, place, :, head - self.heads[rank].start, at]

    def announce(self, skip: int, num_tokens: int) -> list[Table]:
        """What a prefill worker says in `Accepted`."""
        size, tables = self.layout.block_tokens, []
        for group, table in zip(self.groups, self.tables, strict=True):
            first = max(skip, group.first_needed(num_tokens)) // size
            tables.append(Table(first * size, table[first:], self.generations[table[first:]].tolist()))
        return tables


def heads_of(ranks: int, num_heads: int) -> list[range]:
    if ranks >= num_heads:
        return [range(r * num_heads // ranks, r * num_heads // ranks + 1) for r in range(ranks)]
    return [range(num_heads * r // ranks, num_heads * (r + 1) // ranks) for r in range(ranks)]


def connect(reader: Side, source: Side) -> None:
    hello = decode(encode(reader.connector.hello()))
    assert isinstance(hello, Hello)
    reply = decode(encode(source.connector.answer(hello)))
    assert isinstance(reply, HelloReply)
    reader.connector.connect(reply)


def run(reader: Side) -> list[PullResult]:
    results = []
    for _ in range(2000):
        results += reader.connector.poll()
        if not reader.connector.num_pulls:
            return results + reader.connector.poll()
    raise AssertionError("the pulls do not end")


class Case:
    """Two workers of one model, and a prompt."""

    def __init__(self, draw: st.DrawFn) -> None:
        windows = draw(st.lists(st.sampled_from([0, 0, 5, 9]), min_size=1, max_size=4))
        self.groups = group_layers(windows)
        self.num_layers = len(windows)
        self.num_heads = draw(st.sampled_from([1, 2, 4]))
        ranks = st.sampled_from([1, 1, 2, 4])
        sizes, dtypes = st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from(sorted(DTYPES))
        size = draw(sizes)
        our_size = draw(st.sampled_from([n for n in range(1, 9) if size % n == 0])) if any(windows) else draw(sizes)
        self.num_tokens = draw(st.integers(1, 24))
        self.skip = draw(st.integers(0, self.num_tokens - 1))
        self.cut = draw(st.integers(self.skip, self.num_tokens))
        self.checksums = draw(st.booleans())
        reader_ranks, source_ranks = draw(ranks), draw(ranks)
        self.source = Side(
            "prefill-0#1", heads_of(source_ranks, self.num_heads), groups=self.groups, seed=1, block_tokens=size,
            starts=layer_groups(self.num_layers, draw(st.integers(1, 3))), dtype=draw(dtypes),
        )  # fmt: skip
        self.reader = Side(
            "decode-0#1", heads_of(reader_ranks, self.num_heads), groups=self.groups, seed=2, block_tokens=our_size,
            starts=layer_groups(self.num_layers, draw(st.integers(1, 3))), dtype=draw(dtypes), checksums=self.checksums,
        )  # fmt: skip
        self.source.allocate(self.num_tokens, [group.first_needed(self.num_tokens) for group in self.groups])
        self.reader.allocate(self.num_tokens, self.reader.connector.first_tokens(0, self.num_tokens))
        connect(self.reader, self.source)

    def pull(self, layer_group: int, tokens: range) -> int:
        terms = self.reader.connector.terms("prefill-0#1")
        sums = None
        if terms.sum_tokens:
            sums = self.source.connector.sums(
                layer_group, tokens, self.skip, self.num_tokens, self.source.tables, terms.sum_tokens,
                self.reader.layout.dtype,
            )()  # fmt: skip
        return self.reader.connector.pull(
            "prefill-0#1", layer_group, tokens, self.reader.tables, self.source.announce(self.skip, self.num_tokens),
            self.skip, self.num_tokens, sums,
        )  # fmt: skip

    def load(self) -> list[Instruction]:
        """All of the prompt, as a handoff asks for it; returns what the handoff said in the end."""
        terms = self.reader.connector.terms("prefill-0#1")
        handoff = Handoff(
            1, "prefill-0#1", self.skip, self.num_tokens,
            self.reader.connector.first_tokens(self.skip, self.num_tokens), terms.block_tokens, terms.unit_tokens,
            terms.num_layer_groups, ManualClock(),
        )  # fmt: skip
        assert handoff.accepted(self.source.announce(self.skip, self.num_tokens)) == []
        pulls: dict[int, Pull] = {}
        for layer_group in range(terms.num_layer_groups):
            for mark in (self.cut, self.num_tokens):
                for step in handoff.ready(layer_group, mark):
                    assert isinstance(step, Pull)
                    pulls[self.pull(layer_group, range(step.start, step.stop))] = step
        end = handoff.prompt_done()
        for result in run(self.reader):
            end += handoff.pull_ended(pulls.pop(result.number), result.failure, result.num_good)
        return end

    def check(self) -> None:
        """What had to come is there, rounded; what was there before is as it was."""
        dtype = DTYPES[self.reader.layout.dtype]
        firsts = self.reader.connector.first_tokens(self.skip, self.num_tokens)
        for rank, held in enumerate(self.reader.heads):
            for group, first in zip(self.groups, firsts, strict=True):
                for layer in group.layers:
                    for head in held:
                        for token in range(first, self.num_tokens):
                            found = self.reader.kv_of(rank, layer, head, token)
                            wanted = convert(self.source.kv(layer, head, token), dtype)
                            assert torch.equal(found.float(), wanted.float()), (rank, layer, head, token)


@given(st.composite(Case)())
def test_kv_arrives_whatever_the_ends_are(case: Case) -> None:
    check_that_kv_arrives(case)
    close_all()


def check_that_kv_arrives(case: Case) -> None:
    before = [cache.array.copy() for cache in case.reader.caches]
    kept = [
        (rank, layer, head, token, case.reader.kv_of(rank, layer, head, token).float().clone())
        for rank, held in enumerate(case.reader.heads)
        for group, table in zip(case.groups, case.reader.tables, strict=True)
        for layer in group.layers
        for head in held
        for token in range(case.skip)
        if table[token // case.reader.layout.block_tokens] >= 0
    ]
    assert case.load() == [Release(), Loaded()]
    case.check()
    for rank, layer, head, token, value in kept:
        assert torch.equal(case.reader.kv_of(rank, layer, head, token).float(), value), "what we had was overwritten"
    used = {block for table in case.reader.tables for block in table}
    others = [block for block in range(NUM_BLOCKS) if block not in used]
    for cache, old in zip(case.reader.caches, before, strict=True):
        shape = NUM_BLOCKS, case.reader.layout.block_bytes
        np.testing.assert_array_equal(cache.array.reshape(shape)[others], old.reshape(shape)[others])


@given(st.composite(Case)(), st.data())
def test_a_reused_block_is_noticed_and_what_came_before_it_is_good(case: Case, data: st.DataObject) -> None:
    check_a_reused_block(case, data)
    close_all()


def check_a_reused_block(case: Case, data: st.DataObject) -> None:
    [*tables] = case.source.announce(case.skip, case.num_tokens)
    group = data.draw(st.integers(0, len(tables) - 1))
    index = data.draw(st.integers(0, len(tables[group].blocks) - 1))
    layers = case.reader.connector._peers["prefill-0#1"].layers(0)
    number = case.pull(0, range(case.skip, case.num_tokens))
    case.source.generations[tables[group].blocks[index]] += 1
    [result] = run(case.reader)
    assert result.number == number
    if len(case.groups[group].places(layers)) == 0:
        assert result.failure is None
        return
    first = tables[group].first_token + index * case.source.layout.block_tokens
    firsts = case.reader.connector.first_tokens(case.skip, case.num_tokens)
    if first + case.source.layout.block_tokens <= firsts[group]:
        assert result.failure is None  # a block that was announced and not needed
        return
    assert result.failure is FailureReason.GENERATION
    assert result.num_good == max(0, first - case.skip)


def simple(
    *, reader: dict[str, Any] | None = None, source: dict[str, Any] | None = None, ranks: tuple[int, int] = (1, 1)
) -> tuple[Side, Side]:
    """Two workers, alike but for what is told, with 20 tokens at the source."""
    base: dict[str, Any] = {"groups": group_layers([0] * 4), "starts": [0, 2]}
    theirs = Side("prefill-0#1", heads_of(ranks[1], 4), seed=1, **(base | (source or {})))
    ours = Side("decode-0#1", heads_of(ranks[0], 4), seed=2, **(base | (reader or {})))
    for side in (theirs, ours):
        side.allocate(20, [0] * len(side.groups))
    return ours, theirs


def pull(reader: Side, source: Side, *, layer_group: int = 0, sums: np.ndarray | None = None) -> int:
    return reader.connector.pull(
        "prefill-0#1", layer_group, range(20), reader.tables, source.announce(0, 20), 0, 20, sums
    )


def test_each_pair_of_ranks_that_share_heads_reads_once() -> None:
    for ranks in ((1, 1), (1, 4), (4, 1), (2, 4), (4, 2), (8, 4), (4, 8)):
        reader, source = simple(ranks=ranks)
        connect(reader, source)
        pull(reader, source)
        run(reader)
        reads = [read for wire in reader.wires for read in wire.reads if read.source == "blocks"]
        assert len(reads) == max(min(ranks[0], 8), min(ranks[1], 4)), ranks
        fences = [[read.peer for read in wire.reads if read.source == "generations"] for wire in reader.wires]
        assert fences == [["prefill-0#1"]] + [[]] * (ranks[0] - 1), "the first rank asks the first, once"
        assert len({read.peer for read in reads}) == min(ranks[1], 4)


def test_a_pull_ends_when_all_its_reads_have() -> None:
    reader, source = simple(ranks=(2, 1))
    connect(reader, source)
    reader.wires[1].held = True
    pull(reader, source)
    for _ in range(5):
        assert reader.connector.poll() == []
    assert all(read.source == "blocks" for read in reader.wires[0].reads), "the fence comes after every byte"
    reader.wires[1].held = False
    assert [result.failure for result in run(reader)] == [None]


def test_a_read_that_fails_drains_the_others() -> None:
    reader, source = simple(ranks=(2, 1))
    connect(reader, source)
    reader.wires[0].error, reader.wires[1].held = "broken", True
    number = pull(reader, source)
    for _ in range(3):
        assert reader.connector.poll() == [], "the other rank's read may still write"
    reader.wires[1].held = False
    assert run(reader) == [PullResult(number, FailureReason.TRANSPORT, 0, reader.layout.layer_bytes * 2 * 5 * 2)]


@pytest.mark.parametrize("fencing", [False, True])
def test_giving_up_waits_for_what_still_writes(fencing: bool) -> None:
    reader, source = simple(ranks=(2, 1))
    connect(reader, source)
    for wire in reader.wires:
        wire.held = not fencing
    first, second = pull(reader, source), pull(reader, source, layer_group=1)
    reader.connector.poll()
    for wire in reader.wires:
        wire.held = True
    assert reader.connector.cancel([first, second, 99]) == {first, second}
    assert reader.connector.num_pulls == 2
    for wire in reader.wires:
        wire.held = False
    assert {result.number for result in run(reader)} == {first, second}
    third = pull(reader, source)
    assert reader.connector.cancel([third]) == set()
    assert reader.connector.num_pulls == 0
    assert run(reader) == []
    pull(reader, source)
    assert [result.failure for result in run(reader)] == [None]
    assert reader.connector._fence.num_free == len(reader.connector._fence.buffer.array) // 8


def test_a_peer_that_goes_takes_its_pulls_with_it() -> None:
    reader, source = simple(ranks=(2, 2))
    connect(reader, source)
    number = pull(reader, source)
    reader.connector.remove_peer("prefill-0#1")
    assert [(r.number, r.failure) for r in run(reader)] == [(number, FailureReason.PEER_LOST)]
    number = pull(reader, source)
    assert [(r.number, r.failure) for r in run(reader)] == [(number, FailureReason.PEER_LOST)]
    connect(reader, source)
    pull(reader, source)
    assert [result.failure for result in run(reader)] == [None]


@pytest.mark.parametrize("slots", [1, 3, 7])
def test_few_slots_for_generations_cost_time_only(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    monkeypatch.setattr(connector_module, "Fence", lambda: Fence(slots))
    reader, source = simple(source={"block_tokens": 2})
    connect(reader, source)
    numbers = [pull(reader, source, layer_group=group % 2) for group in range(6)]
    assert reader.connector.cancel(numbers[3:4]) == set()
    source.generations[source.tables[0][7]] += 1
    results = run(reader)
    assert sorted(result.number for result in results) == [*numbers[:3], *numbers[4:]]
    # The announcement came before the block was reused in all of them.
    assert {(result.failure, result.num_good) for result in results} == {(FailureReason.GENERATION, 14)}
    assert reader.connector._fence.num_free == slots


# ---- the handshake --------------------------------------------------------------------------------------------------


def windowed(*windows: int) -> dict[str, Any]:
    return {"groups": group_layers(windows), "starts": [0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: {"protocol": 1}, ("protocol", "1", "2")),
        (lambda h: {"fingerprint": "model at another revision"}, ("model", "another revision", "decode-0#1 model")),
        (lambda h: {"cache": msgspec.structs.replace(h.cache, num_parts=1)}, ("kv.num_parts", "1", "2")),
        (lambda h: {"cache": msgspec.structs.replace(h.cache, num_kv_heads=8)}, ("kv.num_kv_heads", "8", "4")),
        (lambda h: {"cache": msgspec.structs.replace(h.cache, head_dim=6)}, ("kv.head_dim", "6", "4")),
        (lambda h: {"cache": msgspec.structs.replace(h.cache, num_layers=7)}, ("kv.num_layers", "7", "4")),
        (
            lambda h: {"cache": msgspec.structs.replace(h.cache, groups=[KVGroupSpec([0, 1, 2, 3], 9)])},
            ("kv.groups", "window=9", "window=0"),
        ),
        (lambda h: {"cache": msgspec.structs.replace(h.cache, dtype="int4")}, ("kv.dtype", "int4", "float32")),
        (lambda h: {"layer_groups": [0, 4]}, ("kv.layer_groups", "[0, 4]", "4")),
        (lambda h: {"layer_groups": [2, 1]}, ("kv.layer_groups", "[2, 1]")),
        (lambda h: {"layer_groups": []}, ("kv.layer_groups", "[]")),
        (lambda h: {"ranks": h.ranks[:1]}, ("ranks", "range(0, 2)", "4", "head 2")),
        (lambda h: {"ranks": []}, ("ranks", "head 0")),
        (lambda h: {"ranks": [RankSpec(0, 1 << 40, {})]}, ("ranks", "no such heads")),
        (lambda h: {"ranks": [RankSpec(0, 4, {})]}, ("kv.transport", "inproc", "prefill-0#1 does not offer it")),
        (lambda h: {"ranks": [RankSpec(0, 4, {"inproc": b""}, "cuda")]}, ("kv.transport", "cuda")),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_a_byte_moves(change: Any, words: tuple[str, ...]) -> None:
    reader, source = simple(ranks=(1, 2))
    reply = source.connector.answer(reader.connector.hello())
    assert reply.refused == ""
    hello = msgspec.structs.replace(reply.hello, **change(reply.hello))
    with pytest.raises(TransferError) as caught:
        reader.connector.connect(HelloReply(hello))
    assert caught.value.reason == "refused"
    assert all(word in caught.value.message for word in words), caught.value.message
    assert reader.connector.refusal("prefill-0#1")
    assert not reader.connector.connected("prefill-0#1")
    if "transport" not in caught.value.message and "ranks" not in words:
        # The other end sees it too.
        ours = msgspec.structs.replace(reader.connector.hello(), **change(reader.connector.hello()))
        assert source.connector.answer(ours).refused


def test_windowed_layers_need_blocks_that_divide_the_sources() -> None:
    for ours, theirs, good in ((2, 4, True), (4, 4, True), (4, 2, False), (3, 4, False)):
        reader, source = simple(
            reader={"block_tokens": ours} | windowed(0, 5, 5, 0), source={"block_tokens": theirs} | windowed(0, 5, 5, 0)
        )
        refused = source.connector.answer(reader.connector.hello()).refused
        assert bool(refused) is not good
        assert good or all(word in refused for word in ("block_tokens", str(ours), str(theirs), "divide")), refused


def test_an_older_hello_is_understood_as_far_as_its_protocol() -> None:
    source = simple()[1]
    old = msgspec.msgpack.encode(
        {"type": "Hello", "protocol": 1, "peer": "decode-0#1", "fingerprint": "model", "groups": [], "transports": {}}
    )
    hello = decode(old)
    assert isinstance(hello, Hello)
    refused = source.connector.answer(hello).refused
    assert "protocol" in refused
    assert "1" in refused


def test_memory_decides_which_transport_moves_what() -> None:
    """GPU memory by what moves it, and generations, on the host, by the same."""

    class Other(Wire):
        name = "shm"
        memory = frozenset({"cuda"})
        converts = True

    reader, source = simple()
    ends = {}
    for side in (reader, source):
        other = Other()
        plain = side.connector._ends[0].transports
        first_end(range(4), {"shm": other}, side.caches[0], side.buffers[-1])
        ends[side] = other
        side.connector = Connector(
            "decode-0#1" if side is reader else "prefill-0#1", "model", side.layout, side.groups, [0, 2],
            [End(range(4), {**plain, "shm": other}, "cuda")], "auto", 30.0, ManualClock(), side.metrics,
        )  # fmt: skip
    connect(reader, source)
    assert reader.connector.transport_of("prefill-0#1") == "shm"
    pull(reader, source)
    assert [result.failure for result in run(reader)] == [None]
    assert [read.source for read in ends[reader].reads] == ["blocks", "generations"]
    assert reader.wires[0].reads == []


# ---- checksums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("size", [4, 2, 6])
@pytest.mark.parametrize("flip", [0, 1, 37])
def test_bytes_that_change_on_the_way_are_noticed(ours: str, size: int, flip: int) -> None:
    reader, source = simple(
        reader={"dtype": ours, "checksums": True, "block_tokens": size}, source={"dtype": "bfloat16"}
    )
    connect(reader, source)
    unit = reader.connector.terms("prefill-0#1").sum_tokens
    assert unit % size == unit % 4 == 0
    sums = source.connector.sums(0, range(20), 0, 20, source.tables, unit, ours)()
    pull(reader, source, sums=sums)
    assert [result.failure for result in run(reader)] == [None]
    reader.wires[0].flip = flip
    number = pull(reader, source, sums=sums)
    [result] = run(reader)
    assert (result.number, result.failure) == (number, FailureReason.CHECKSUM)
    assert result.num_good % unit == 0
    reader.wires[0].flip = -1
    pull(reader, source, sums=sums)
    assert [result.failure for result in run(reader)] == [None]


def test_sums_that_do_not_come_are_a_failure() -> None:
    reader, source = simple(reader={"checksums": True})
    connect(reader, source)
    for sums in (None, np.zeros(4, np.uint64), np.zeros(5, np.uint64)):
        pull(reader, source, sums=sums)
        [result] = run(reader)
        assert result.failure is FailureReason.CHECKSUM
        assert result.num_good == 0


def test_a_reused_block_is_told_apart_from_a_changed_one() -> None:
    reader, source = simple(reader={"checksums": True})
    connect(reader, source)
    pull(reader, source, sums=np.zeros(5, np.uint64))
    source.generations[source.tables[0][3]] += 1
    [result] = run(reader)
    assert (result.failure, result.num_good) == (FailureReason.GENERATION, 12)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (4, 2), (2, 4), (8, 4), (4, 8), (8, 8)])
def test_bytes_that_change_in_any_rank_are_noticed(ranks: tuple[int, int]) -> None:
    """Ranks that hold the heads of another have read copies of their own."""
    reader, source = simple(reader={"checksums": True, "block_tokens": 2}, ranks=ranks)
    connect(reader, source)
    sums = source.connector.sums(0, range(20), 0, 20, source.tables, 4, "float32")()
    for rank in (None, *range(ranks[0])):
        if rank is not None:
            reader.wires[rank].flip = 5
        pull(reader, source, sums=sums)
        [result] = run(reader)
        assert result.failure is (None if rank is None else FailureReason.CHECKSUM)
        if rank is not None:
            reader.wires[rank].flip = -1


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank does not reach the memory of others."""
    make = first_end

    def other_ranks(*args: Any) -> End:
        end = make(*args)
        return end if args[3] is not None else end._replace(blocks=None)

    monkeypatch.setitem(globals(), "first_end", other_ranks)


def test_memory_that_cannot_be_summed_is_said_at_the_start(unmapped: None) -> None:
    with pytest.raises(ConfigError, match=r"kv\.checksums: the first of 2 ranks reaches"):
        simple(reader={"checksums": True}, ranks=(2, 1))


def test_a_peer_that_cannot_sum_is_not_read_from(unmapped: None) -> None:
    reader, source = simple(reader={"checksums": True}, ranks=(1, 2))
    with pytest.raises(TransferError, match=r"kv\.checksums: prefill-0#1 sends no sums: the first of 2 ranks"):
        connect(reader, source)
    assert source.connector.sums(0, range(20), 0, 20, source.tables, 4, "float32")().shape == (0,)


class Late:
    """Sums that take their time."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.there = False
        self.lost = False

    def query(self) -> bool:
        if self.lost:
            raise RuntimeError("the device is lost")
        return self.there

    def result(self) -> np.ndarray:
        return self.pending.result()


def test_sums_that_take_their_time_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: until then the pull has not ended; it may be given up, and its device may be lost."""
    reader, source = simple(reader={"checksums": True})
    connect(reader, source)
    sums = source.connector.sums(0, range(20), 0, 20, source.tables, 4, "float32")()
    late: list[Late] = []
    checksums = reader.connector._sums
    assert checksums is not None
    start = checksums.start
    monkeypatch.setattr(checksums, "start", lambda *a, **k: late.append(Late(start(*a, **k))) or late[-1])
    first, second, third = (pull(reader, source, sums=sums) for _ in range(3))
    for _ in range(5):
        assert reader.connector.poll() == []
    assert len(late) == reader.connector.num_pulls == 3
    assert reader.connector.cancel([second]) == set()
    late[0].there = late[2].lost = True
    results = {result.number: result for result in reader.connector.poll()}
    assert results.keys() == {first, third}
    assert (results[first].failure, results[first].num_good) == (None, 20)
    assert (results[third].failure, results[third].num_good) == (FailureReason.TRANSPORT, 0)
    assert reader.connector.num_pulls == 0

    def full(*_: object, **__: object) -> Pending:
        raise RuntimeError("no memory")

    monkeypatch.setattr(checksums, "start", full)
    fourth = pull(reader, source, sums=sums)
    assert [(r.number, r.failure) for r in run(reader)] == [(fourth, FailureReason.TRANSPORT)]


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_reads_are_counted_by_transport_and_peer() -> None:
    reader, source = simple()
    connect(reader, source)
    pull(reader, source)
    run(reader)
    values = {
        (sample.name, sample.labels.get("peer")): sample.value
        for family in reader.metrics.registry.collect()
        for sample in family.samples
        if sample.name.endswith(("_sum", "_total"))
    }
    num_bytes = 5 * 2 * reader.layout.layer_bytes
    assert values["tandem_transfer_bytes_total", "prefill-0"] == num_bytes
    assert values["tandem_transfer_size_bytes_sum", "prefill-0"] == num_bytes
    assert 1 <= values["tandem_transfer_runs_sum", "prefill-0"] <= 5
