"""What it costs to load blocks from another node's host tier, beside the transport alone, on one machine.

The other node is a keeper and a server, as a cluster starts them. Loads of random blocks take turns with bare reads of
as many random slots by the same transport, without index, leave and check, and without the copy out of where they
land. Lookups are those of a worker that knows several such nodes.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.clock import SystemClock
from ..core.config import KVConfig
from ..core.wire import SecureContext, make_cluster_keys
from ..kv_transfer.layout import Runs
from ..kv_transfer.memory import Buffer
from ..kv_transfer.offload.base import HostBlocks, LoadJob, StoreJob, Tier
from ..kv_transfer.offload.host import HostTier
from ..kv_transfer.offload.keeper import start_keeper
from ..kv_transfer.offload.keys import KEY_BYTES
from ..kv_transfer.offload.network import Network, Servers, open_transports
from ..kv_transfer.offload.pool import slots_within
from ..kv_transfer.offload.remote import RemoteTier
from ..kv_transfer.offload.remote_task import Task, start_server
from ..kv_transfer.offload.remote_wire import SLOTS, Ask, News, answers, encode
from ..kv_transfer.offload.replica import Changes, IndexReplica, look_up
from ..kv_transfer.transports import Read, Region

_ADDRESS = "127.0.0.1"
_JOB_BLOCKS = 16
_JOBS = 4
"""In flight at a time."""
_TURNS = 3
_KNOWN_NODES = 8
_KNOWN_BLOCKS = 50_000
"""Of each."""


def measure_remote(capacity_bytes: int, block_bytes: int, seconds: float, transport: str) -> dict[str, Any]:
    """Bytes a second of loads and of the bare transport, best of three turns, and times of lookups."""
    keys, kv = make_cluster_keys(), KVConfig.model_validate({"transport": transport})
    rng, news = np.random.default_rng(0), threading.Event()
    names = [rng.bytes(KEY_BYTES) for _ in range(slots_within(capacity_bytes, block_bytes))]
    memory = HostBlocks(np.zeros(_JOBS * _JOB_BLOCKS * block_bytes, np.uint8), block_bytes)
    with tempfile.TemporaryDirectory() as folder:
        path, context = Path(folder) / "socket", SecureContext(keys)
        keeper = start_keeper(path, capacity_bytes, block_bytes, "lru")
        task = Task(str(path), block_bytes, _ADDRESS, 0, keys, kv.model_dump_json(), 60.0)
        server, endpoint = start_server(task)
        home = HostTier(path, block_bytes, SystemClock(), 60.0, news.set)
        _wait(lambda: not home.stats().away)
        for start in range(0, len(names), _JOB_BLOCKS):
            part = names[start : start + _JOB_BLOCKS]
            _drain(home, {home.submit_store(StoreJob(part, memory, range(len(part))))}, news)
        servers = Servers()
        servers.follow({"node": endpoint})
        tier = RemoteTier(Network(context, _ADDRESS, kv, servers, ""), block_bytes, SystemClock(), 60.0, news.set)
        _wait(lambda: tier.stats().num_used == len(names))
        bare = _Bare(context, kv, endpoint, block_bytes, news)
        ours, theirs = [], []
        for _ in range(_TURNS):
            ours.append(_load(tier, names, memory, news, seconds / _TURNS))
            theirs.append(bare.read(len(names), seconds / _TURNS))
        for closing in (tier, home, bare):
            closing.close()
        context.close()
        for process in (server, keeper):
            process.communicate()
    return {
        "transport": bare.transport.name,
        "block_bytes": block_bytes,
        "load_bytes_per_s": round(max(ours)),
        "bare_bytes_per_s": round(max(theirs)),
        "share": round(max(ours) / max(theirs), 3),
        **_measure_lookup(rng),
    }


class _Bare:
    """Reads slots of a server's, and nothing else."""

    def __init__(
        self, context: SecureContext, kv: KVConfig, endpoint: str, block_bytes: int, news: threading.Event
    ) -> None:
        self._block_bytes = block_bytes
        self._news = news
        [self.transport] = open_transports(news.set, context, _ADDRESS, kv).values()
        self._landing = Buffer(_JOBS * _JOB_BLOCKS * block_bytes)
        self.transport.register(Region("landing", self._landing))
        socket = context.connect(secrets.token_hex(8), endpoint)
        socket.send(encode(Ask("", 0)))
        told = answers.decode(socket.recv())
        assert isinstance(told, News)
        socket.close()
        self._slot_bytes = told.slot_bytes
        self.transport.add_peer("node", told.transports[self.transport.name])

    def read(self, num_slots: int, seconds: float) -> float:
        """Bytes a second."""
        rng, start_s, num_bytes = np.random.default_rng(1), time.perf_counter(), 0
        free, reads = list(range(_JOBS)), dict[int, int]()
        sizes = np.full(_JOB_BLOCKS, self._block_bytes, np.int64)
        while time.perf_counter() - start_s < seconds or reads:
            while free and time.perf_counter() - start_s < seconds:
                place = free.pop()
                slots = rng.choice(num_slots, _JOB_BLOCKS, replace=False).astype(np.int64)
                targets = (place * _JOB_BLOCKS + np.arange(_JOB_BLOCKS, dtype=np.int64)) * self._block_bytes
                runs = Runs(slots * self._slot_bytes, targets, sizes)
                reads[self.transport.submit(Read("node", SLOTS, "landing", runs))] = place
            for result in self.transport.poll():
                assert not result.error, result.error
                free.append(reads.pop(result.number))
                num_bytes += _JOB_BLOCKS * self._block_bytes
            if not free:
                self._news.wait(1.0)
                self._news.clear()
        return num_bytes / (time.perf_counter() - start_s)

    def close(self) -> None:
        """Let go of everything."""
        self.transport.close()
        self._landing.close()


