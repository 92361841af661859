"""A transport of another process: each rank of a worker moves the KV of its own cache; here it is told what to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...core.errors import TransferError
from ...core.ids import PeerId
from .base import Read, Region, TransferResult
from .mover_link import MoverLink
from .mover_messages import AddPeer, Offer, RemovePeer


class ForwardedTransport:
    """See `Transport`. Its regions are registered where they are.

    Args:
        offer: what the other process tells of it.
        link: to that process.
    """

    def __init__(self, offer: Offer, link: MoverLink) -> None:
        self.name = offer.name
        self.converts = offer.converts
        self.memory = frozenset(offer.memory)
        self._descriptor = offer.descriptor
        self._link = link

    def register(self, region: Region) -> None:
        """Refuses: a region is registered by the process whose memory it is."""
        raise TransferError(f"{self.name}: the region {region.name} cannot be registered for another process")

    def descriptor(self) -> bytes:
        return self._descriptor

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        """Blocks until the other process has answered, for some seconds at most."""
        number = self._link.next_number()
        try:
            error = self._link.ask(number, AddPeer(self.name, number, peer, descriptor))
        except TimeoutError as problem:
            # It may still happen; then it should not stay.
            self.remove_peer(peer)
            error = f"{self.name}: {problem}"
        if error:
            raise TransferError(error)

    def remove_peer(self, peer: PeerId) -> None:
        self._link.send(RemovePeer(self.name, peer))

    def submit(self, read: Read) -> int:
        return self._link.submit(self.name, read)

    def poll(self) -> list[TransferResult]:
        return self._link.take_results(self.name)

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        """All that have not ended are draining, until the other process says that they write no more."""
        return self._link.cancel(self.name, set(numbers))

    def close(self) -> None:
        """Blocks until the other process has let go of the memory, for some seconds at most."""
        self._link.close_transport(self.name)


def forwarded(link: MoverLink) -> Mapping[str, ForwardedTransport]:
    """The transports that work in another process, by name. Blocks until it has told.

    Raises:
        WorkerError: it ended, or told nothing.
    """
    return {offer.name: ForwardedTransport(offer, link) for offer in link.offers()}
