"""One suite for every transport: what `kv_transfer.transports.base.Transport` promises.

Transports run between two objects of this process; `test_across_processes` does it between two processes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from support.gpu_memory import SeenBuffer, prepare
from support.moving import MovingProcess
from tandem.core.errors import ConfigError, TransferError
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.kv_transfer.layout import Runs, coalesce
from tandem.kv_transfer.memory import Buffer, map_shared
from tandem.kv_transfer.transports import PREFERENCE, Read, Region, TransferResult, Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from tandem.kv_transfer.transports.inproc import InprocTransport
from tandem.kv_transfer.transports.landing import Landing
from tandem.kv_transfer.transports.nixl import NixlTransport, load_nixl
from tandem.kv_transfer.transports.offer import offer
from tandem.kv_transfer.transports.shm import ShmTransport
from tandem.kv_transfer.transports.ucx import UcxTransport, load_ucx
from tandem.kv_transfer.transports.zmq import FRAME_BYTES, IN_FLIGHT_BYTES, ZmqTransport

SIZE = 1 << 16
PEER = "prefill-0#1"
NAMES = tuple(name for name in PREFERENCE if name != "cuda_ipc")


def missing(name: str) -> str:
    """Why a transport cannot be tried here, or ""."""
    try:
        {"nixl": load_nixl, "ucx": load_ucx}.get(name, lambda: None)()
    except ConfigError as error:
        return str(error)
    return ""


class Kit:
    """Makes transports of one kind, and cleans up after them."""

    def __init__(self, name: str, moving: MovingProcess | None = None) -> None:
        self.name = name
        self.moves = name.removeprefix("forwarded-")
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
            case "cuda_ipc":
                prepare()
                transport = CudaIpcTransport(notify, 0, 16)
            case _:
                if self._context is None:
                    self._context = SecureContext(make_cluster_keys())
                kind = ZmqTransport if self.name == "zmq" else UcxTransport
                transport = kind(notify, self._context, "127.0.0.1")
        self._closers.append(transport.close)
        return transport

    def buffer(self, size: int) -> Any:
        """Memory of the kind that the transport is for; ``array`` is its content."""
        return SeenBuffer(size) if self.name == "cuda_ipc" else Buffer(size)

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


@pytest.fixture(params=(*NAMES, "forwarded-shm", "forwarded-zmq"))
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
        deadline_s = time.monotonic() + timeout_s
        while not set(numbers) <= results.keys():
            self.news.wait(timeout=max(0.0, deadline_s - time.monotonic()))
            assert time.monotonic() < deadline_s, f"{set(numbers) - results.keys()} did not end"
            self.news.clear()
            results |= {result.number: result for result in self.reader.poll()}
        return results


def runs(*pieces: tuple[int, int, int]) -> Runs:
    columns = np.array(pieces, np.int64).reshape(-1, 3)
    return coalesce(columns[:, 0], columns[:, 1], columns[:, 2])


def scattered(rng: np.random.Generator, count: int, size: int, total: int = SIZE) -> Runs:
    slots = total // size
    return coalesce(
        rng.permutation(slots)[:count] * size, rng.permutation(slots)[:count] * size, np.full(count, size, np.int64)
    )


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
    others = [Kit(name) for name in NAMES if name != kit.moves and not missing(name)]
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
    assert ends.wait(number)[number].error == ""
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
    again, memory = kit.make(), Buffer(SIZE // 2)
    memory.array[:] = 77
    again.register(Region("blocks", memory))
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


CHILD = """
import os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import msgspec
import numpy as np
from tandem.core.wire import ClusterKeys, SecureContext
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Region
from tandem.kv_transfer.transports.offer import offer
name, keys, size = sys.argv[1:]
context = SecureContext(msgspec.msgpack.decode(bytes.fromhex(keys), type=ClusterKeys))
owner = offer(lambda: None, context, "127.0.0.1", "host", name)[0][name]
buffer = Buffer(int(size))
buffer.array[:] = np.random.default_rng(7).integers(0, 256, int(size), dtype=np.uint8)
owner.register(Region("blocks", buffer))
print(owner.descriptor().hex(), file=out, flush=True)
sys.stdin.readline()
"""


class Remote:
    """An owner of memory in another process, and a reader here."""

    def __init__(self, name: str, size: int) -> None:
        if why := missing(name):
            pytest.skip(why)
        keys = make_cluster_keys()
        self._context = SecureContext(keys)
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, name, msgspec.msgpack.encode(keys).hex(), str(size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.news = threading.Event()
        self.reader = offer(self.news.set, self._context, "127.0.0.1", "host", name)[0][name]
        self.target = Buffer(size)
        self.reader.register(Region("landing", self.target))
        assert self.child.stdout is not None
        self.reader.add_peer(PEER, bytes.fromhex(self.child.stdout.readline()))

    def read(self, plan: Runs) -> int:
        return self.reader.submit(Read(PEER, "blocks", "landing", plan))

    def wait(self, *numbers: int, timeout_s: float = 20.0) -> dict[int, TransferResult]:
        results: dict[int, TransferResult] = {}
        deadline_s = time.monotonic() + timeout_s
        while not set(numbers) <= results.keys():
            assert self.news.wait(max(0.0, deadline_s - time.monotonic())), (
                f"{set(numbers) - results.keys()} did not end"
            )
            self.news.clear()
            results |= {result.number: result for result in self.reader.poll()}
        return results

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.reader.close()
        self._context.close()


@pytest.fixture(params=["shm", "nixl", "ucx", "zmq"])
def remote(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Remote]]:
    made: list[Remote] = []

    def make(size: int) -> Remote:
        made.append(Remote(request.param, size))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_across_processes_and_after_the_owners_sudden_death(remote: Callable[[int], Remote]) -> None:
    ends = remote(SIZE)
    number = ends.read(runs((0, 0, SIZE)))
    assert ends.wait(number)[number].error == ""
    expected = np.random.default_rng(7).integers(0, 256, SIZE, dtype=np.uint8)
    np.testing.assert_array_equal(ends.target.array, expected)
    ends.child.kill()
    ends.child.wait()
    number = ends.read(runs((0, 0, SIZE)))
    # The mesh notices, and the worker says so.
    ends.reader.remove_peer(PEER)
    assert set(ends.wait(number)) == {number}, "the read of a dead peer's memory ended neither well nor badly"


def test_an_owner_that_is_killed_while_it_is_read(remote: Callable[[int], Remote]) -> None:
    size = 64 << 20
    ends = remote(size)
    number = ends.read(runs((0, 0, 64)))
    ends.wait(number)
    plan = scattered(np.random.default_rng(5), size >> 14, 1 << 14, size)
    numbers = [ends.read(plan) for _ in range(6)]
    time.sleep(0.01)
    ends.child.kill()
    ends.child.wait()
    ends.reader.remove_peer(PEER)
    results = ends.wait(*numbers)
    expected = np.random.default_rng(7).integers(0, 256, size, dtype=np.uint8)
    if any(not result.error for result in results.values()):
        for s, t, n in zip(*plan, strict=True):
            assert (ends.target.array[t : t + n] == expected[s : s + n]).all(), "a read that ended well brought else"
    ends.target.array[:] = 0
    time.sleep(0.05)
    assert (ends.target.array == 0).all()
    assert set(results) == set(numbers)


def test_memory_of_a_dead_process_is_not_mistaken_for_anothers() -> None:
    buffer = Buffer(4096)
    assert buffer.shared is not None
    assert len(map_shared(buffer.shared)) == 4096
    for wrong in (
        msgspec.structs.replace(buffer.shared, token="0" * 24),
        msgspec.structs.replace(buffer.shared, descriptor=0),
        msgspec.structs.replace(buffer.shared, pid=2**22 - 1),
        msgspec.structs.replace(buffer.shared, num_bytes=8192),
    ):
        with pytest.raises(TransferError):
            map_shared(wrong)
    buffer.close()
    buffer.close()
    with pytest.raises(TransferError):
        map_shared(buffer.shared)


@pytest.mark.parametrize("name", ["ucx", "zmq"])
def test_a_stranger_without_the_clusters_keys_gets_nothing(name: str) -> None:
    if why := missing(name):
        pytest.skip(why)
    denied = threading.Event()
    inside = SecureContext(make_cluster_keys(), denied.set)
    outside = SecureContext(make_cluster_keys())
    news = threading.Event()
    owner = offer(lambda: None, inside, "127.0.0.1", "host", name, denied.set)[0][name]
    reader = offer(news.set, outside, "127.0.0.1", "host", name)[0][name]
    try:
        owner.register(Region("blocks", Buffer(64)))
        target = Buffer(64)
        target.array[:] = 9
        reader.register(Region("landing", target))
        reader.add_peer(PEER, owner.descriptor())
        reader.submit(Read(PEER, "blocks", "landing", runs((0, 0, 64))))
        if name == "ucx":
            assert denied.wait(5), "nobody counted it"
        assert not news.wait(0.5)
        assert (target.array == 9).all()
    finally:
        reader.close()
        owner.close()
        outside.close()
        inside.close()


def test_elements_are_converted_in_staging(kit: Kit) -> None:
    """A transport that only copies, and what makes it convert."""
    ends = Ends(kit)
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


def test_ucx_takes_no_request_twice_and_no_message_that_nobody_asked_for() -> None:
    if why := missing("ucx"):
        pytest.skip(why)
    refused = threading.Semaphore(0)
    context = SecureContext(make_cluster_keys())
    owner = UcxTransport(lambda: None, context, "127.0.0.1", refused.release)
    ucx, array = load_ucx()
    try:
        source = Buffer(1 << 20)
        owner.register(Region("blocks", source))
        worker = ucx.UCXWorker(
            ucx.UCXContext({"TLS": "^cuda", "NET_DEVICES": "lo"}, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
        )
        told = msgspec.msgpack.decode(owner.descriptor())
        endpoint = ucx.UCXEndpoint.create_from_worker_address(
            worker, ucx.UCXAddress.create_from_buffer(bytearray(told["address"])), True
        )

        def send(tag: int, body: bytes) -> None:
            data = bytearray(body)  # UCX does not keep it
            request = endpoint.tag_send(array(data), ucx.UCXXTag(tag))
            while not request.completed:
                worker.progress()

        def ask(number: int, sizes: bytes = np.array([64], "<i8").tobytes()) -> bytes:
            address = bytes(ucx.UCXAddress.create_from_worker(worker))
            body = msgspec.msgpack.encode(
                ["_Ask", b"s" * 16, address, number, (1 << 62) + number, "blocks", bytes(8), sizes]
            )
            return hashlib.blake2b(told["ucx"] + body, digest_size=32, key=key).digest() + body

        key = context.derive_key("tandem-kv-ucx")
        send(1, ask(1))
        answer = bytearray(64)
        request = worker.tag_recv(array(answer), ucx.UCXXTag((1 << 62) + 1))
        deadline_s = time.monotonic() + 5
        while not request.completed and time.monotonic() < deadline_s:
            worker.progress()
        assert request.completed, "a good request was not answered"
        for hostile in (ask(1), ask(2)[:-1], bytes(31), b"", b"x" * 4096, ask(3, b"\1" * 7)):
            send(1, hostile)
            assert refused.acquire(timeout=5), "a bad request was not counted"
        for tag in (0, 2, 1 << 62, (1 << 64) - 1):
            send(tag, bytes(1 << 20))
            assert refused.acquire(timeout=5), "a message that nobody asked for was not counted"
        endpoint.close_blocking()
    finally:
        owner.close()
        context.close()
