"""Tiers that fail while they are used: the undisturbed tokens, one warning and a metric, and they come back.

The workers' own memory holds two of twelve prompts; all others come from a tier, or are computed.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.footprint import Footprint
from support.gateway import wait_for
from support.load import Body, Load, Tokens, ask_all, check
from support.patience import stretched
from support.processes import Process
from support.slow_disk import slow_disk, why_not
from support.tiered import BLOCK_BYTES, TieredNode

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]

NUM_PROMPTS = 12


def prompts(seed: int = 0, num_tokens: int = 480) -> list[Body]:
    """The same ones each time: what the pool has lost is found in a tier."""
    return [
        {
            "prompt": [(31 * index + 7 * j + 1009 * seed) % 4000 + 5 for j in range(num_tokens)], "max_tokens": 8,
            "temperature": 1.0, "seed": index, "ignore_eos": True, "return_token_ids": True, "stream": index % 2 == 1,
        }
        for index in range(NUM_PROMPTS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TieredNode]:
    node = TieredNode(tmp_path_factory.mktemp("tiers"))
    config = {
        "model": {"max_model_len": 512}, "pools": {"colocated": {"max_batched_tokens": 128}},
        "kv": {"poison_freed": True, "capacity": 70 * BLOCK_BYTES},
    }  # fmt: skip
    workers: dict[str, dict[str, Any]] = {
        "colocated-0": node.tiers("host"),
        "colocated-1": node.tiers("disk"),
        # Blocks that take longer to compute than a request over HTTP does.
        "colocated-2": node.tiers("s3") | {"kv": {"block_tokens": 128}},
        "colocated-3": node.tiers("host", "disk", "s3"),
        "colocated-4": node.tiers("host", "disk", "s3"),
    }
    try:
        node.start(config, workers)
        yield node
    finally:
        node.close()


class Watched:
    """A worker and its one tier, seen from outside.

    Args:
        node: where.
        worker: which.
        tier: its name.
        golden: what its requests must say.
    """

    def __init__(self, node: TieredNode, worker: str, tier: str, golden: Golden) -> None:
        self.cluster = node.cluster
        self.process: Process = node.cluster.all[worker]
        self._labels = {"worker": worker, "tier": tier}
        self._golden = golden
        self._num_logged = len(self._warnings())

    def turn(self, seed: int = 0) -> None:
        """All prompts once, with the right answers."""
        requests = prompts(seed, 384 if self._labels["tier"] == "s3-0" else 480)
        check(ask_all(self.cluster.url, requests, at_once=3), self._golden(requests))

    def turn_until(self, condition: Callable[[], bool], what: str, seed: int = 0) -> None:
        """Turns until something is so."""
        started_s = time.monotonic()
        while not condition():
            assert time.monotonic() - started_s < stretched(20), what
            self.turn(seed)

    def loaded(self) -> float:
        """Blocks that came from the tier so far."""
        return self.cluster.metric("tandem_offload_blocks_total", event="loaded", **self._labels)

    def failures(self, cause: str) -> float:
        """Blocks that were not stored, or lost."""
        return self.cluster.metric("tandem_offload_failures_total", cause=cause, **self._labels)

    def away(self) -> bool:
        """Whether it answers nothing."""
        return self.cluster.metric("tandem_offload_away", **self._labels) > 0

    def warnings(self) -> list[str]:
        """Of this tier, since we watch."""
        return self._warnings()[self._num_logged :]

    def serves(self) -> None:
        """Prompts come from it again."""
        before = self.loaded()
        self.turn_until(lambda: self.loaded() > before + 20, "the tier serves")

    def _warnings(self) -> list[str]:
        return [line for line in self.process.log.read_text().splitlines() if " WARNING " in line]


def file_of(node: TieredNode) -> Path:
    return node.disk / "colocated-1" / "blocks.tandem"


@contextmanager
def deleted(node: TieredNode) -> Iterator[None]:
    file_of(node).unlink()
    yield


@contextmanager
def flipped(node: TieredNode) -> Iterator[None]:
    """A bit of every block."""
    data = np.memmap(file_of(node), np.uint8, "r+")
    data[4096 + 5000 :: 4096] ^= 16
    data.flush()
    yield


@contextmanager
def full(node: TieredNode) -> Iterator[None]:
    """A quota: no file may be written further than this."""
    pid = node.cluster.all["colocated-1"].system.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def slow(node: TieredNode) -> Iterator[None]:
    if reason := why_not(node.disk):
        pytest.skip(reason)
    with slow_disk(node.cluster.all["colocated-1"].system.pid, node.disk):
        yield


HARM: dict[str, Callable[[TieredNode], AbstractContextManager[None]]] = {
    "lost": deleted, "checksum": flipped, "full": full, "slow": slow,
}  # fmt: skip


@pytest.mark.parametrize("cause", HARM)
def test_a_disk(node: TieredNode, golden: Golden, cause: str) -> None:
    node.cluster.serve("colocated-1")
    disk = Watched(node, "colocated-1", "disk-0", golden)
    disk.turn()
    disk.serves()
    footprint = Footprint(node.cluster, [disk.process.system])
    before = disk.failures(cause)
    with HARM[cause](node):
        # What is new has to be written.
        disk.turn_until(lambda: disk.failures(cause) > before, "something goes wrong", seed=int(cause == "full"))
        disk.turn()
    disk.turn_until(lambda: not disk.away(), "it comes back")
    disk.serves()
    assert len(disk.warnings()) == 1, disk.warnings()
    footprint.check()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_keeper_of_the_nodes_memory(node: TieredNode, golden: Golden, how: str) -> None:
    """The next one starts empty; one that goes on has all that it had."""
    node.cluster.serve("colocated-0")
    host = Watched(node, "colocated-0", "host-0", golden)
    host.turn()
    host.serves()
    footprint = Footprint(node.cluster, [host.process.system])
    before, keeper = host.failures("keeper"), node.keeper()
    assert keeper is not None
    getattr(keeper, "kill" if how == "killed" else "suspend")()
    try:
        host.turn_until(lambda: host.failures("keeper") > before, "it is missed", seed=int(how == "stopped"))
        host.turn()
    finally:
        if how == "stopped":
            keeper.resume()
    host.turn_until(lambda: not host.away(), "it comes back")
    host.serves()
    # Of the cause that both have in common, the second is not told for a while.
    causes = [warning.partition("host-0: ")[2] for warning in host.warnings()]
    assert len(set(causes)) == len(causes) >= (how == "killed"), causes
    footprint.check()


def test_an_object_store_that_is_away(node: TieredNode, golden: Golden) -> None:
    node.cluster.serve("colocated-2")
    objects = Watched(node, "colocated-2", "s3-0", golden)
    objects.turn()
    objects.serves()
    footprint = Footprint(node.cluster, [objects.process.system])
    before = objects.failures("io") + objects.failures("slow")
    node.s3.stop()
    try:
        # What is computed anew is stored, too.
        objects.turn_until(lambda: objects.failures("io") + objects.failures("slow") > before, "it is missed", 1)
        objects.turn_until(objects.away, "it is given up", 1)
        objects.turn()
    finally:
        node.s3.go_on()
    objects.turn_until(lambda: not objects.away(), "it comes back")
    objects.serves()
    assert 1 <= len(objects.warnings()) <= 2, objects.warnings()
    footprint.check()


def test_engines_killed_while_they_store_and_load(node: TieredNode, golden: Golden) -> None:
    """The node's memory outlives them; the disk has what they wrote on it."""
    node.cluster.serve("colocated-3", "colocated-4")
    rng, cluster = random.Random(0), node.cluster
    requests = prompts(2) * 4
    wanted = golden(requests)
    for victim in ("colocated-3", "colocated-4"):
        with Load(cluster.url, requests, at_once=6) as load:
            time.sleep(rng.uniform(0.1, 0.5))
            cluster.replace(victim)
            check(load.answers(), wanted)
    footprint = Footprint(cluster, [cluster.all[name].system for name in ("colocated-3", "colocated-4")])

    def loaded(tier: str) -> float:
        return cluster.metric("tandem_offload_blocks_total", event="loaded", tier=tier)

    def turn() -> bool:
        check(ask_all(cluster.url, requests[:NUM_PROMPTS], 4), wanted[:NUM_PROMPTS])
        return True

    before = loaded("host-0")
    wait_for(lambda: turn() and loaded("host-0") > before, 20, "what the dead stored in the node's memory")
    keeper = node.keeper()
    assert keeper is not None
    keeper.kill()
    before = loaded("disk-1")
    wait_for(lambda: turn() and loaded("disk-1") > before, 20, "what the dead stored on disk")
    footprint.check()
