"""A hundred thousand mutated frames on every ZMQ port, from strangers and from a peer that holds the cluster's own
keys.

The workers run in a process of their own, as their actors run them; keys and ports are known here.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from support.checkpoints import make_checkpoint
from tandem.cluster.mesh import Mesh
from tandem.core import messages as wire
from tandem.core.kv_messages import KVClear, KVControlled, KVEvents, KVPin, KVSnapshot, KVUnpin, KVWatch
from tandem.core.wire import ClusterKeys, SecureContext, make_cluster_keys

pytestmark = pytest.mark.chaos

FRAMES = 100_000
PROMPT = list(range(1, 60))

CLUSTER = """
import gc, sys, msgspec
from tandem.cluster.worker_runtime import WorkerRuntime
from tandem.core.config import Config
from tandem.core.messages import Membership
from tandem.core.wire import ClusterKeys
keys = msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=ClusterKeys)
config = Config.model_validate({
    "model": {"path": sys.argv[1]}, "kv": {"transport": "zmq", "capacity": "2MiB"},
    "routing": {"local_prefill": "never"},
})
runtimes = [
    WorkerRuntime(f"{role}-0#1", role, config, keys, "127.0.0.1", "n", lambda phase: None) for role in ("prefill",
    "decode")
]
members = [runtime.start() for runtime in runtimes]
for runtime in runtimes:
    runtime.follow(Membership(1, members))
ports = [runtime._parts.mesh.endpoint for runtime in runtimes]
ports += [runtime._parts.connector.hello().ranks[0].transports["zmq"].decode() for runtime in runtimes]
print(" ".join(ports), flush=True)
for line in sys.stdin:
    gc.collect()
    print(sys.getallocatedblocks(), flush=True)
for runtime in runtimes:
    runtime.stop(0)
"""


class Target:
    """The two workers, and a client of theirs."""

    def __init__(self, folder: Path) -> None:
        self.keys: ClusterKeys = make_cluster_keys()
        encoded = msgspec.msgpack.encode(self.keys).hex()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(folder), encoded],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.endpoints = self.process.stdout.readline().split()
        assert len(self.endpoints) == 4
        self.context = SecureContext(self.keys)
        self.answers: list[wire.Message] = []
        self._news = threading.Event()
        self.mesh = Mesh("gateway-0#1", self.context, None, self._receive, lambda peer: None, lambda: None)
        self.mesh.start()
        self.mesh.connect("decode-0#1", self.endpoints[1])
        self._ticket = 0

    def _receive(self, sender: str, message: wire.Message) -> None:
        self.answers.append(message)
        self._news.set()

    def generate(self) -> list[int]:
        """A request, start to end: tokens from prefill, KV by ZMQ, tokens from decode."""
        self._ticket += 1
        request = wire.Generate(
            ticket=self._ticket, request_id="r", tokens=PROMPT, num_prompt_tokens=len(PROMPT),
            children=[wire.Child(0, 1)], sampling=wire.Sampling(), stopping=wire.Stopping(8), prefill="prefill-0#1",
            salt=str(self._ticket),
        )  # fmt: skip
        self.mesh.send("decode-0#1", request)
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            children = [
                child
                for message in list(self.answers)
                if isinstance(message, wire.Update)
                for child in message.children
                if child.ticket == self._ticket
            ]
            if children and children[-1].finish is not None:
                return [token for child in children for token in child.tokens]
            self._news.wait(0.2)
            self._news.clear()
        raise AssertionError("no answer")

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def num_objects(self) -> int:
        """Small pieces of memory that its Python objects take. Resident memory would tell more of malloc's moods."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("count\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.mesh.close()
        self.context.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    make_checkpoint("qwen3_moe", folder)
    target = Target(folder)
    yield target
    target.close()


