"""The end of a decode worker's life: streams whose KV another decode worker reads, and goes on with.

A worker that is about to end keeps a running stream at a step's end. The stream's KV is complete for the tokens that
the client has, and the next token is sampled but not sent: just what a prefill worker holds of a prompt. So the other
worker asks for it, reads it and releases it as it would a prompt's; and where that fails, it goes on as after a failed
handoff.
"""

from __future__ import annotations

from collections.abc import Callable

from ..core.clock import Clock
from ..core.errors import RequestError
from ..core.ids import PeerId, TransferId
from ..core.log import logger
from ..core.messages import (
    Accepted,
    BlocksReady,
    FailureReason,
    Hello,
    Membership,
    Prefill,
    Prefilled,
    PrefillFailed,
    Release,
    Renew,
    SampledToken,
    Table,
)
from ..core.metrics import WorkerMetrics
from ..engine.block_pool import BlockPool
from ..kv_transfer.connector import Connector
from ..kv_transfer.layout import DTYPE_BYTES
from ..kv_transfer.lease import LeaseTable
from .peers import Send
from .stream import Stream

_NOBODY = ""
"""Reader of the lease of a stream that nobody has asked for yet."""


class _Held:
    def __init__(self, stream: Stream, sample: SampledToken, transfer: TransferId) -> None:
        self.stream = stream
        self.sample = sample
        self.transfer = transfer


