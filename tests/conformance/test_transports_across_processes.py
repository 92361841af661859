"""Transports between two processes: owners that die, and strangers that ask."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
from support.patience import stretched
from support.transports import PEER, SIZE, missing, runs, scattered
from tandem.core.errors import TransferError
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.kv_transfer.layout import Runs
from tandem.kv_transfer.memory import Buffer, map_shared
from tandem.kv_transfer.rdma import rdma_devices
from tandem.kv_transfer.transports import PREFERENCE, Read, Region, TransferResult
from tandem.kv_transfer.transports.offer import offer
from tandem.kv_transfer.transports.ucx import UcxTransport, load_ucx

CHILD = """
import os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import msgspec
import numpy as np
from tandem.core.wire import ClusterKeys, SecureContext
from tandem.kv_transfer.rdma import rdma_devices
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
        deadline_s = time.monotonic() + stretched(timeout_s)
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


@pytest.fixture(params=["shm", "nixl", pytest.param("ucx", marks=pytest.mark.ucx), "zmq"])
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


@pytest.mark.parametrize("name", [pytest.param("ucx", marks=pytest.mark.ucx), "zmq"])
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
        if news.wait(0.5):
            assert reader.poll()[0].error == f"the connection to {PEER} broke"
        assert (target.array == 9).all()
    finally:
        reader.close()
        owner.close()
        outside.close()
        inside.close()


@pytest.mark.ucx
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


@pytest.mark.ucx
def test_an_offer_says_why_a_transport_is_not_there() -> None:
    context = SecureContext(make_cluster_keys())
    try:
        found, reasons = offer(lambda: None, context, "127.0.0.1", "host", "zmq")
        assert list(found) == ["zmq"]
        assert set(reasons) == set(PREFERENCE) - {"inproc", "zmq"}
        for transport in found.values():
            transport.close()
        found, reasons = offer(lambda: None, context, "127.0.0.1", "host", "auto")
        assert {"shm", "zmq"} <= found.keys()
        if not any(port.active for port in rdma_devices()):
            assert "no RDMA device" in reasons["nixl"]
        assert "only kv.transport: ucx" in reasons["ucx"]
        assert not found.keys() & reasons.keys()
        for transport in found.values():
            transport.close()
        if not missing("ucx"):
            found, reasons = offer(lambda: None, context, "192.0.2.77", "host", "ucx")
            assert found == {}
            assert "no interface of this host" in reasons["ucx"]
    finally:
        context.close()