def seeds() -> list[bytes]:
    """Valid frames of every kind, to mutate."""
    sampling, stopping = wire.Sampling(temperature=1.0), wire.Stopping(5, [1])
    child = [wire.Child(0, 1)]
    cache = wire.CacheSpec(2, 16, 16, "float32", 3, [wire.KVGroupSpec([0, 1, 2], 0)])
    hello = wire.Hello(
        protocol=2, peer="x#1", fingerprint="f", cache=cache, layer_groups=[0],
        ranks=[wire.RankSpec(0, 2, {"zmq": b"tcp"})],
    )  # fmt: skip
    table = wire.Table(0, [1], [1])
    known = [
        wire.Generate(9, "r", [1, 2, 3], 3, child, sampling, stopping, priority=-5), wire.Abort([1, 2]), hello,
        wire.HelloReply(hello), wire.Prefill(1, "r", [1, 2], 2, 0, child, sampling, priority=7), wire.Accepted(1, [table], 0),
        wire.BlocksReady(1, 0, 16), wire.Prefilled(1, [wire.SampledToken(1)], 0.0, 0.0, 0.0), wire.Release([1]),
        wire.Renew([1]), wire.PrefillFailed(1, wire.FailureReason.EXPIRED, "x"), wire.Subscribe(), wire.Farewell(),
        wire.Scrape(1),
        wire.Report(0, 0, 0, 0, 0), wire.Membership(1, [wire.Member("prefill-0#1", "prefill", "n",
        "tcp://127.0.0.1:1")]), wire.Refused(1, 500, "x"), KVWatch(), KVSnapshot(True, 0, "f", 16, "", False, b"x" * 32),
        KVEvents(0, "host-0", True, False, b"x" * 16, b"y" * 16), KVClear(1, "a"), KVPin(2, "a", [1] * 20, 1.0),
        KVUnpin(3, None, []), KVControlled(4, 1),
    ]  # fmt: skip
    frames = [wire.encode(message) for message in known]
    offsets = (0).to_bytes(8, "little")
    frames += [
        msgspec.msgpack.encode([1, "blocks", offsets, (64).to_bytes(8, "little")]),
        msgspec.msgpack.encode([2, "generations", offsets * 3, (2**63 - 1).to_bytes(8, "little") * 3]),
        msgspec.msgpack.encode([3, "fence", (2**62).to_bytes(8, "little"), (2**62).to_bytes(8, "little")]),
        b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"",
    ]
    return frames


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randrange(1, 5)):
        match rng.randrange(5):
            case 0 if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 1 if data:
                del data[rng.randrange(len(data)) :]
            case 2:
                data[rng.randrange(len(data) + 1) : 0] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data += rng.choice((b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\xc1"))
            case _ if data:
                at = rng.randrange(len(data))
                data[at:at] = data[at : at + rng.randrange(1, 20)]
    return bytes(data)


def settle(target: Target) -> None:
    """Until all that was sent has been taken in."""
    for _ in range(3):
        target.generate()
        time.sleep(0.2)


def test_frames_from_a_peer_with_keys(target: Target) -> None:
    golden = target.generate()
    rng = random.Random(0)
    frames = seeds()
    sockets = [target.context.connect(f"fuzz-{i}", endpoint) for i, endpoint in enumerate(target.endpoints)]
    try:
        rounds = []
        for _ in range(2):
            for count in range(FRAMES // 2):
                parts = [
                    mutate(rng.choice(frames), rng) for _ in range(1 if rng.random() < 0.9 else rng.randrange(2, 4))
                ]
                for sender in sockets:
                    try:
                        sender.send_multipart(parts, flags=zmq.NOBLOCK)
                    except zmq.Again:
                        time.sleep(0.01)
                    while sender.poll(0):
                        sender.recv_multipart()
                if count % 10_000 == 0:
                    assert target.process.poll() is None, "a worker died"
            settle(target)
            rounds.append(target.num_objects())
        assert target.process.poll() is None
        assert target.generate() == golden
        # 200,000 frames of the second half left nothing behind that those of the first had not.
        print("objects after each half:", rounds)
        assert rounds[1] - rounds[0] < 20_000, rounds
    finally:
        for sender in sockets:
            sender.close()


def test_bytes_from_strangers(target: Target) -> None:
    """Raw TCP: what a port scanner, a browser or an attacker without keys sends."""
    golden = target.generate()
    rng = random.Random(1)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31)
    before = target.resident_bytes()
    for endpoint in target.endpoints:
        host, port = endpoint.removeprefix("tcp://").split(":")
        for index in range(300):
            data = mutate(rng.choice([greeting, b"GET / HTTP/1.1\r\n\r\n", *seeds()]), rng)
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                try:
                    connection.sendall(data + rng.randbytes(rng.randrange(0, 200)))
                except OSError:
                    continue
                if index % 50 == 0:
                    assert target.process.poll() is None
    assert target.generate() == golden
    assert target.resident_bytes() - before < 24 << 20


def test_strangers_with_other_keys_are_turned_away(target: Target) -> None:
    outside = SecureContext(make_cluster_keys())
    try:
        for endpoint in target.endpoints:
            sender = outside.connect("gateway-0#1", endpoint)
            sender.send(wire.encode(wire.Scrape(1)))
            assert sender.poll(300) == 0
            sender.close()
    finally:
        outside.close()
    assert len(target.generate()) == 8