class Lender:
    """Owned by the engine thread; nothing blocks.

    Args:
        connector: describes our memory to readers.
        pool: has the generations of our blocks.
        block_tokens: of our blocks.
        lease_s: how long a stream is kept for a silent reader.
        clock: tells the time.
        metrics: counts.
        send: delivers a message to a peer.
        end: called with a stream that nobody reads any more.
    """

    def __init__(
        self,
        connector: Connector,
        pool: BlockPool,
        block_tokens: int,
        lease_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
        send: Send,
        end: Callable[[Stream], None],
    ) -> None:
        self._connector = connector
        self._pool = pool
        self._block_tokens = block_tokens
        self._metrics = metrics
        self._send = send
        self._end = end
        self._leases = LeaseTable(lease_s, clock)
        self._held: dict[TransferId, _Held] = {}
        self._number = 0
        self._greeted: set[PeerId] = set()
        self._others: set[PeerId] = set()
        """Decode workers that stay."""
        self._leaving = False

    def __len__(self) -> int:
        return len(self._held)

    @property
    def readers(self) -> list[PeerId]:
        """Who can take streams over; empty while this worker stays."""
        return sorted(self._greeted & self._others) if self._leaving else []

    @property
    def leaving(self) -> bool:
        """Whether this worker hands over what it has."""
        return self._leaving

    def follow(self, membership: Membership) -> None:
        """The members have changed."""
        here = self._connector.peer
        self._leaving = any(member.peer == here and member.hands_over for member in membership.members)
        self._others = {member.peer for member in membership.members if member.role == "decode" and member.ready}

    def hold(self, stream: Stream, sample: SampledToken) -> None:
        """Keep a stream, which takes part in no step any more, for whoever asks for it."""
        self._number += 1
        transfer = TransferId(_NOBODY, self._number)
        self._leases.grant(transfer)
        self._held[transfer] = _Held(stream, sample, transfer)

    def handle(self, sender: PeerId, message: Hello | Prefill | Renew | Release) -> None:
        """Take a reader's message in."""
        match message:
            case Hello():
                reply = self._connector.answer(message)
                self._send(sender, reply)
                if not reply.refused:
                    self._greeted.add(sender)
            case Prefill():
                self._lend(sender, message)
            case Renew():
                self._leases.renew(TransferId(sender, number) for number in message.numbers)
            case Release():
                for number in message.numbers:
                    self._close(TransferId(sender, number))

    def abort(self, gateway: PeerId, ticket: int, child: int) -> None:
        """The client of a stream that was handed over is gone, perhaps before anybody asked for it."""
        for held in list(self._held.values()):
            if held.stream.key == (gateway, ticket) and child in (-1, held.stream.children[0].index):
                self._close(held.transfer)

    def peer_lost(self, peer: PeerId) -> None:
        """A reader or a gateway is gone for good."""
        self._greeted.discard(peer)
        for held in list(self._held.values()):
            if peer in (held.transfer.reader, held.stream.gateway):
                self._close(held.transfer)

    def next_deadline_s(self) -> float | None:
        """When `tick` is due, on the monotonic clock."""
        return self._leases.next_deadline_s()

    def tick(self) -> None:
        """End the leases that nobody has renewed."""
        for transfer in self._leases.expire():
            held = self._held.pop(transfer)
            held.stream.log.warning("nobody took it over in time")
            self._metrics.lease_events.labels("expired").inc()
            if transfer.reader:
                message = "the reader gave no sign of life for the length of a lease"
                self._send(transfer.reader, PrefillFailed(transfer.number, FailureReason.EXPIRED, message))
            self._end(held.stream)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _lend(self, reader: PeerId, message: Prefill) -> None:
        """Tell a reader where a stream's KV is, that all of it may be read, and which token comes next."""
        try:
            held = self._find(message)
        except RequestError as error:
            # Not the client's fault: another source has the KV, or computes it.
            self._send(reader, PrefillFailed(message.number, FailureReason.EXPIRED, error.message[:4000]))
            return
        stream, number, skip = held.stream, message.number, message.skip_tokens
        self._leases.release(held.transfer)
        del self._held[held.transfer]
        held.transfer = TransferId(reader, number)
        self._leases.grant(held.transfer)
        self._metrics.lease_events.labels("granted").inc()
        self._leases.publish(held.transfer)
        self._held[held.transfer] = held
        size, num_tokens = self._block_tokens, stream.sequence.num_tokens
        tables = []
        for group, table in zip(self._connector.groups, stream.sequence.tables, strict=True):
            first = max(skip, group.first_needed(num_tokens)) // size
            blocks = table[first : -(-num_tokens // size)]
            tables.append(Table(first * size, blocks, self._pool.generations_of(blocks)))
        self._send(reader, Accepted(number, tables, num_tokens))
        for layer_group in range(len(self._connector.layer_groups)):
            first_sum, sums = 0, b""
            if message.sum_tokens:
                first_sum = skip // message.sum_tokens
                tokens = range(skip, num_tokens)
                summed = self._connector.sums(
                    layer_group, tokens, skip, num_tokens, stream.sequence.tables, message.sum_tokens, message.sum_dtype
                )
                sums = summed().astype("<u8").tobytes()
            self._send(reader, BlocksReady(number, layer_group, num_tokens, first_sum, sums))
        self._send(reader, Prefilled(number, [held.sample], 0.0, 0.0, 0.0))
        stream.log.info("%s takes it over, at %d tokens", reader, num_tokens)

    def _find(self, message: Prefill) -> _Held:
        """The stream that a reader asks for. What is read depends on tokens and salt alone, so these must be the same.

        Raises:
            RequestError: it is not here.
        """
        if message.sum_tokens and message.sum_dtype not in DTYPE_BYTES:
            raise RequestError(f"sum_dtype {message.sum_dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        for held in self._held.values():
            stream = held.stream
            if (
                not held.transfer.reader
                and stream.request.request_id == message.request_id
                and stream.children == message.children
                and stream.request.salt == message.salt
                and stream.request.sampling == message.sampling
                and stream.sequence.tokens == message.tokens
                and message.skip_tokens < len(message.tokens)
            ):
                return held
        logger.info("%s is not held here, at %d tokens", message.request_id, len(message.tokens))
        raise RequestError("this worker ends, and does not hold the sequence")

    def _close(self, transfer: TransferId) -> None:
        held = self._held.pop(transfer, None)
        if held is not None:
            self._leases.release(transfer)
            self._metrics.lease_events.labels("released").inc()
            self._end(held.stream)
