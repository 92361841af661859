"""One suite for every transport: what `kv_transfer.transports.base.Transport` promises.

Transports run between two objects of this process; `test_across_processes` does it between two processes.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tandem.core.config import FaultsConfig
from tandem.core.errors import TransferError
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.kv_transfer.layout import Runs, coalesce
from tandem.kv_transfer.memory import Buffer, map_shared
from tandem.kv_transfer.transports import PREFERENCE, Read, Region, TransferResult, Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.faulty import FaultyTransport
from tandem.kv_transfer.transports.inproc import InprocTransport
from tandem.kv_transfer.transports.shm import ShmTransport
from tandem.kv_transfer.transports.zmq import FRAME_BYTES, IN_FLIGHT_BYTES, ZmqTransport

SIZE = 1 << 16
PEER = "prefill-0#1"


class Kit:
    """Makes transports of one kind, and cleans up after them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._closers: list[Callable[[], None]] = []
        self._context: SecureContext | None = None

    def make(self, notify: Notify = lambda: None) -> Transport:
        transport: Transport
        match self.name:
            case "inproc":
                transport = InprocTransport(notify)
            case "shm":
                transport = ShmTransport(notify)
            case "late":
                faults = FaultsConfig(share=0.5, kind="delay", delay_s=0.01)
                transport = FaultyTransport(ShmTransport(notify), faults, notify, "generations")
            case _:
                if self._context is None:
                    self._context = SecureContext(make_cluster_keys())
                transport = ZmqTransport(notify, self._context, "127.0.0.1")
        self._closers.append(transport.close)
        return transport

    def close(self) -> None:
        for closer in self._closers:
            closer()
        if self._context is not None:
            self._context.close()


@pytest.fixture(params=[*PREFERENCE, "late"])
def kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    kit = Kit(request.param)
    yield kit
    kit.close()


class Ends:
    """A reader and an owner of memory, connected."""

    def __init__(self, kit: Kit, size: int = SIZE) -> None:
        self.news = threading.Event()
        self.owner, self.reader = kit.make(), kit.make(self.news.set)
        self.source, self.target = Buffer(size), Buffer(size)
        self.source.array[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        self.owner.register(Region("blocks", self.source))
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
    assert ends.wait(number)[number].error == ""
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
    others = [Kit(name) for name in PREFERENCE if name != kit.name]
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


CHILD = """
import sys, numpy as np
from tandem.core.wire import ClusterKeys, SecureContext
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Region
from tandem.kv_transfer.transports.shm import ShmTransport
from tandem.kv_transfer.transports.zmq import ZmqTransport
import msgspec
context = SecureContext(msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=ClusterKeys))
owner = ShmTransport(lambda: None) if sys.argv[1] == "shm" else ZmqTransport(lambda: None, context, "127.0.0.1")
buffer = Buffer(1 << 16)
buffer.array[:] = np.random.default_rng(7).integers(0, 256, 1 << 16, dtype=np.uint8)
owner.register(Region("blocks", buffer))
print(owner.descriptor().hex(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_across_processes_and_after_the_owners_sudden_death(name: str) -> None:
    import msgspec

    keys = make_cluster_keys()
    context = SecureContext(keys)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, name, msgspec.msgpack.encode(keys).hex()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    news = threading.Event()
    reader: Transport = ShmTransport(news.set) if name == "shm" else ZmqTransport(news.set, context, "127.0.0.1")
    target = Buffer(SIZE)
    try:
        reader.register(Region("landing", target))
        reader.add_peer(PEER, bytes.fromhex(child.stdout.readline()))
        reader.submit(Read(PEER, "blocks", "landing", runs((0, 0, SIZE))))
        assert news.wait(10)
        assert [result.error for result in reader.poll()] == [""]
        expected = np.random.default_rng(7).integers(0, 256, SIZE, dtype=np.uint8)
        np.testing.assert_array_equal(target.array, expected)
        child.kill()
        child.wait()
        news.clear()
        number = reader.submit(Read(PEER, "blocks", "landing", runs((0, 0, SIZE))))
        if name == "zmq":
            reader.remove_peer(PEER)
        assert news.wait(10), "the read of a dead peer's memory ended neither well nor badly"
        assert {result.number for result in reader.poll()} == {number}
    finally:
        child.kill()
        child.communicate()
        reader.close()
        context.close()


def test_memory_of_a_dead_process_is_not_mistaken_for_anothers() -> None:
    buffer = Buffer(4096)
    assert buffer.shared is not None
    assert len(map_shared(buffer.shared)) == 4096
    import msgspec

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


def test_a_stranger_without_the_clusters_keys_gets_nothing() -> None:
    denied = threading.Event()
    inside = SecureContext(make_cluster_keys(), denied.set)
    outside = SecureContext(make_cluster_keys())
    news = threading.Event()
    owner, reader = ZmqTransport(lambda: None, inside, "127.0.0.1"), ZmqTransport(news.set, outside, "127.0.0.1")
    try:
        owner_bytes, landing = Buffer(64), Buffer(64)
        owner.register(Region("blocks", owner_bytes))
        reader.register(Region("landing", landing))
        reader.add_peer(PEER, owner.descriptor())
        owner_bytes.array[:] = 1
        number = reader.submit(Read(PEER, "blocks", "landing", runs((0, 0, 64))))
        if news.wait(0.5):
            assert reader.poll() == [TransferResult(number, f"the connection to {PEER} broke")]
        assert not landing.array.any()
    finally:
        reader.close()
        owner.close()
        outside.close()
        inside.close()


class Relay:
    """A TCP connection between a reader and an owner that can stall and break."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.flows = threading.Event()
        self.flows.set()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.flows.wait()
                target.sendall(data)

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()
        self.flows.set()

    def close(self) -> None:
        self.cut()
        self._listener.close()


def test_a_read_whose_connection_breaks_ends_and_the_next_one_succeeds() -> None:
    """The answer is lost with the connection: without an error the read would never end, nor its blocks be freed."""
    kit = Kit("zmq")
    ends = Ends(kit)
    relay = Relay(ends.owner.descriptor().decode())
    try:
        ends.reader.add_peer("prefill-1#1", relay.endpoint.encode())
        first = ends.read(runs((0, 0, 64)), peer="prefill-1#1")
        assert ends.wait(first)[first].error == ""
        relay.flows.clear()
        lost = ends.read(runs((0, 64, 64)), peer="prefill-1#1")
        assert not ends.news.wait(0.3)
        relay.cut()
        assert ends.wait(lost)[lost].error == "the connection to prefill-1#1 broke"
        again = ends.read(runs((0, 128, 64)), peer="prefill-1#1")
        assert ends.wait(again)[again].error == ""
        assert (ends.target.array[128:192] == ends.source.array[:64]).all()
    finally:
        relay.close()
        kit.close()
