"""The workers that a decode worker can read from: greets them, and picks one for a stream.

These are the prefill workers, and decode workers that are about to end, who hold what ran on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..core.bounds import MAX_TEXT
from ..core.errors import TransferError
from ..core.ids import PeerId
from ..core.log import logger
from ..core.messages import FailureReason, Farewell, HelloReply, Membership, Message
from ..core.metrics import WorkerMetrics
from ..kv_transfer.connector import Connector
from .stream import Stream

Send = Callable[[PeerId, Message], None]
"""Delivers a message to a peer; never blocks."""


class Sources:
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
        self._ending: set[PeerId] = set()
        """Decode workers that are about to end."""
        self._leaving: set[PeerId] = set()
        """Prefill workers that are about to end."""

    def follow(self, membership: Membership, others: Iterable[PeerId]) -> list[PeerId]:
        """The members have changed: greet workers that are new among those that can be read from.

        Args:
            membership: who is there.
            others: peers to be told of, besides those known here.

        Returns:
            peers that are gone for good.
        """
        alive = {member.peer: member for member in membership.members}
        here = self._connector.peer
        stays = here in alive and not alive[here].hands_over
        ending = {peer for peer, m in alive.items() if m.role == "decode" and m.hands_over and stays}
        for peer, member in alive.items():
            known = self._connector.connected(peer) or peer in self._refused
            if not known and ((member.role == "prefill" and member.ready) or peer in ending):
                self._send(peer, self._connector.hello())
        self._ending = (self._ending | ending) & alive.keys()
        return [peer for peer in {*others, *self._connector.peers(), *self._refused} if peer not in alive]

    def take_leave(self, membership: Membership) -> list[PeerId]:
        """Ask prefill workers that are about to end for nothing more, and tell them so: they wait to hear it.

        Returns:
            those of them that had not been about to end before.
        """
        leaving = {m.peer for m in membership.members if m.role == "prefill" and not m.ready}
        new = [peer for peer in leaving - self._leaving if self._connector.connected(peer)]
        self._leaving = leaving
        for peer in new:
            self._send(peer, Farewell())
        return new

    def greeted(self, sender: PeerId, reply: HelloReply) -> None:
        """A prefill worker's answer: read from it from now on, or remember that it cannot be."""
        if reply.hello.peer != sender or self._connector.connected(sender):
            return
        try:
            self._connector.connect(reply)
            if sender in self._leaving:
                self._send(sender, Farewell())
        except TransferError as error:
            self._refused.add(sender)
            self._metrics.load_failures.labels(FailureReason.REFUSED.value).inc()
            logger.error("cannot read from %s", error.message)

    def forget(self, peer: PeerId) -> None:
        """A peer is gone: when it comes back it is greeted again."""
        self._refused.discard(peer)

    def prefills(self) -> list[PeerId]:
        """The prefill workers that can be asked for prompts."""
        return [peer for peer in self._connector.peers() if peer not in self._ending and peer not in self._leaving]

    def holds(self, peer: PeerId) -> bool:
        """Whether a peer has KV of what ran on it, and nothing to compute."""
        return peer in self._ending

    def refusals(self) -> dict[PeerId, str]:
        """Those that cannot be read from, and why."""
        return {peer: self._connector.refusal(peer)[:MAX_TEXT] for peer in self._refused - self._ending}

    def choose(self, stream: Stream, avoid: PeerId = "") -> PeerId:
        """The peer for a stream: the one that the gateway chose, or a prefill worker; "" when there is none."""
        wanted = stream.request.prefill
        if not wanted:
            return ""
        if wanted not in (avoid, *self._leaving) and self._connector.connected(wanted):
            return wanted
        others = [peer for peer in self.prefills() if peer != avoid]
        return others[stream.order % len(others)] if others else ""
