"""A node's host tier and another node that reads it: the server in a thread of the test, or as it runs, in a process."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tandem.core.clock import SystemClock
from tandem.core.config import KVConfig
from tandem.core.wire import ClusterKeys, SecureContext, make_cluster_keys
from tandem.kv_transfer.offload.base import Change, JobResult, LoadJob, Lookup, StoreJob, TierStats
from tandem.kv_transfer.offload.host import HostTier
from tandem.kv_transfer.offload.keys import TierKey
from tandem.kv_transfer.offload.network import Network, Servers
from tandem.kv_transfer.offload.remote import RemoteTier
from tandem.kv_transfer.offload.remote_server import HostServer
from tandem.kv_transfer.offload.remote_task import Task, start_server

from .gateway import wait_for
from .tiers import BLOCK_BYTES, end

KV = KVConfig(transport="zmq")
ADDRESS = "127.0.0.1"


def task_of(path: Path, keys: ClusterKeys, port: int = 0, block_bytes: int = BLOCK_BYTES) -> Task:
    """What a server is told."""
    return Task(str(path), block_bytes, ADDRESS, port, keys, KV.model_dump_json(), 30.0)


class ServerThread:
    """A `HostServer` in this process."""

    def __init__(self, path: Path, keys: ClusterKeys, block_bytes: int = BLOCK_BYTES) -> None:
        self.keys = keys
        self.context = SecureContext(keys)
        server = HostServer(task_of(path, keys, 0, block_bytes), self.context, SystemClock())
        self.endpoint = server.endpoint
        reading, self._writing = os.pipe()
        self._reading = reading
        self._thread = threading.Thread(target=server.run, args=(reading,))
        self._thread.start()

    def close(self) -> None:
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)
        self.context.close()


class ServerProcess:
    """A server as a node runs it."""

    def __init__(self, path: Path, keys: ClusterKeys, port: int = 0) -> None:
        self.process: subprocess.Popen[bytes]
        self.process, self.endpoint = start_server(task_of(path, keys, port))
        self.port = int(self.endpoint.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            end(self.process)
        elif self.process.stdin is not None:
            self.process.stdin.close()


class OtherNode:
    """A node that reads the host tiers of others."""

    def __init__(self, endpoints: dict[str, str], keys: ClusterKeys | None = None) -> None:
        self.keys = keys or make_cluster_keys()
        self.context = SecureContext(self.keys)
        self.servers = Servers()
        self.servers.follow(endpoints)
        self._tiers: list[RemoteTier] = []

    def tier(self, notify: Callable[[], None], timeout_s: float = 30.0) -> RemoteTier:
        network = Network(self.context, ADDRESS, KV, self.servers, "this node")
        tier = RemoteTier(network, BLOCK_BYTES, SystemClock(), timeout_s, notify)
        self._tiers.append(tier)
        return tier

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()
        self.context.close()


class Elsewhere:
    """Both ends as one tier: blocks are stored where they are kept, and looked up and loaded from another node, as soon
    as that knows."""

    name = "elsewhere"
    shared = True

    def __init__(self, home: HostTier, remote: RemoteTier) -> None:
        self.home = home
        self.remote = remote
        self._number = 0
        self._numbers: dict[tuple[object, int], int] = {}

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        self._catch_up(keys)
        return self.remote.lookup(keys)

    def submit_store(self, job: StoreJob) -> int:
        return self._numbered(self.home, self.home.submit_store(job))

    def submit_load(self, job: LoadJob) -> int:
        self._catch_up(job.keys)
        return self._numbered(self.remote, self.remote.submit_load(job))

    def poll(self) -> list[JobResult]:
        return [
            result._replace(number=self._numbers.pop((tier, result.number)))
            for tier in (self.home, self.remote)
            for result in tier.poll()
        ]

    def touch(self, keys: Sequence[TierKey]) -> None:
        self.home.touch(keys)

    def pin(self, keys: Sequence[TierKey]) -> None:
        self.home.pin(keys)

    def unpin(self, keys: Sequence[TierKey]) -> None:
        self.home.unpin(keys)

    def remove(self, keys: Sequence[TierKey]) -> None:
        self.remote.remove(keys)
        wait_for(lambda: Lookup.HIT not in self.home.lookup(keys), 10, "the removal")

    def clear(self, tenant: bytes | None = None) -> None:
        self.remote.clear(tenant)
        wait_for(self._settled, 10, "the removal")

    def watch(self) -> list[TierKey]:
        return self.home.watch() + self.remote.watch()

    def changes(self) -> list[Change]:
        return self.home.changes() + self.remote.changes()

    def stats(self) -> TierStats:
        stats = self.home.stats()
        if not stats.away and not self.remote.stats().num_slots:
            stats.away = self.remote.stats().away or "not found yet"
        stats.failures |= self.remote.stats().failures
        return stats

    def next_event_s(self) -> float | None:
        times = [at_s for tier in (self.home, self.remote) if (at_s := tier.next_event_s()) is not None]
        return min(times, default=None)

    def close(self) -> None:
        self.remote.close()
        self.home.close()

    def _numbered(self, tier: object, number: int) -> int:
        self._number += 1
        self._numbers[tier, number] = self._number
        return self._number

    def _settled(self) -> bool:
        self.remote.poll()
        return not self.remote.num_forgetting

    def _catch_up(self, keys: Sequence[TierKey]) -> None:
        def same() -> bool:
            home = [answer is Lookup.HIT for answer in self.home.lookup(keys)]
            return home == [answer is Lookup.HIT for answer in self.remote.lookup(keys)]

        deadline_s = time.monotonic() + 10
        while not same():
            assert time.monotonic() < deadline_s, "no news of what is kept"
            time.sleep(0.001)