def _load(tier: Tier, names: Sequence[bytes], memory: HostBlocks, news: threading.Event, seconds: float) -> float:
    rng, start_s, num_bytes = np.random.default_rng(1), time.perf_counter(), 0
    free, jobs = list(range(_JOBS)), dict[int, int]()
    while time.perf_counter() - start_s < seconds or jobs:
        while free and time.perf_counter() - start_s < seconds:
            place = free.pop()
            wanted = [names[n] for n in rng.choice(len(names), _JOB_BLOCKS, replace=False).tolist()]
            blocks = range(place * _JOB_BLOCKS, (place + 1) * _JOB_BLOCKS)
            jobs[tier.submit_load(LoadJob(wanted, memory, blocks))] = place
        for result in tier.poll():
            assert all(result.good), result.error
            free.append(jobs.pop(result.number))
            num_bytes += _JOB_BLOCKS * memory.block_bytes
        if not free:
            news.wait(1.0)
            news.clear()
    return num_bytes / (time.perf_counter() - start_s)


def _measure_lookup(rng: np.random.Generator) -> dict[str, Any]:
    """1,000 keys, half of which some node has."""
    replicas, known = [], []
    for _ in range(_KNOWN_NODES):
        keys = rng.bytes(_KNOWN_BLOCKS * KEY_BYTES)
        replica = IndexReplica(_KNOWN_BLOCKS)
        replica.apply(Changes(_KNOWN_BLOCKS, np.arange(_KNOWN_BLOCKS), keys, np.ones(_KNOWN_BLOCKS, np.uint64)))
        known += list(replica.slots)
        replicas.append(replica)
    times_s = []
    for _ in range(100):
        wanted = [known[n] for n in rng.choice(len(known), 500).tolist()] + [rng.bytes(KEY_BYTES) for _ in range(500)]
        start_s = time.perf_counter()
        look_up(wanted, replicas)
        times_s.append(time.perf_counter() - start_s)
    return {
        "known_nodes": _KNOWN_NODES,
        "known_blocks": len(known),
        "lookup_1000_median_ms": round(1e3 * statistics.median(times_s), 4),
        "lookup_1000_p99_ms": round(1e3 * sorted(times_s)[98], 4),
    }


def _wait(true: Any) -> None:
    while not true():
        time.sleep(0.002)


def _drain(tier: Tier, numbers: set[int], news: threading.Event) -> None:
    while numbers:
        numbers -= {result.number for result in tier.poll()}
        news.wait(0.001)
