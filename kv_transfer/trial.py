"""Reads between two workers' places that carry no KV: whether a transport works between them, and how fast.

An end opens the transports that a worker would open there, over memory of its own. The reader's end then does what a
worker does: it takes the first transport, in the order of `PREFERENCE`, that works with what the owner's end offers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import msgspec
import numpy as np
import torch

from ..core.config import KVConfig
from ..core.errors import TransferError
from ..core.ids import PeerId
from ..core.wire import ClusterKeys, SecureContext
from ..kernels import copy_runs, cuda_memory
from .layout import Runs
from .memory import Buffer, DeviceBuffer
from .rdma import rdma_devices, rule_out_tcp
from .transports import PREFERENCE, Read, Region, Transport
from .transports.offer import offer

BLOCK_BYTES = 64 << 10
"""Of one contiguous piece: about a block of one layer group."""

_REGION = "trial"
_READ_BLOCKS = {"host": 128, "cuda": 1024}
"""Of one read: a link between GPUs moves 64 MiB while the host starts two or three reads."""
_ROUNDS = {"host": 1, "cuda": 16}
"""Reads of all the memory: a link between GPUs needs a millisecond for one."""
_IN_FLIGHT_READS = 8
_DRAIN_S = 5.0


class Offer(msgspec.Struct, frozen=True):
    """What an owner's end tells a reader's."""

    peer: PeerId
    num_bytes: int
    transports: dict[str, bytes]
    """Name → descriptor."""
    reasons: dict[str, str]
    """Name → why it is not among them."""


class Rate(msgspec.Struct, frozen=True):
    """How fast bytes landed; ``error`` is empty if all that landed was right."""

    num_bytes: int
    seconds: float
    error: str = ""

    @property
    def bytes_per_s(self) -> float:
        """0 if nothing landed."""
        return self.num_bytes / self.seconds if self.seconds > 0 else 0.0


class TrialEnd:
    """One worker's place. Owned by one thread.

    Args:
        peer: whose place.
        keys: the same at all ends.
        address: of this host.
        kv: which transports are allowed.
        num_bytes: of memory to read from or to land in; whole blocks of `BLOCK_BYTES`.
        memory_kind: "host" or "cuda": then of the first GPU that this process sees.
        everything: open also what the configuration leaves out.

    Raises:
        ConfigError: a GPU's memory cannot be shared; says why.
        torch.OutOfMemoryError: so much is not free.
    """

    def __init__(
        self,
        peer: PeerId,
        keys: ClusterKeys,
        address: str,
        kv: KVConfig,
        num_bytes: int,
        memory_kind: str = "host",
        *,
        everything: bool = False,
    ) -> None:
        self._peer = peer
        self._kind = memory_kind
        self._num_bytes = num_bytes
        self._choice = kv.transport
        self._news = threading.Event()
        self._context = SecureContext(keys)
        self._transports: dict[str, Transport] = {}
        self._reasons: dict[str, str] = {}
        # Some work here only for who asks for them by name.
        for choice in dict.fromkeys(["auto", kv.transport] if everything else [kv.transport]):
            found, reasons = offer(self._news.set, self._context, address, memory_kind, choice, lambda: None)
            for name, transport in found.items():
                if name in self._transports:
                    transport.close()
                else:
                    self._transports[name] = transport
            self._reasons = {**reasons, **self._reasons}
        for name in self._transports:
            self._reasons.pop(name, None)
        if kv.require_rdma and not everything:
            self._transports, self._reasons = rule_out_tcp(self._transports, self._reasons, rdma_devices())
        self._buffer: Buffer | DeviceBuffer
        if memory_kind == "cuda":
            self._buffer = DeviceBuffer(num_bytes, 0)
            memory = self._buffer.tensor()
        else:
            self._buffer = Buffer(num_bytes)
            memory = torch.from_numpy(self._buffer.array)
        # Touched before it is timed, and every block says which it is.
        self._blocks = memory.view(torch.int64).view(-1, BLOCK_BYTES // 8)
        self._blocks[:] = torch.arange(len(self._blocks), device=self._blocks.device)[:, None]
        self._settle()
        for transport in self._transports.values():
            transport.register(Region(_REGION, self._buffer))

    def offer(self) -> Offer:
        """For readers."""
        descriptors = {name: transport.descriptor() for name, transport in self._transports.items()}
        return Offer(self._peer, self._num_bytes, descriptors, self._reasons)

    @property
    def gpu(self) -> str:
        """The UUID of the GPU whose memory it is; "": the host's."""
        return cuda_memory.uuid_of(0) if self._kind == "cuda" else ""

    def connect(self, theirs: Offer) -> dict[str, str]:
        """Get ready to read from an owner by every transport that there is.

        Returns:
            name → why it does not work, or "": in the order in which a worker tries them.
        """
        return {name: self._why_not(name, theirs) for name in self._names(theirs)}

    def refusal(self, theirs: Offer) -> str:
        """Why a worker here could not read from that owner by any transport, or ""."""
        why = self.connect(theirs)
        if "" in why.values():
            return ""
        tried = (f"{name}: {reason}" for name, reason in why.items() if self._choice in ("auto", name))
        return f"kv.transport {self._choice}: nothing works: {'; '.join(tried)}"

    def measure(self, theirs: Offer, name: str, limit_s: float) -> Rate:
        """Read all of a connected owner's memory, block by block from and to random places. Blocks.

        Args:
            theirs: what the owner told.
            name: of the transport.
            limit_s: about how long at most.
        """
        transport = self._transports[name]
        count = min(theirs.num_bytes, self._num_bytes) // BLOCK_BYTES
        rng = np.random.default_rng(0)
        sources, targets = rng.permutation(count), rng.permutation(count)
        # The first read also waits for the connection to stand.
        first = self._read(transport, theirs.peer, [_runs(sources[:1], targets[:1])], limit_s + _DRAIN_S)
        if first.error:
            return first
        self._blocks[:] = -1
        self._settle()
        size = _READ_BLOCKS[self._kind]
        parts = [_runs(sources[at : at + size], targets[at : at + size]) for at in range(0, count, size)]
        rate = self._read(transport, theirs.peer, parts * _ROUNDS[self._kind], limit_s)
        landed = min(rate.num_bytes // BLOCK_BYTES, count)
        where, want = (torch.from_numpy(column[:landed]).to(self._blocks.device) for column in (targets, sources))
        wrong = int((self._blocks[where] != want[:, None]).any(dim=1).sum())
        if not rate.error and wrong:
            return Rate(rate.num_bytes, rate.seconds, f"{wrong} of {landed} blocks are wrong")
        return rate

    def memory_rate(self) -> Rate:
        """Copies like those of `measure` within this process: what shared memory can at best be."""
        half = len(self._blocks) // 2
        rng = np.random.default_rng(1)
        sources, targets = rng.permutation(half), half + rng.permutation(half)
        runs = _runs(sources, targets)
        here, there = (torch.from_numpy(column).to(self._blocks.device) for column in (sources, targets))
        seconds = []
        for _ in range(3):
            start_s = time.perf_counter()
            if isinstance(self._buffer, Buffer):
                copy_runs.native(self._buffer.array, self._buffer.array, *runs)
            else:
                self._blocks[there] = self._blocks[here]
                self._settle()
            seconds.append(time.perf_counter() - start_s)
        return Rate(half * BLOCK_BYTES, min(seconds))

    def close(self) -> None:
        """Close the transports and let the memory go. Idempotent."""
        for transport in self._transports.values():
            transport.close()
        self._context.close()
        self._buffer.close()

    def _settle(self) -> None:
        """What was written before is there for whoever reads."""
        if self._kind == "cuda":
            torch.cuda.synchronize(self._blocks.device)

    def _names(self, theirs: Offer) -> list[str]:
        known: Mapping[str, object] = {**self._transports, **self._reasons, **theirs.transports, **theirs.reasons}
        return [name for name in PREFERENCE if name in known]

    def _why_not(self, name: str, theirs: Offer) -> str:
        if name not in self._transports:
            return self._reasons.get(name) or f"{self._peer} does not offer it"
        if name not in theirs.transports:
            return f"{theirs.peer} does not offer it: {theirs.reasons.get(name, 'it does not know it')}"
        try:
            self._transports[name].remove_peer(theirs.peer)
            self._transports[name].add_peer(theirs.peer, theirs.transports[name])
        except TransferError as error:
            return error.message
        return ""

    def _read(self, transport: Transport, peer: PeerId, parts: list[Runs], limit_s: float) -> Rate:
        """Read parts in order, several at a time, until all have landed or the time is over."""
        sizes: dict[int, int] = {}
        results: dict[int, str] = {}
        queued = iter(parts)
        start_s = last_s = time.perf_counter()
        more = True
        while more or len(results) < len(sizes):
            while more and len(sizes) - len(results) < _IN_FLIGHT_READS:
                part = next(queued, None) if time.perf_counter() - start_s < limit_s else None
                if part is None:
                    more = False
                else:
                    sizes[transport.submit(Read(peer, _REGION, _REGION, part))] = part.num_bytes
            self._news.wait(0.05)
            self._news.clear()
            landed = [result for result in transport.poll() if result.number in sizes]
            results |= {result.number: result.error for result in landed}
            if landed:
                last_s = time.perf_counter()
            error = next(filter(None, results.values()), "")
            if not error and time.perf_counter() - start_s > limit_s + _DRAIN_S:
                error = f"{len(sizes) - len(results)} reads did not end within {limit_s + _DRAIN_S:g} s"
            if error:
                transport.remove_peer(peer)
                return Rate(0, 0.0, error)
        return Rate(sum(sizes.values()), last_s - start_s)


def _runs(sources: np.ndarray, targets: np.ndarray) -> Runs:
    order = np.argsort(targets)
    starts, ends = (column[order].astype(np.int64) * BLOCK_BYTES for column in (sources, targets))
    return Runs(starts, ends, np.full(len(sources), BLOCK_BYTES, np.int64))
