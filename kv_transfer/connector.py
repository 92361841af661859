"""A worker's end of the byte plane: who may be read from, by which transport, and the check that what landed is true.

A pull is two reads: the blocks, and then, when every byte has landed, the peer's generation numbers of those blocks. A
block that was reused meanwhile has a new number, and its bytes are a failure, never tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..core.clock import Clock
from ..core.errors import TransferError
from ..core.ids import PeerId, worker_of
from ..core.log import logger
from ..core.messages import PROTOCOL_VERSION, FailureReason, Hello, HelloReply
from ..core.metrics import WorkerMetrics
from .layout import KVLayout, coalesce, plan_copies
from .memory import Buffer, DeviceBuffer
from .transports import PREFERENCE, Read, Region, Transport

BLOCKS = "blocks"
GENERATIONS = "generations"
_FENCE = "fence"


class PullResult(NamedTuple):
    """How a pull ended. ``failure`` is None when all its blocks landed and were verified."""

    number: int
    failure: FailureReason | None
    num_good: int
    num_bytes: int


class _Pull:
    def __init__(
        self, number: int, peer: PeerId, transport: Transport, local: np.ndarray, remote: np.ndarray, want: np.ndarray
    ) -> None:
        self.number = number
        self.peer = peer
        self.transport = transport
        self.local = local
        self.remote = remote
        self.want = want
        self.num_bytes = 0
        self.num_runs = 0
        self.fencing = False
        self.start_s = 0.0


class Connector:
    """One worker's connections. Owned by the engine thread; nothing here blocks.

    Args:
        peer: our own peer id.
        fingerprint: of the model.
        layout: of our cache.
        layer_groups: first layer of each group that is published as one.
        blocks: the cache's memory.
        generations: [blocks] uint64 in shared memory: bumped before a block is written anew.
        transports: by name, those that work here.
        choice: "auto" or the one to use.
        lease_s: how long we keep blocks for readers.
        clock: for durations.
        metrics: where transfers are counted.
    """

    def __init__(
        self,
        peer: PeerId,
        fingerprint: str,
        layout: KVLayout,
        layer_groups: Sequence[int],
        blocks: Buffer | DeviceBuffer,
        generations: Buffer,
        transports: Mapping[str, Transport],
        choice: str,
        lease_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self.layout = layout
        self.layer_groups = list(layer_groups)
        self._peer = peer
        self._fingerprint = fingerprint
        self._transports = dict(transports)
        self._choice = choice
        self._lease_s = lease_s
        self._clock = clock
        self._metrics = metrics
        self._chosen: dict[PeerId, Transport] = {}
        self._refused: dict[PeerId, str] = {}
        self._peer_lease_s: dict[PeerId, float] = {}
        self._pulls: dict[tuple[str, int], _Pull] = {}
        self._number = 0
        self._failed: list[PullResult] = []
        self._fence_buffer = Buffer(max(len(generations.array), 8))
        self._fence: np.ndarray = self._fence_buffer.array.view(np.uint64)
        for transport in self._transports.values():
            transport.register(Region(BLOCKS, blocks))
            transport.register(Region(GENERATIONS, generations))
            transport.register(Region(_FENCE, self._fence_buffer))

    # ---- handshake --------------------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """What we tell a peer about ourselves."""
        return Hello(
            protocol=PROTOCOL_VERSION,
            peer=self._peer,
            fingerprint=self._fingerprint,
            groups=[self.layout.spec()],
            layer_groups=self.layer_groups,
            transports={name: transport.descriptor() for name, transport in self._transports.items()},
            lease_s=self._lease_s,
        )

    def answer(self, hello: Hello) -> HelloReply:
        """Our reply to a reader's hello: ourselves, and why we refuse, if we do. Counts nothing, keeps nothing."""
        return HelloReply(self.hello(), self._incompatible(hello))

    def connect(self, reply: HelloReply) -> str:
        """Get ready to read from a peer that answered.

        Returns:
            the name of the transport, and why it was chosen.

        Raises:
            TransferError: it refused us, we refuse it, or no transport works between us; names the field and both
            values.
        """
        peer = reply.hello.peer
        reason = reply.refused or self._incompatible(reply.hello)
        if not reason:
            reason = self._choose(peer, reply.hello)
        if reason:
            self._refused[peer] = reason
            raise TransferError(f"{peer}: {reason}", reason=FailureReason.REFUSED.value)
        self._peer_lease_s[peer] = reply.hello.lease_s
        return self._chosen[peer].name

    def connected(self, peer: PeerId) -> bool:
        """Whether blocks can be read from a peer."""
        return peer in self._chosen

    def refusal(self, peer: PeerId) -> str:
        """Why blocks can never be read from a peer, or ""."""
        return self._refused.get(peer, "")

    def peers(self) -> list[PeerId]:
        """The peers that we can read from."""
        return list(self._chosen)

    def shortest_lease_s(self) -> float:
        """The shortest lease among our peers: how often to renew depends on it."""
        return min(self._peer_lease_s.values(), default=self._lease_s)

    def transport_of(self, peer: PeerId) -> str:
        """The name of the transport to a peer, or ""."""
        return self._chosen[peer].name if peer in self._chosen else ""

    def remove_peer(self, peer: PeerId) -> None:
        """Forget a peer; unfinished pulls from it fail."""
        self._refused.pop(peer, None)
        self._peer_lease_s.pop(peer, None)
        transport = self._chosen.pop(peer, None)
        if transport is not None:
            transport.remove_peer(peer)

    # ---- pulls ------------------------------------------------------------------------------------------------------

    def pull(
        self,
        peer: PeerId,
        layer_group: int,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        generations: Sequence[int],
    ) -> int:
        """Start reading one layer group of some blocks, and then verify them.

        Args:
            peer: a connected peer.
            layer_group: which.
            local_blocks: where they go; nobody else writes there until the pull has ended.
            remote_blocks: the peer's block numbers.
            generations: what the peer's blocks must still be when the bytes have landed.

        Returns:
            the pull's number, in the results of `poll`.
        """
        self._number += 1
        transport = self._chosen.get(peer)
        if transport is None:
            self._failed.append(PullResult(self._number, FailureReason.PEER_LOST, 0, 0))
            return self._number
        local, remote = np.asarray(local_blocks, np.int64), np.asarray(remote_blocks, np.int64)
        pull = _Pull(self._number, peer, transport, local, remote, np.asarray(generations, np.uint64))
        first = self.layer_groups[layer_group]
        last = (*self.layer_groups, self.layout.num_layers)[layer_group + 1]
        runs = plan_copies(self.layout, first, last - first, remote, local)
        pull.num_bytes, pull.num_runs = runs.num_bytes, len(runs.sizes)
        pull.start_s = self._clock.monotonic_s()
        self._pulls[transport.name, transport.submit(Read(peer, BLOCKS, BLOCKS, runs))] = pull
        return self._number

    def poll(self) -> list[PullResult]:
        """Drive all transports, and return the pulls that ended. Does not block."""
        results, self._failed = self._failed, []
        for transport in self._transports.values():
            for landed in transport.poll():
                pull = self._pulls.pop((transport.name, landed.number), None)
                if pull is None:
                    continue
                if landed.error:
                    logger.info("read from %s by %s failed: %s", pull.peer, transport.name, landed.error)
                    gone = pull.peer not in self._chosen
                    reason = FailureReason.PEER_LOST if gone else FailureReason.TRANSPORT
                    results.append(PullResult(pull.number, reason, 0, 0))
                elif not pull.fencing:
                    self._submit_fence(pull)
                else:
                    results.append(self._verify(pull))
        return results

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        """Give pulls up. Returns those still draining, which `poll` will report; the others have ended."""
        wanted = set(numbers)
        self._failed = [result for result in self._failed if result.number not in wanted]
        draining = set()
        for (name, number), pull in list(self._pulls.items()):
            if pull.number in wanted:
                if self._transports[name].cancel([number]):
                    draining.add(pull.number)
                else:
                    del self._pulls[name, number]
        return draining

    @property
    def num_pulls(self) -> int:
        """Pulls in flight."""
        return len(self._pulls)

    def close(self) -> None:
        """Close all transports. Idempotent."""
        for transport in self._transports.values():
            transport.close()

    def _submit_fence(self, pull: _Pull) -> None:
        pull.fencing = True
        size = np.full(len(pull.local), 8, np.int64)
        read = Read(pull.peer, GENERATIONS, _FENCE, coalesce(pull.remote * 8, pull.local * 8, size))
        self._pulls[pull.transport.name, pull.transport.submit(read)] = pull

    def _verify(self, pull: _Pull) -> PullResult:
        labels = (pull.transport.name, worker_of(pull.peer))
        self._metrics.transfer_bytes.labels(*labels).inc(pull.num_bytes)
        self._metrics.transfer_runs.labels(*labels).inc(pull.num_runs)
        self._metrics.transfer_s.labels(*labels).observe(self._clock.monotonic_s() - pull.start_s)
        good = self._fence[pull.local] == pull.want
        if good.all():
            return PullResult(pull.number, None, len(good), pull.num_bytes)
        return PullResult(pull.number, FailureReason.GENERATION, int(good.argmin()), pull.num_bytes)

    def _incompatible(self, theirs: Hello) -> str:
        """The first field in which a peer's KV differs from ours such that it cannot be read, with both values."""
        ours = self.layout.spec()
        if theirs.protocol != PROTOCOL_VERSION:
            return f"protocol: {theirs.peer} speaks version {theirs.protocol}, {self._peer} {PROTOCOL_VERSION}"
        if theirs.fingerprint != self._fingerprint:
            return f"model: {theirs.peer} serves {theirs.fingerprint}, {self._peer} {self._fingerprint}"
        if len(theirs.groups) != 1:
            return f"KV groups: {theirs.peer} has {len(theirs.groups)}, {self._peer} 1"
        for field in ours.__struct_fields__:
            their, our = getattr(theirs.groups[0], field), getattr(ours, field)
            if their != our:
                return f"kv.{field}: {theirs.peer} has {their}, {self._peer} {our}"
        if theirs.layer_groups != self.layer_groups:
            return f"kv.layer_groups: {theirs.peer} has {theirs.layer_groups}, {self._peer} {self.layer_groups}"
        return ""

    def _choose(self, peer: PeerId, hello: Hello) -> str:
        """Pick the first transport that works with a peer; returns why none does, or ""."""
        tried = []
        for name in PREFERENCE if self._choice == "auto" else (self._choice,):
            transport = self._transports.get(name)
            if transport is None or name not in hello.transports:
                side = self._peer if transport is None else peer
                tried.append(f"{name}: {side} does not offer it")
                continue
            try:
                transport.add_peer(peer, hello.transports[name])
            except TransferError as error:
                tried.append(f"{name}: {error.message}")
                continue
            self._chosen[peer] = transport
            logger.info("KV of %s comes by %s%s", peer, name, f" ({'; '.join(tried)})" if tried else "")
            return ""
        return f"kv.transport {self._choice}: nothing works: {'; '.join(tried)}"
