"""What workers tell of the KV that they hold, and what a gateway makes of it."""

from __future__ import annotations

import random
import time

import numpy as np
from support.patience import slowness
from tandem.cluster.kv_publisher import PERIOD_S, KVPublisher
from tandem.cluster.kv_view import Held, KVView
from tandem.cluster.prefix_index import PrefixIndex
from tandem.core.clock import ManualClock
from tandem.core.hashing import block_hashes, root_hash
from tandem.core.kv_messages import KVEvents, KVSnapshot, KVWatch
from tandem.core.messages import Member, Membership, Message, decode, encode
from tandem.engine.block_pool import BlockPool
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.offload.base import Spill, Tier
from tandem.kv_transfer.offload.keys import key_space, tenant_tag
from tandem.kv_transfer.offload.simulated import Cost, SimulatedTier
from tandem.kv_transfer.offload.stack import Level, OffloadStack, Write

SIZE = 4
SPACE = key_space("", KVLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_tokens=SIZE, dtype="float32"))
PROMPT = list(range(41))
HASHES = block_hashes(PROMPT, SIZE, root_hash("f"))


class Worker:
    """A prefix cache, a tier if wanted, and what tells of them."""

    def __init__(self, net: Net, peer: str, num_blocks: int, tier: Tier | None) -> None:
        self.pool = BlockPool(num_blocks, np.zeros(num_blocks, np.uint64))
        self.stack = None if tier is None else OffloadStack([Level(tier, Write.THROUGH)], Spill(0, None))
        self.publisher = KVPublisher(
            self.pool, self.stack, "f", SIZE, net.clock, lambda _, message: net.deliver(peer, message)
        )

    def compute(self, hashes: list[bytes]) -> None:
        """Fill blocks, and give them back to the cache."""
        blocks = self.pool.allocate(len(hashes))
        assert blocks is not None
        for block, key in zip(blocks, hashes, strict=True):
            self.pool.commit(block, key, b"")
        self.pool.release(blocks)


