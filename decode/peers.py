"""The prefill workers that a decode worker can read from: greets them, and picks one for a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..core.bounds import MAX_TEXT
from ..core.errors import TransferError
from ..core.ids import PeerId
from ..core.log import logger
from ..core.messages import FailureReason, HelloReply, Membership, Message
from ..core.metrics import WorkerMetrics
from ..kv_transfer.connector import Connector
from .stream import Stream

Send = Callable[[PeerId, Message], None]
"""Delivers a message to a peer; never blocks."""


class PrefillPeers:
    """Owned by the worker's thread; nothing blocks.

    Args:
        connector: knows those with whom the handshake succeeded.
        metrics: counts.
        send: see `Send`.
    """

    def __init__(self, connector: Connector, metrics: WorkerMetrics, send: Send) -> None:
        self._connector = connector
        self._metrics = metrics
        self._send = send
        self._refused: set[PeerId] = set()

    def follow(self, membership: Membership, others: Iterable[PeerId]) -> list[PeerId]:
        """The members have changed: greet prefill workers that are new.

        Args:
            membership: who is there.
            others: peers to be told of, besides those known here.

        Returns:
            peers that are gone for good.
        """
        alive = {member.peer: member for member in membership.members}
        for peer, member in alive.items():
            known = self._connector.connected(peer) or peer in self._refused
            if member.role == "prefill" and member.ready and not known:
                self._send(peer, self._connector.hello())
        return [peer for peer in {*others, *self._connector.peers(), *self._refused} if peer not in alive]

    def greeted(self, sender: PeerId, reply: HelloReply) -> None:
        """A prefill worker's answer: read from it from now on, or remember that it cannot be."""
        if reply.hello.peer != sender or self._connector.connected(sender):
            return
        try:
            self._connector.connect(reply)
        except TransferError as error:
            self._refused.add(sender)
            self._metrics.load_failures.labels(FailureReason.REFUSED.value).inc()
            logger.error("cannot read from %s", error.message)

    def forget(self, peer: PeerId) -> None:
        """A peer is gone: when it comes back it is greeted again."""
        self._refused.discard(peer)

    def refusals(self) -> dict[PeerId, str]:
        """Those that cannot be read from, and why."""
        return {peer: self._connector.refusal(peer)[:MAX_TEXT] for peer in self._refused}

    def choose(self, stream: Stream, avoid: PeerId = "") -> PeerId:
        """The prefill peer for a stream: the one that the gateway chose, or another; "" when there is none."""
        wanted = stream.request.prefill
        if not wanted:
            return ""
        if wanted != avoid and self._connector.connected(wanted):
            return wanted
        others = [peer for peer in self._connector.peers() if peer != avoid]
        return others[stream.order % len(others)] if others else ""
