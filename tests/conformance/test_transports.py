"""One suite for every transport: what `kv_transfer.transports.base.Transport` promises.

Transports run between two objects of this process; `test_across_processes` does it between two processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.gpu_memory import SeenBuffer, prepare
from support.moving import MovingProcess
from support.patience import stretched
from support.transports import NAMES, PARAMS, PEER, SIZE, missing, runs, scattered
from tandem.core.config import FaultsConfig
from tandem.core.errors import TransferError
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.kv_transfer.layout import Runs, coalesce
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region, TransferResult, Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from tandem.kv_transfer.transports.faulty import FaultyTransport
from tandem.kv_transfer.transports.inproc import InprocTransport
from tandem.kv_transfer.transports.landing import Landing
from tandem.kv_transfer.transports.nixl import NixlTransport
from tandem.kv_transfer.transports.shm import ShmTransport
from tandem.kv_transfer.transports.ucx import UcxTransport
from tandem.kv_transfer.transports.zmq import FRAME_BYTES, IN_FLIGHT_BYTES, ZmqTransport


class Kit:
    """Makes transports of one kind, and cleans up after them."""

    def __init__(self, name: str, moving: MovingProcess | None = None) -> None:
        self.name = name
        self.moves = name.removeprefix("forwarded-").removesuffix("-cuda")
        self._closers: list[Callable[[], None]] = []
        self._context: SecureContext | None = None
        self._moving = moving

    def make(self, notify: Notify = lambda: None) -> Transport:
        transport: Transport
        match self.name:
            case "inproc":
                transport = InprocTransport(notify)
            case "shm":
                transport = ShmTransport(notify)
            case "forwarded-shm" | "forwarded-zmq":
                assert self._moving is not None
                transport = self._moving.make(self.moves, notify)
            case "nixl":
                transport = NixlTransport(notify)
            case "nixl-cuda":
                prepare()
                transport = NixlTransport(notify, 0)
            case "cuda_ipc":
                prepare()
                transport = CudaIpcTransport(notify, 0, 16)
            case "late":
                faults = FaultsConfig(share=0.5, kind="delay", delay_s=0.01)
                transport = FaultyTransport(ShmTransport(notify), faults, notify, "generations")
            case _:
                if self._context is None:
                    self._context = SecureContext(make_cluster_keys())
                kind = ZmqTransport if self.name == "zmq" else UcxTransport
                transport = kind(notify, self._context, "127.0.0.1")
        self._closers.append(transport.close)
        return transport

    def buffer(self, size: int) -> Any:
        """Memory of the kind that the transport is for; ``array`` is its content."""
        return SeenBuffer(size) if self.name in ("cuda_ipc", "nixl-cuda") else Buffer(size)

    def owner(self, size: int) -> tuple[Any, Any]:
        """A transport that has "blocks" of so many bytes, and these."""
        owner, source = self.make(), self.buffer(size)
        owner.register(Region("blocks", source))
        return owner, source

    def close(self) -> None:
        for closer in self._closers:
            closer()
        if self._context is not None:
            self._context.close()


@pytest.fixture(scope="module")
def moving() -> Iterator[MovingProcess]:
    moving = MovingProcess()
    yield moving
    moving.close()


@pytest.fixture(params=(*PARAMS, "forwarded-shm", "forwarded-zmq", "late"))
def kit(request: pytest.FixtureRequest, moving: MovingProcess) -> Iterator[Kit]:
    if why := missing(request.param):
        pytest.skip(why)
    kit = Kit(request.param, moving)
    yield kit
    kit.close()


class Ends:
    """A reader and an owner of memory, connected."""

    def __init__(self, kit: Kit, size: int = SIZE) -> None:
        self.news = threading.Event()
        self.owner, self.source = kit.owner(size)
        self.reader, self.target = kit.make(self.news.set), kit.buffer(size)
        self.source.array[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        self.reader.register(Region("landing", self.target))
        self.reader.add_peer(PEER, self.owner.descriptor())

    def read(self, runs: Runs, *, peer: str = PEER, source: str = "blocks", target: str = "landing") -> int:
        return self.reader.submit(Read(peer, source, target, runs))

    def wait(self, *numbers: int, timeout_s: float = 10.0) -> dict[int, TransferResult]:
        """Poll, as told by notify, until these reads have ended."""
        results: dict[int, TransferResult] = {}
        deadline_s = time.monotonic() + stretched(timeout_s)
        while not set(numbers) <= results.keys():
            self.news.wait(timeout=max(0.0, deadline_s - time.monotonic()))
            assert time.monotonic() < deadline_s, f"{set(numbers) - results.keys()} did not end"
            self.news.clear()
            results |= {result.number: result for result in self.reader.poll()}
        return results


def test_bytes_arrive_where_they_belong_and_nowhere_else(kit: Kit) -> None:
    ends = Ends(kit)
    expected = ends.target.array.copy()
    plan = scattered(np.random.default_rng(1), 40, 512)
    for s, t, n in zip(*plan, strict=True):
        expected[t : t + n] = ends.source.array[s : s + n]
    assert ends.wait(number := ends.read(plan))[number].error == ""
    np.testing.assert_array_equal(ends.target.array, expected)


def test_reads_that_overlap_in_time(kit: Kit) -> None:
    ends = Ends(kit)
    rng = np.random.default_rng(2)
    order = rng.permutation(128)
    numbers = [ends.read(runs((int(block) * 512, i * 512, 512))) for i, block in enumerate(order)]
    assert len(set(numbers)) == len(numbers)
    assert all(result.error == "" for result in ends.wait(*numbers).values())
    np.testing.assert_array_equal(ends.target.array.reshape(128, 512), ends.source.array.reshape(128, 512)[order])


def test_large_reads(kit: Kit) -> None:
    size = 2 * IN_FLIGHT_BYTES + FRAME_BYTES // 2 + 77
    ends = Ends(kit, size)
    number = ends.read(runs((0, 0, size)))
    assert ends.wait(number, timeout_s=100)[number].error == ""  # Triton's interpreter takes seconds
    assert (ends.target.array == ends.source.array).all()


def test_a_read_sees_what_the_owner_wrote_before_it(kit: Kit) -> None:
    """What the generation check rests on: a later read sees later contents."""
    ends = Ends(kit)
    for value in range(50):
        ends.source.array[:8] = value
        number = ends.read(runs((0, 0, 8)))
        assert ends.wait(number)[number].error == ""
        assert (ends.target.array[:8] == value).all()


def test_an_empty_read_ends(kit: Kit) -> None:
    ends = Ends(kit)
    number = ends.read(runs())
    assert ends.wait(number)[number].error == ""


@pytest.mark.parametrize(
    "bad", [(SIZE - 4, 0, 8), (0, SIZE - 4, 8), (SIZE * 10, 0, 8), (0, 0, SIZE + 1), (-8, 0, 8), (2**62, 0, 2**62)]
)
def test_what_lies_outside_is_an_error_and_harms_nothing(kit: Kit, bad: tuple[int, int, int]) -> None:
    ends = Ends(kit)
    number = ends.read(Runs(*(np.array([value], np.int64) for value in bad)))
    assert ends.wait(number)[number].error != ""
    assert (ends.target.array == 0).all()
    good = ends.read(runs((0, 0, SIZE)))
    assert ends.wait(good)[good].error == ""


def test_unknown_regions_and_peers_are_errors(kit: Kit) -> None:
    ends = Ends(kit)
    for wrong in ({"source": "nope"}, {"target": "nope"}, {"peer": "prefill-9#1"}):
        number = ends.read(runs((0, 0, 8)), **wrong)
        assert ends.wait(number)[number].error != ""


def test_a_descriptor_of_something_else_is_refused(kit: Kit) -> None:
    reader = kit.make()
    others = [Kit(name) for name in NAMES if name not in (kit.moves, "ucx") and not missing(name)]
    try:
        for other in others:
            with pytest.raises((TransferError, Exception)) as caught:
                reader.add_peer("prefill-1#1", other.make().descriptor())
            assert caught.type.__name__ in ("TransferError", "DecodeError", "ValidationError")
    finally:
        for other in others:
            other.close()


def test_a_removed_peer_fails_its_reads_once(kit: Kit) -> None:
    ends = Ends(kit)
    ends.reader.remove_peer(PEER)
    ends.reader.remove_peer(PEER)
    number = ends.read(runs((0, 0, 8)))
    assert ends.wait(number)[number].error != ""
    ends.reader.add_peer(PEER, ends.owner.descriptor())
    number = ends.read(runs((0, 0, 8)))
    assert ends.wait(number)[number].error == ""


def test_an_owner_that_goes_away_never_blocks_the_reader(kit: Kit) -> None:
    ends = Ends(kit)
    numbers = [ends.read(runs((0, 0, SIZE))) for _ in range(20)]
    ends.owner.close()
    ends.reader.remove_peer(PEER)
    results = ends.wait(*numbers)
    assert all(result.number in numbers for result in results.values())


def test_cancelled_reads_write_no_more(kit: Kit) -> None:
    ends = Ends(kit)
    numbers = [ends.read(runs((0, 0, SIZE))) for _ in range(50)]
    draining = ends.reader.cancel(numbers)
    assert draining <= set(numbers)
    if draining:
        assert set(ends.wait(*draining)) == draining, "poll reports the draining ones, and no other"
    ends.target.array[:] = 0
    time.sleep(0.05)
    assert ends.reader.poll() == []
    assert (ends.target.array == 0).all(), "a cancelled read wrote after it had ended"
    number = ends.read(runs((0, 0, 8)))
    assert set(ends.wait(number)) == {number}


def test_cancelling_what_has_ended_is_harmless(kit: Kit) -> None:
    ends = Ends(kit)
    number = ends.read(runs((0, 0, 8)))
    ends.wait(number)
    assert ends.reader.cancel([number, 12345]) == set()


def test_closing_is_idempotent_and_safe_at_once(kit: Kit) -> None:
    transport = kit.make()
    transport.close()
    transport.close()


def test_closing_with_reads_under_way(kit: Kit) -> None:
    ends = Ends(kit)
    for _ in range(20):
        ends.read(runs((0, 0, SIZE)))
    ends.reader.close()
    ends.owner.close()


def test_a_read_of_many_small_runs(kit: Kit) -> None:
    count, size = 10_000, 24
    ends = Ends(kit, 2 * count * size)
    plan = scattered(np.random.default_rng(3), count, size, 2 * count * size)
    expected = ends.target.array.copy()
    for s, t, n in zip(*plan, strict=True):
        expected[t : t + n] = ends.source.array[s : s + n]
    number = ends.read(plan)
    assert ends.wait(number, timeout_s=100)[number].error == ""  # Triton's interpreter takes seconds
    np.testing.assert_array_equal(ends.target.array, expected)


@pytest.mark.parametrize(
    "bad",
    [(2**63 - 1, 0, 1), (0, 2**63 - 1, 1), (0, 0, 2**63 - 1), (2**63 - 1, 2**63 - 1, 2**63 - 1), (0, 0, 0), (8, 8, -8)],
)
def test_huge_and_empty_ranges_are_errors(kit: Kit, bad: tuple[int, int, int]) -> None:
    ends = Ends(kit)
    number = ends.read(Runs(*(np.array([value], np.int64) for value in bad)))
    assert ends.wait(number)[number].error != ""
    assert (ends.target.array == 0).all()


def test_a_removed_peer_ends_the_reads_that_are_under_way(kit: Kit) -> None:
    size = 4 * FRAME_BYTES
    ends = Ends(kit, size)
    numbers = [ends.read(runs((0, 0, size))) for _ in range(12)]
    ends.reader.remove_peer(PEER)
    results = ends.wait(*numbers)
    assert set(results) == set(numbers)
    # Nothing of them is written any more.
    ends.target.array[:] = 0
    time.sleep(0.05)
    assert (ends.target.array == 0).all()
    assert ends.reader.poll() == []


def test_a_peer_that_is_made_again_under_the_same_name(kit: Kit) -> None:
    """Its regions are elsewhere, its sizes are its own, and nothing of its former life is read."""
    ends = Ends(kit)
    number = ends.read(runs((0, 0, 64)))
    ends.wait(number)
    ends.owner.close()
    again, memory = kit.owner(SIZE // 2)
    memory.array[:] = 77
    ends.reader.remove_peer(PEER)
    ends.reader.add_peer(PEER, again.descriptor())
    number = ends.read(runs((0, 0, SIZE // 2)))
    assert ends.wait(number)[number].error == ""
    assert (ends.target.array[: SIZE // 2] == 77).all()
    number = ends.read(runs((0, 0, SIZE)))
    assert ends.wait(number)[number].error != "", "the new peer has half of the memory"


def test_a_target_is_used_again_after_a_cancel(kit: Kit) -> None:
    """What the engine does with a block whose load it gave up: waits for what drains, and then writes there."""
    size = 4 * FRAME_BYTES
    ends = Ends(kit, size)
    for _ in range(3):
        numbers = [ends.read(runs((0, 0, size))) for _ in range(4)]
        time.sleep(0.002)
        draining = ends.reader.cancel(numbers)
        if draining:
            assert set(ends.wait(*draining)) == draining
        ends.target.array[:] = 5
        time.sleep(0.02)
        assert (ends.target.array == 5).all(), "a cancelled read wrote into memory that was given to another"
        number = ends.read(runs((size - 64, 0, 64)))
        assert set(ends.wait(number)) == {number}
        np.testing.assert_array_equal(ends.target.array[:64], ends.source.array[-64:])


def test_closing_with_large_reads_under_way_writes_no_more(kit: Kit) -> None:
    size = 4 * FRAME_BYTES
    ends = Ends(kit, size)
    for _ in range(8):
        ends.read(runs((0, 0, size)))
    time.sleep(0.002)
    ends.reader.close()
    ends.target.array[:] = 5
    time.sleep(0.05)
    assert (ends.target.array == 5).all()


def test_elements_are_converted_in_staging(kit: Kit) -> None:
    """A transport that only copies, and what makes it convert."""
    ends = Ends(kit)
    if ends.reader.converts:
        pytest.skip("it converts by itself")
    ends.reader = Landing(kit.make(ends.news.set), piece_bytes=1 << 10, pieces=4)
    ends.reader.register(Region("landing", ends.target))
    ends.reader.add_peer(PEER, ends.owner.descriptor())
    values = np.random.default_rng(5).normal(size=SIZE // 4).astype(np.float32)
    ends.source.array[:] = values.view(np.uint8)
    order = np.random.default_rng(6).permutation(64)
    plan = coalesce(order * 1024, np.arange(64) * 512, np.full(64, 1024), (4, 2))
    number = ends.reader.submit(Read(PEER, "blocks", "landing", plan, "float32", "float16"))
    assert ends.wait(number)[number].error == ""
    wanted = values.reshape(64, 256)[order].astype(np.float16)
    np.testing.assert_array_equal(ends.target.array[: SIZE // 2].view(np.float16).reshape(64, 256), wanted)
    assert (ends.target.array[SIZE // 2 :] == 0).all()
    number = ends.read(runs((0, SIZE // 2, 512)))
    assert ends.wait(number)[number].error == ""
    assert (ends.target.array[SIZE // 2 :][:512] == ends.source.array[:512]).all()
