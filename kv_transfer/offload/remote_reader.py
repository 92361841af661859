"""The thread that reads other nodes' host tiers for a worker: it follows their indexes, and has transports move blocks.

A batch waits for memory to land in, and for the other node's leave; then its bytes travel, then the records of their
slots are compared with what the index had promised, and only then are they copied to where the job wants them.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from itertools import count

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from ...core.clock import Clock
from ...core.errors import TandemError
from ...core.log import RateLimited, logger
from ..layout import Runs
from ..memory import Buffer
from ..transports import Read, Region, TransferResult, Transport
from ..transports.pieces import octets
from .base import LoadJob, TierStats
from .forgetting import Forgetting
from .jobs import OpenJob
from .network import Network, open_transports
from .pool import unchanged
from .remote_host import Batch, RemoteHost
from .remote_wire import HOLD_S, MAX_KEYS, SLOTS, Forget, Forgotten, Grant, News, Release, Released, Request
from .replica import IndexReplica

_LANDING = "landing"
_LANE_BYTES = 8 << 20
_NUM_LANES = 8
_LANES_PER_HOST = 4
_TICK_MS = 100
_IDLE_MS = 1000
_WARN_PERIOD_S = 300.0
_MAX_MESSAGES_AT_ONCE = 256


class RemoteReader:
    """See the module.

    Args:
        network: of this process.
        block_bytes: of a block.
        clock: for deadlines.
        timeout_s: after which a node that does not answer counts as gone.
        done: called, on the thread, with jobs and forgettings that have ended.
        stats: the tier's; failures are counted here.
        name: in logs.
    """

    def __init__(
        self,
        network: Network,
        block_bytes: int,
        clock: Clock,
        timeout_s: float,
        done: Callable[[OpenJob | Forgetting], None],
        stats: TierStats,
        name: str,
    ) -> None:
        self.replicas: tuple[IndexReplica, ...] = ()
        """Of the nodes that can be asked for blocks. Replaced, never changed."""
        self.num_hosts = 0
        """Other nodes that have a host tier."""
        self._network = network
        self._block_bytes = block_bytes
        self._clock = clock
        self._timeout_s = timeout_s
        self._done = done
        self._stats = stats
        self._name = name
        self._log = RateLimited(_WARN_PERIOD_S)
        self._errands: queue.SimpleQueue[OpenJob | Forgetting | None] = queue.SimpleQueue()
        self._bell, self._bell_end = socket.socketpair()
        self._bell.setblocking(False)
        self._bell_end.setblocking(False)
        # Of the thread.
        self._hosts: dict[str, RemoteHost] = {}
        self._poller = zmq.Poller()
        self._numbers = count(1)
        self._forgetting: dict[int, tuple[Forgetting, set[str]]] = {}
        self._reads: dict[tuple[str, int], tuple[RemoteHost, Batch]] = {}
        self._lane_blocks = max(1, min(_LANE_BYTES // block_bytes, MAX_KEYS))
        self._free_lanes = list(range(_NUM_LANES))
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        network.servers.listen(self._ring)
        self._ring()
        self._thread.start()

    # ---- any thread -------------------------------------------------------------------------------------------------

    def send(self, errand: OpenJob | Forgetting) -> None:
        """Load, or forget. Does not block."""
        self._errands.put(errand)
        self._ring()

    def close(self) -> None:
        """End the thread; nothing is written for anybody any more. Blocks."""
        self._errands.put(None)
        self._ring()
        self._thread.join()
        self._bell.close()

    def _ring(self) -> None:
        # A full bell rings already; a closed one is of nobody.
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._landing = Buffer(_NUM_LANES * self._lane_blocks * self._block_bytes)
        self._transports: dict[str, Transport] = {}
        try:
            network = self._network
            self._transports = open_transports(self._ring, network.context, network.address, network.kv)
        except TandemError as error:
            self._log.warning("transport", "%s: %s", self._name, error)
        for transport in self._transports.values():
            transport.register(Region(_LANDING, self._landing))
        self._poller.register(self._bell_end, zmq.POLLIN)
        while True:
            for ready, _ in self._poller.poll(_TICK_MS if self._busy() else _IDLE_MS):
                if ready == self._bell_end.fileno():
                    self._bell_end.recv(4096)
                else:
                    self._hear(ready)
            if not self._take_errands():
                break
            self._follow_servers()
            for name, transport in self._transports.items():
                for result in transport.poll():
                    self._read_ended(name, result)
            self._look_at_the_time()
            for host in self._hosts.values():
                self._start(host)
        for host in list(self._hosts.values()):
            self._lose(host, "", "")
        for transport in self._transports.values():
            transport.close()
        self._landing.close()
        self._bell_end.close()

    def _busy(self) -> bool:
        """Whether something may be late soon."""
        return any(host.socket is None or host.under_way or host.waiting for host in self._hosts.values())

    def _take_errands(self) -> bool:
        while True:
            try:
                errand = self._errands.get_nowait()
            except queue.Empty:
                return True
            if errand is None:
                return False
            if isinstance(errand, Forgetting):
                self._forget(errand)
            else:
                self._begin(errand)

    def _follow_servers(self) -> None:
        wanted = self._network.servers.others(self._network.own) if self._transports else {}
        for name, host in list(self._hosts.items()):
            if wanted.get(name) != host.endpoint:
                self._lose(host, "", "")
                del self._hosts[name]
        for name, endpoint in wanted.items():
            if name not in self._hosts:
                self._hosts[name] = RemoteHost(name, endpoint, self._network.context, self._clock, self._block_bytes)
        self.num_hosts = len(self._hosts)

    def _look_at_the_time(self) -> None:
        now_s = self._clock.monotonic_s()
        for host in self._hosts.values():
            if host.socket is None:
                if now_s >= host.retry_s:
                    host.connect()
                    self._poller.register(host.socket, zmq.POLLIN)
                    self._poller.register(host.monitor, zmq.POLLIN)
                continue
            if any(batch.job.deadline_s <= now_s for batch in (*host.waiting, *host.under_way.values())):
                self._lose(host, "slow", f"a load took longer than {self._timeout_s:g} s")
            elif host.heard_s + HOLD_S + self._timeout_s <= now_s:
                self._lose(host, "silent", f"nothing was heard for {self._timeout_s:g} s")

    def _hear(self, ready: zmq.Socket[bytes]) -> None:
        for host in self._hosts.values():
            if ready is host.monitor:
                recv_monitor_message(ready)
                self._lose(host, "gone", "the connection broke")
                return
            if ready is host.socket:
                self._receive(host)
                return

    def _receive(self, host: RemoteHost) -> None:
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            try:
                answer = host.receive()
                match answer:
                    case None:
                        return
                    case News():
                        self._follow(host, answer)
                    case Grant(number):
                        self._granted(host, number)
                    case Released(number, records):
                        self._released(host, number, records)
                    case Forgotten(number):
                        self._forgot(host.name, number)
            except (ValueError, msgspec.DecodeError) as error:
                self._log.warning("frame", "%s: refused a message of %s: %s", self._name, host.name, error)

    def _follow(self, host: RemoteHost, news: News) -> None:
        before = host.replica
        if news.epoch != host.epoch:
            self._fail_all(host, "restarted", "the keeper there is another one")
        try:
            host.follow(news, self._transports)
        except TandemError as error:
            self._log.warning(f"no way to {host.name}", "%s: %s", self._name, error.message)
        if host.replica is not before:
            self._publish()
            if host.replica is not None:
                logger.info("%s: %d slots of %s", self._name, host.replica.num_slots, host.name)

    def _publish(self) -> None:
        hosts = [host for host in self._hosts.values() if host.usable]
        self.replicas = tuple(host.replica for host in hosts if host.replica is not None)

    def _lose(self, host: RemoteHost, cause: str, detail: str) -> None:
        """Ask a node for nothing, for a while; without a cause, because it is not wanted."""
        if host.socket is not None:
            self._poller.unregister(host.socket)
            self._poller.unregister(host.monitor)
        host.disconnect()
        self._fail_all(host, cause, detail)
        host.forget_pool()
        for number in list(self._forgetting):
            self._forgot(host.name, number)
        self._publish()
        if cause:
            self._log.warning(
                cause, "%s: %s: %s; it is tried again, and its blocks count as missing", self._name, host.name, detail
            )

    # ---- loads ------------------------------------------------------------------------------------------------------

    def _begin(self, job: OpenJob) -> None:
        """Cut a job into batches, of the node that has most of it first."""
        load = job.job
        assert isinstance(load, LoadJob)
        job.remaining = 1
        open_ = list(range(len(load.keys)))
        hosts = [(host, host.replica) for host in self._hosts.values() if host.usable and host.replica is not None]
        hosts.sort(key=lambda entry: -sum(key in entry[1].slots for key in load.keys))
        for host, replica in hosts:
            keys = [load.keys[place] for place in open_]
            found, slots, generations = replica.find(keys)
            for start in range(0, len(found), self._lane_blocks):
                part = slice(start, start + self._lane_blocks)
                places = [open_[place] for place in found[part]]
                host.waiting.append(
                    Batch(job, places, [load.keys[place] for place in places], slots[part], generations[part])
                )
                job.remaining += 1
            missing = set(range(len(open_))) - set(found)
            open_ = [open_[place] for place in sorted(missing)]
        self._tell(job)

    def _start(self, host: RemoteHost) -> None:
        while host.waiting and host.waiting[0].job.ended:
            self._over(host.waiting.popleft())
        while host.usable and host.waiting and self._free_lanes and len(host.under_way) < _LANES_PER_HOST:
            batch = host.waiting.popleft()
            batch.lane = self._free_lanes.pop()
            batch.number = next(self._numbers)
            host.under_way[batch.number] = batch
            host.send(Request(batch.number, host.epoch, list(batch.keys)))

    def _granted(self, host: RemoteHost, number: int) -> None:
        batch = host.under_way.get(number)
        if batch is None or host.transport is None:
            host.send(Release(number, host.epoch, b""))
            return
        size = self._block_bytes
        targets = (batch.lane * self._lane_blocks + np.arange(len(batch.slots), dtype=np.int64)) * size
        runs = Runs(batch.slots * host.slot_bytes, targets, np.full(len(targets), size, np.int64))
        batch.reading = True
        read = host.transport.submit(Read(host.peer, SLOTS, _LANDING, runs))
        self._reads[host.transport.name, read] = (host, batch)

    def _read_ended(self, transport: str, result: TransferResult) -> None:
        host, batch = self._reads.pop((transport, result.number))
        batch.reading = False
        if batch.over:
            self._give_lane(batch)
            return
        if result.error:
            # The peer refuses, or is gone: the next `News`, or their absence, tells.
            del host.under_way[batch.number]
            host.send(Release(batch.number, host.epoch, b""))
            self._fail(batch, "transfer", f"{host.name}: {result.error}")
            self._log.warning("transfer", "%s: %s: %s", self._name, host.name, result.error)
        else:
            host.send(Release(batch.number, host.epoch, octets(batch.slots)))

    def _released(self, host: RemoteHost, number: int, records: bytes) -> None:
        batch = host.under_way.pop(number, None)
        if batch is None:
            return
        good = np.zeros(len(batch.keys), bool)
        if records:
            good = unchanged(records, batch.keys, batch.generations)
        self._write(batch, good)
        if not good.all():
            self._stats.failures["replaced"] += int((~good).sum())
            if host.replica is not None:
                host.replica.remove([key for key, still in zip(batch.keys, good, strict=True) if not still])
        if good.any() and host.came_back():
            logger.info("%s: %s works again", self._name, host.name)
        self._give_lane(batch)
        self._over(batch)

    def _write(self, batch: Batch, good: np.ndarray) -> None:
        job, load, size = batch.job, batch.job.job, self._block_bytes
        first = batch.lane * self._lane_blocks
        blocks = self._landing.array.reshape(-1, size)[first : first + len(batch.keys)]
        which = np.flatnonzero(good).tolist()
        with job.lock:
            if job.ended or not isinstance(load, LoadJob):
                return
            if load.memory is not None and which:
                load.memory.write([load.blocks[batch.places[n]] for n in which], [blocks[n] for n in which])
            for n in which:
                job.good[batch.places[n]] = True

    def _fail_all(self, host: RemoteHost, cause: str, detail: str) -> None:
        """End what a node was asked for. A lane that a transport may still write into stays taken until it tells."""
        batches = [*host.under_way.values(), *host.waiting]
        host.under_way.clear()
        host.waiting.clear()
        for batch in batches:
            self._fail(batch, cause, f"{host.name}: {detail}")

    def _fail(self, batch: Batch, cause: str, detail: str) -> None:
        if not batch.job.ended:
            if cause:
                self._stats.failures[cause] += len(batch.keys)
            batch.job.error = batch.job.error or f"{self._name}: {detail}"
        if not batch.reading:
            self._give_lane(batch)
        self._over(batch)

    def _give_lane(self, batch: Batch) -> None:
        if batch.lane >= 0:
            self._free_lanes.append(batch.lane)
            batch.lane = -1

    def _over(self, batch: Batch) -> None:
        batch.over = True
        self._tell(batch.job)

    def _tell(self, job: OpenJob) -> None:
        job.remaining -= 1
        if not job.remaining:
            self._done(job)

    # ---- what is not to be found any more ---------------------------------------------------------------------------

    def _forget(self, forgetting: Forgetting) -> None:
        number = next(self._numbers)
        told = set()
        for host in self._hosts.values():
            if host.usable and host.replica is not None:
                if forgetting.keys is None:
                    host.replica.clear(forgetting.tenant)
                else:
                    host.replica.remove(list(forgetting.keys))
                keys = None if forgetting.keys is None else list(forgetting.keys)
                host.send(Forget(number, keys, forgetting.tenant))
                told.add(host.name)
        self._forgetting[number] = (forgetting, told)
        self._forgot("", number)

    def _forgot(self, host: str, number: int) -> None:
        if number in self._forgetting:
            forgetting, told = self._forgetting[number]
            told.discard(host)
            if not told:
                del self._forgetting[number]
                self._done(forgetting)