class Net:
    """Workers and one gateway's view of them; messages go through their encoding."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.index = PrefixIndex()
        self.view = KVView(lambda peer, message: self.ask(peer, message), self.index)
        self.workers: dict[str, Worker] = {}
        self.lose = 0
        self.asked: list[str] = []

    def add(self, peer: str, num_blocks: int = 64, tier: Tier | None = None, node: str = "n") -> Worker:
        worker = self.workers[peer] = Worker(self, peer, num_blocks, tier)
        self.follow(node)
        self.view.watch(peer)
        return worker

    def follow(self, node: str = "n") -> None:
        self.view.follow(Membership(1, [Member(peer, "colocated", node, "tcp://x:1") for peer in self.workers]))

    def ask(self, peer: str, message: Message) -> None:
        assert isinstance(message, KVWatch)
        self.asked.append(peer)
        self.workers[peer].publisher.watch("gateway-0#1")

    def deliver(self, peer: str, message: Message) -> None:
        decoded = decode(encode(message))
        assert isinstance(decoded, KVSnapshot | KVEvents)
        if self.lose:
            self.lose -= 1
        else:
            self.view.receive(peer, decoded)

    def match(self) -> dict[str, Held]:
        self.clock.advance(PERIOD_S)
        for worker in self.workers.values():
            worker.publisher.poll(self.clock.monotonic_s())
        return self.view.match(PROMPT, "")


def store(worker: Worker, net: Net, hashes: list[bytes]) -> None:
    assert worker.stack is not None
    worker.stack.store(SPACE.of(hashes), None, list(range(len(hashes))))
    for _ in range(100):
        net.clock.advance(0.01)
        worker.stack.poll()


def tier(net: Net, name: str = "disk-0", slots: int = 64) -> SimulatedTier:
    cost = Cost(latency_s=0.001, load_bytes_per_s=1e9, store_bytes_per_s=1e9)
    return SimulatedTier(name, slots, 64, "lru", cost, net.clock, 10)


def test_a_snapshot_and_what_follows() -> None:
    net = Net()
    a, b = net.add("colocated-0#1"), net.add("colocated-1#1", num_blocks=6)
    a.compute(HASHES[:3])
    b.compute(HASHES[:5])
    assert net.match() == {"colocated-0#1": Held(12, 12), "colocated-1#1": Held(20, 20)}
    b.compute([b"x" * 16, b"y" * 16])  # there are six blocks: the end of the prompt makes way
    assert net.match() == {"colocated-0#1": Held(12, 12), "colocated-1#1": Held(16, 16)}
    assert net.view.match(PROMPT, "another tenant's") == {}
    # The first token must be computed, and so a prompt's last block when it is full.
    assert net.view.match(PROMPT[:12], "")["colocated-0#1"].in_cache == 8
    del net.workers["colocated-1#1"]
    net.follow()
    assert net.match() == {"colocated-0#1": Held(12, 12)}
    assert len(net.index) == 3


def test_who_missed_some_asks_again() -> None:
    net = Net()
    worker = net.add("colocated-0#1")
    worker.compute(HASHES[:2])
    assert net.match()["colocated-0#1"].in_cache == 8
    net.lose = 1
    worker.compute(HASHES[2:4])
    worker.pool.uncache([0])
    net.match()
    assert net.asked == ["colocated-0#1"]
    worker.compute([b"x" * 16])
    net.match()
    assert net.asked == ["colocated-0#1"] * 2
    assert net.index.num_blocks("colocated-0#1") == len(worker.pool.keys())


def test_tiers_count_where_they_can_be_reached() -> None:
    net = Net()
    worker = net.add("colocated-0#1", num_blocks=4, tier=tier(net))
    worker.compute(HASHES[:4])
    store(worker, net, HASHES[:8])
    net.add("colocated-1#1")
    assert net.match() == {"colocated-0#1": Held(16, 32)}
    assert worker.stack is not None
    worker.stack.remove(SPACE.of(HASHES[6:]))
    assert net.match() == {"colocated-0#1": Held(16, 24)}
    worker.stack.clear(tenant_tag("another"))
    assert net.match() == {"colocated-0#1": Held(16, 24)}
    worker.stack.clear()
    assert net.match() == {"colocated-0#1": Held(16, 16)}


def test_what_a_node_shares_all_its_workers_have() -> None:
    net = Net()
    shared = tier(net, "host-0")
    shared.shared = True
    worker = net.add("colocated-0#1", tier=shared)
    net.add("colocated-1#1", tier=shared)
    store(worker, net, HASHES[:5])
    assert net.match() == {"colocated-0#1": Held(0, 20), "colocated-1#1": Held(0, 20)}
    # The tier outlives a worker.
    del net.workers["colocated-0#1"]
    net.follow()
    assert net.match() == {"colocated-1#1": Held(0, 20)}


def test_any_number_of_changes_arrives() -> None:
    """More than one message holds, and blocks that come and go many times between two tellings."""
    net = Net()
    worker = net.add("colocated-0#1", num_blocks=70_000)
    rng = random.Random(0)
    worker.compute([rng.randbytes(16) for _ in range(70_000)])
    net.match()
    assert net.index.num_blocks("colocated-0#1") == 70_000
    for _ in range(30):
        worker.compute([rng.randbytes(16) for _ in range(rng.randrange(9000))])
    net.match()
    assert len(net.asked) == 1
    net.view.watch("colocated-0#1")
    assert net.index.num_blocks("colocated-0#1") == len(worker.pool.keys()) == 70_000


def test_telling_costs_the_engine_next_to_nothing() -> None:
    """10,000 blocks a second, stored and one day removed, must take less than a hundredth of a core."""
    net = Net()
    worker = net.add("colocated-0#1", num_blocks=4000)
    keys = [random.Random(n).randbytes(16) for n in range(20_000)]

    def run() -> float:
        began_s = time.thread_time()
        for start in range(0, len(keys), 1000):
            worker.compute(keys[start : start + 1000])
            worker.publisher.publish()
        return time.thread_time() - began_s

    told: list[Message] = []
    worker.publisher._send = lambda _, message: told.append(message)
    with_s = min(run() for _ in range(5))
    worker.pool.journal = None
    without_s = min(run() for _ in range(5))
    share = (with_s - without_s) / len(keys) * 10_000 / slowness()
    print(f"10,000 blocks a second cost {share:.2%} of a core, {share / 1e4 * 1e9:.0f} ns each")
    assert share < 0.01
    assert told
