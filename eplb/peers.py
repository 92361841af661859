"""The other ranks, as far as their experts can be read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from ..core.errors import ConfigError, TransferError
from ..core.ids import PeerId, peer_id
from ..kv_transfer.layout import Runs
from ..kv_transfer.transports import PREFERENCE, Read, Region, Transport
from ..kv_transfer.transports.base import Notify
from .exchange import Exchange
from .store import ExpertLayout

MakeTransports = Callable[[Notify], Mapping[str, Transport]]
"""Opens transports for the memory that experts lie in; `kv_transfer.transports.offer` tells which there are."""

Ticket = tuple[str, int]
"""A read: its transport's name, and its number there."""


class Introduction(msgspec.Struct, frozen=True):
    """What ranks tell each other first."""

    layout: ExpertLayout
    num_physical: int
    num_logical: int
    checksums: bool
    descriptors: dict[str, bytes]
    """Of the transports, by name."""


# Made once: when several threads make the first of a type, msgspec crashes.
_introductions = msgspec.msgpack.Decoder(Introduction)


class Peers:
    """Reads from other ranks' memory. One thread at a time uses it.

    Args:
        exchange: with all ranks; they all make their `Peers` together.
        make: this rank's transports.
        regions: what peers may read, and what reads land in.
        about: this rank, without descriptors.

    Raises:
        ConfigError: ranks do not fit each other, or one cannot be reached; says which, and why.
        WorkerError: a rank did not come.
    """

    def __init__(
        self, exchange: Exchange, make: MakeTransports, regions: Sequence[Region], about: Introduction
    ) -> None:
        self.news = threading.Event()
        """Set when `poll` has something new."""
        self._transports = dict(make(self.news.set))
        self._through: dict[int, str] = {}
        try:
            for transport in self._transports.values():
                for region in regions:
                    transport.register(region)
            descriptors = {name: transport.descriptor() for name, transport in self._transports.items()}
            frame = msgspec.msgpack.encode(msgspec.structs.replace(about, descriptors=descriptors))
            problem = ""
            for rank, other in enumerate(exchange.gather(frame)):
                if rank != exchange.rank:
                    problem = problem or self._meet(rank, _introductions.decode(other), about)
            # All or none begin.
            for rank, found in enumerate(exchange.gather(problem.encode())):
                if found:
                    raise ConfigError(
                        f"rank {rank}: {found.decode()}",
                        fix="all ranks must have the same model, topology and configuration, and reach each other",
                    )
        except BaseException:
            self.close()
            raise

    def start(self, rank: int, source: str, target: str, runs: Runs) -> Ticket:
        """Start to read ranges of a peer's region into one of ours. Does not wait."""
        name = self._through[rank]
        return name, self._transports[name].submit(Read(_name_of(rank), source, target, runs))

    def poll(self) -> dict[Ticket, str]:
        """The reads that ended since the last call, each with why not, or "". Does not wait."""
        self.news.clear()
        return {
            (name, result.number): result.error
            for name, transport in self._transports.items()
            for result in transport.poll()
        }

    def cancel(self, tickets: Iterable[Ticket]) -> set[Ticket]:
        """Give reads up. Returns those that `poll` will still report: until then they may write."""
        wanted = set(tickets)
        return {
            (name, number)
            for name, transport in self._transports.items()
            for number in transport.cancel([number for other, number in wanted if other == name])
        }

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        for transport in self._transports.values():
            transport.close()

    def _meet(self, rank: int, other: Introduction, about: Introduction) -> str:
        """Get ready to read from a peer. Returns why not, or ""."""
        if (theirs := msgspec.structs.replace(other, descriptors={})) != about:
            return f"rank {rank} has other experts: {theirs}, expected {about}"
        reasons = []
        for name in PREFERENCE:
            if name in self._transports and name in other.descriptors:
                try:
                    self._transports[name].add_peer(_name_of(rank), other.descriptors[name])
                except TransferError as error:
                    reasons.append(f"{name}: {error}")
                    continue
                self._through[rank] = name
                return ""
        return f"experts of rank {rank} cannot be read: {'; '.join(reasons) or 'no transport is common to both'}"


def _name_of(rank: int) -> PeerId:
    return peer_id(f"experts-{rank}", 1)
