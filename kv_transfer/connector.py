"""A worker's end of the byte plane: who may be read from, by which transports, and the check that what landed is true.

A pull is the KV of some tokens in some layers. Each of our ranks reads its heads from those of the peer's ranks that
hold them, each pair by a transport of its own. When every byte has landed, the peer's generation numbers of the blocks
are read, from its first rank to our first: a block that was reused meanwhile has a new number, and its bytes are a
failure, never tokens. With checksums, what landed is summed too, and compared with what the peer computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ..core.clock import Clock
from ..core.errors import ConfigError, TransferError
from ..core.ids import PeerId, worker_of
from ..core.log import logger
from ..core.messages import (
    PROTOCOL_VERSION,
    CacheSpec,
    FailureReason,
    Hello,
    HelloReply,
    KVGroupSpec,
    RankSpec,
    Table,
)
from ..core.metrics import WorkerMetrics
from .checksums import sums_of_ranks, why_no_sums
from .ends import BLOCKS, GENERATIONS, End
from .fence import Fence
from .handshake import refusal
from .layout import DTYPE_BYTES, KVGroup, KVLayout, coalesce
from .peers import Link, Peer, Terms, link_peer
from .plan import merge, plan_copies
from .pull import Flying, Pull, Sums, blocks_of, side_of
from .sum_queue import Pending
from .transports import Read, Region

__all__ = ["BLOCKS", "GENERATIONS", "Connector", "End", "PullResult"]

_FENCE = "fence"


class PullResult(NamedTuple):
    """How a pull ended. ``failure`` is None when all its KV landed and was verified; else the KV of its first
    ``num_good`` tokens did."""

    number: int
    failure: FailureReason | None
    num_good: int
    num_bytes: int


class Connector:
    """One worker's connections. Owned by the engine thread; nothing here blocks.

    Args:
        peer: our own peer id.
        fingerprint: of the model.
        layout: of a rank's blocks: all ranks hold equally many heads.
        groups: layers that share blocks; a sequence has a table for each.
        layer_groups: first layer of each group that is published as one.
        ends: our ranks'; the first one's peers find the blocks' generations there.
        choice: "auto" or the transport to use.
        lease_s: how long we keep blocks for readers.
        clock: for durations.
        metrics: where transfers are counted.
        checksums: whether what we read is summed, and compared with what the peer computed.
        notify: called, by a thread, when `poll` has news of sums.

    Raises:
        ConfigError: checksums are wanted of memory that cannot be summed.
    """

    def __init__(
        self,
        peer: PeerId,
        fingerprint: str,
        layout: KVLayout,
        groups: Sequence[KVGroup],
        layer_groups: Sequence[int],
        ends: Sequence[End],
        choice: str,
        lease_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
        checksums: bool = False,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.groups = tuple(groups)
        self.layer_groups = list(layer_groups)
        self.peer = peer
        self._fingerprint = fingerprint
        self._ends = list(ends)
        self._choice = choice
        self._lease_s = lease_s
        self._clock = clock
        self._metrics = metrics
        self._no_sums = why_no_sums(ends)
        if checksums and self._no_sums:
            raise ConfigError(f"kv.checksums: {self._no_sums}", fix="leave it out")
        self._verify = checksums
        self._sums = None if self._no_sums else sums_of_ranks(self._ends, layout, self.groups, notify)
        if checksums and self._sums is not None:
            self._sums.warm_up()
        self._peers: dict[PeerId, Peer] = {}
        self._refused: dict[PeerId, str] = {}
        self._flying: dict[tuple[int, str, int], Flying] = {}
        self._fence = Fence()
        self._for_slots: deque[Pull] = deque()
        self._summed: list[tuple[Pull, Pending]] = []
        """Pulls whose bytes have landed, and what they are compared by."""
        self._pulls: dict[int, Pull] = {}
        self._number = 0
        self._ended: list[PullResult] = []
        for transport in self._ends[0].transports.values():
            transport.register(Region(_FENCE, self._fence.buffer))

    # ---- handshake --------------------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """What we tell a peer about ourselves."""
        layout = self.layout
        groups = [KVGroupSpec(list(group.layers), group.window) for group in self.groups]
        num_heads = max(end.heads.stop for end in self._ends)
        return Hello(
            protocol=PROTOCOL_VERSION,
            peer=self.peer,
            fingerprint=self._fingerprint,
            cache=CacheSpec(
                num_heads,
                layout.head_dim,
                layout.block_tokens,
                layout.dtype,
                layout.num_layers,
                groups,
                layout.num_parts,
            ),
            layer_groups=self.layer_groups,
            ranks=[
                RankSpec(
                    end.heads.start,
                    len(end.heads),
                    {name: transport.descriptor() for name, transport in end.transports.items()},
                    end.memory,
                )
                for end in self._ends
            ],
            lease_s=self._lease_s,
            no_sums=self._no_sums,
        )

    def answer(self, hello: Hello) -> HelloReply:
        """Our reply to a reader's hello: ourselves, and why we refuse, if we do. Counts nothing, keeps nothing."""
        ours = self.hello()
        return HelloReply(ours, refusal(reader=hello, source=ours)[:4000])

    def connect(self, reply: HelloReply) -> str:
        """Get ready to read from a peer that answered.

        Returns:
            the name of the transport, or the names, joined by "+".

        Raises:
            TransferError: it refused us, we refuse it, or no transport works between us; names the field and both
            values.
        """
        peer = reply.hello.peer
        reason = reply.refused or refusal(reader=self.hello(), source=reply.hello)
        if not reason:
            try:
                self._peers[peer] = link_peer(self.layout, self._ends, reply.hello, self._choice, self._verify)
            except TransferError as error:
                reason = error.message
        if reason:
            self._refused[peer] = reason
            raise TransferError(f"{peer}: {reason}", reason=FailureReason.REFUSED.value)
        logger.info("KV of %s comes by %s", peer, self.transport_of(peer))
        return self.transport_of(peer)

    def connected(self, peer: PeerId) -> bool:
        """Whether blocks can be read from a peer."""
        return peer in self._peers

    def refusal(self, peer: PeerId) -> str:
        """Why blocks can never be read from a peer, or ""."""
        return self._refused.get(peer, "")

    def peers(self) -> list[PeerId]:
        """The peers that we can read from."""
        return list(self._peers)

    def terms(self, peer: PeerId) -> Terms:
        """What a handoff from a connected peer depends on."""
        return self._peers[peer].terms

    def shortest_lease_s(self) -> float:
        """The shortest lease among our peers: how often to renew depends on it."""
        return min((peer.hello.lease_s for peer in self._peers.values()), default=self._lease_s)

    def transport_of(self, peer: PeerId) -> str:
        """The name of the transport to a peer, the names joined by "+" where its ranks have several, or ""."""
        known = self._peers.get(peer)
        return "+".join(dict.fromkeys(link.transport.name for link in known.links)) if known else ""

    def remove_peer(self, peer: PeerId) -> None:
        """Forget a peer; unfinished pulls from it fail."""
        self._refused.pop(peer, None)
        known = self._peers.pop(peer, None)
        if known is not None:
            for link in (*known.links, known.fence):
                link.transport.remove_peer(link.name)

    # ---- pulls ------------------------------------------------------------------------------------------------------

    def first_tokens(self, skip_tokens: int, num_tokens: int) -> list[int]:
        """For each KV group, the first token that must come when ``skip_tokens`` of ``num_tokens`` are here: a group
        with a window needs what the next token sees, in whole blocks."""
        size = self.layout.block_tokens
        return [max(skip_tokens, group.first_needed(num_tokens) // size * size) for group in self.groups]

    def pull(
        self,
        peer: PeerId,
        layer_group: int,
        tokens: range,
        local: Sequence[Sequence[int]],
        remote: Sequence[Table],
        skip_tokens: int,
        num_tokens: int,
        sums: np.ndarray | None = None,
    ) -> int:
        """Start reading the KV of some tokens in one layer group, and then verify it.

        Args:
            peer: a connected peer.
            layer_group: of the peer's.
            tokens: of the prompt.
            local: for each KV group, our blocks from the prompt's first on; nobody else writes there until the pull has
                ended.
            remote: for each KV group, the peer's, and the generations that they must still have when the bytes have
                landed.
            skip_tokens: of the prompt, those that we had before.
            num_tokens: of the prompt.
            sums: with checksums, what they must be: [units of the tokens] uint64; None fails the pull.

        Returns:
            the pull's number, in the results of `poll`.
        """
        self._number += 1
        known = self._peers.get(peer)
        if known is None:
            self._ended.append(PullResult(self._number, FailureReason.PEER_LOST, 0, 0))
            return self._number
        pull = self._pulls[self._number] = Pull(self._number, peer, known, tokens)
        layers = known.layers(layer_group)
        if self._verify:
            expected = np.empty(0, np.uint64) if sums is None else sums
            seen = [max(skip_tokens, group.first_needed(num_tokens)) for group in self.groups]
            pull.verify = Sums(expected, layers, [list(table) for table in local], seen)
        first_tokens = self.first_tokens(skip_tokens, num_tokens)
        wanted: list[tuple[range, range, Sequence[int], Table]] = []
        for group, ours, theirs, first in zip(self.groups, local, remote, first_tokens, strict=True):
            places, needed = group.places(layers), range(max(tokens.start, first), tokens.stop)
            if len(places) and len(needed):
                wanted.append((places, needed, ours, theirs))
        pull.blocks = blocks_of(known.terms.block_tokens, [(needed, theirs) for _, needed, _, theirs in wanted])
        for link in known.links:
            layout = self._layout_of(len(self._ends[link.rank].heads))
            parts = []
            for places, needed, ours, theirs in wanted:
                if link.layout.block_tokens == layout.block_tokens:  # the last block's end is worth nothing, and no cut
                    needed = range(needed.start, -(-needed.stop // layout.block_tokens) * layout.block_tokens)
                source = side_of(link.layout, link.first_head, theirs.first_token, theirs.blocks, needed)
                target = side_of(layout, self._ends[link.rank].heads.start, 0, ours, needed)
                parts.append(plan_copies(source, target, link.heads, places, needed))
            dtypes = link.layout.dtype, layout.dtype
            runs = merge(parts, (DTYPE_BYTES[dtypes[0]], DTYPE_BYTES[dtypes[1]]))
            if len(runs.sizes):
                pull.num_bytes += runs.num_bytes
                self._submit(pull, link, Read(link.name, BLOCKS, BLOCKS, runs, *dtypes), runs.num_bytes)
        if not pull.reads:
            self._end(pull)
        return self._number

    def poll(self) -> list[PullResult]:
        """Drive all transports, and return the pulls that ended. Does not block."""
        for rank, end in enumerate(self._ends):
            for name, transport in end.transports.items():
                for landed in transport.poll():
                    flying = self._flying.pop((rank, name, landed.number), None)
                    if flying is not None:
                        flying.pull.reads.discard((rank, name, landed.number))
                        self._landed(flying, landed.error)
        self._compare_sums()
        results, self._ended = self._ended, []
        return results

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        """Give pulls up. Returns those still draining, which `poll` will report; the others have ended."""
        wanted = set(numbers)
        self._ended = [result for result in self._ended if result.number not in wanted]
        draining = set()
        for number in wanted & self._pulls.keys():
            pull = self._pulls[number]
            pull.failure = pull.failure or FailureReason.TRANSPORT
            self._cancel_reads(pull)
            if pull.reads:
                draining.add(number)
            else:
                self._forget(pull)
        return draining

    @property
    def num_pulls(self) -> int:
        """Pulls in flight."""
        return len(self._pulls)

    def close(self) -> None:
        """Close all transports. Idempotent."""
        for end in self._ends:
            for transport in end.transports.values():
                transport.close()
        if self._sums is not None:
            self._sums.close()
        self._fence.buffer.close()

    # ---- checksums --------------------------------------------------------------------------------------------------

    def sums(
        self,
        layer_group: int,
        tokens: range,
        skip_tokens: int,
        num_tokens: int,
        tables: Sequence[Sequence[int]],
        unit: int,
        dtype: str,
    ) -> Callable[[], np.ndarray]:
        """Begin checksums of our own KV, for a reader of a prompt: of what the calling thread has had computed, or, on
        GPUs, queued.

        Args:
            layer_group: of ours.
            tokens: whole units, or to the prompt's end.
            skip_tokens: tokens that the reader has.
            num_tokens: of the prompt.
            tables: for each KV group, our blocks.
            unit: tokens of a checksum.
            dtype: the reader's.

        Returns:
            what returns them, [units] uint64, on any thread, and blocks until they are there; none where our memory
            cannot be summed.

        Raises:
            RuntimeError: a GPU does not take them.
        """
        if self._sums is None:
            return lambda: np.empty(0, np.uint64)
        first_tokens = [max(skip_tokens, group.first_needed(num_tokens)) for group in self.groups]
        starts = (*self.layer_groups, sum(len(group.layers) for group in self.groups))
        layers = range(starts[layer_group], starts[layer_group + 1])
        sums = self._sums
        pending = sums.start(tables, layers, tokens, first_tokens, unit, dtype, copies=False, behind_steps=True)
        return lambda: sums.total(pending.result())

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _layout_of(self, num_heads: int) -> KVLayout:
        return msgspec.structs.replace(self.layout, num_kv_heads=num_heads)

    def _submit(self, pull: Pull, link: Link, read: Read, num_bytes: int) -> None:
        key = link.rank, link.transport.name, link.transport.submit(read)
        pull.reads.add(key)
        now_s = self._clock.monotonic_s()
        self._flying[key] = Flying(pull, link.transport, num_bytes, len(read.runs.sizes), now_s)

    def _landed(self, flying: Flying, error: str) -> None:
        pull = flying.pull
        if error:
            logger.info("read from %s by %s failed: %s", pull.name, flying.transport.name, error)
            gone = pull.name not in self._peers
            pull.failure = pull.failure or (FailureReason.PEER_LOST if gone else FailureReason.TRANSPORT)
            self._cancel_reads(pull)
        elif flying.num_bytes:
            self._metrics.transferred(
                flying.transport.name,
                worker_of(pull.name),
                flying.num_bytes,
                flying.num_runs,
                self._clock.monotonic_s() - flying.start_s,
            )
        if pull.reads:
            return
        if pull.failure is None and len(pull.slots):
            self._compare(pull)
        if pull.failure is None and pull.num_fenced < pull.blocks.shape[1]:
            self._read_fence(pull)
        else:
            self._end(pull)

    def _cancel_reads(self, pull: Pull) -> None:
        for key in list(pull.reads):
            if not self._flying[key].transport.cancel([key[2]]):
                pull.reads.discard(key)
                del self._flying[key]

    def _read_fence(self, pull: Pull) -> None:
        """Ask for the generations of as many of a pull's blocks as there is room for; the others' turn comes."""
        pull.slots = self._fence.take(pull.blocks.shape[1] - pull.num_fenced)
        if len(pull.slots) == 0:
            self._for_slots.append(pull)
            return
        blocks = pull.blocks[0, pull.num_fenced : pull.num_fenced + len(pull.slots)]
        pull.num_fenced += len(pull.slots)
        size = np.full(len(blocks), 8, np.int64)
        link = pull.peer.fence
        self._submit(pull, link, Read(link.name, GENERATIONS, _FENCE, coalesce(blocks * 8, pull.slots * 8, size)), 0)

    def _compare(self, pull: Pull) -> None:
        part = slice(pull.num_fenced - len(pull.slots), pull.num_fenced)
        reused = self._return_slots(pull) != pull.blocks[1, part].view(np.uint64)
        if reused.any():
            pull.good_until = min(pull.good_until, int(pull.blocks[2, part][reused].min()))

    def _return_slots(self, pull: Pull) -> np.ndarray:
        values = self._fence.give_back(pull.slots)
        pull.slots = pull.slots[:0]
        while self._for_slots and self._fence.num_free:
            self._read_fence(self._for_slots.popleft())
        return values

    def _end(self, pull: Pull) -> None:
        """Nothing of a pull is on its way any more: it is over, once its sums are right."""
        if pull.failure is None and pull.good_until < pull.tokens.stop:
            pull.failure = FailureReason.GENERATION
        if pull.failure is None and pull.verify is not None and self._sums is not None:
            of, unit = pull.verify, pull.peer.terms.sum_tokens
            where = of.tables, of.layers, pull.tokens, of.first_tokens, unit, self.layout.dtype
            try:
                self._summed.append((pull, self._sums.start(*where, copies=True, behind_steps=False)))
                return
            except RuntimeError as error:
                logger.error("KV of %s, tokens %s, could not be summed: %s", pull.name, pull.tokens, error)
                pull.failure = FailureReason.TRANSPORT
        self._finish(pull)

    def _compare_sums(self) -> None:
        """End the pulls whose sums are there."""
        waiting, self._summed = self._summed, []
        for pull, pending in waiting:
            if pull.number not in self._pulls:  # given up
                continue
            try:
                if not pending.query():
                    self._summed.append((pull, pending))
                    continue
                self._verify_sums(pull, pending.result())
            except RuntimeError as error:  # the device is lost, as the next step will tell, too
                logger.error("KV of %s, tokens %s, could not be summed: %s", pull.name, pull.tokens, error)
                pull.failure = FailureReason.TRANSPORT
            self._finish(pull)

    def _verify_sums(self, pull: Pull, found: np.ndarray) -> None:
        assert self._sums is not None
        assert pull.verify is not None
        expected, unit = pull.verify.expected, pull.peer.terms.sum_tokens
        if found.shape[1] != len(expected):
            pull.failure, pull.good_until = FailureReason.CHECKSUM, 0
        elif not (right := self._sums.right(found, expected)).all():
            bad = int(right.argmin())
            pull.failure, pull.good_until = FailureReason.CHECKSUM, (pull.tokens.start // unit + bad) * unit
        if pull.failure is not None:
            logger.error("KV of %s, tokens %s, is not what was computed there", pull.name, pull.tokens)

    def _finish(self, pull: Pull) -> None:
        """A pull has ended."""
        self._forget(pull)
        num_good = 0
        if pull.failure in (None, FailureReason.GENERATION, FailureReason.CHECKSUM):  # all has landed
            num_good = max(0, min(pull.good_until, pull.tokens.stop) - pull.tokens.start)
        self._ended.append(PullResult(pull.number, pull.failure, num_good, pull.num_bytes))

    def _forget(self, pull: Pull) -> None:
        self._pulls.pop(pull.number, None)
        if pull in self._for_slots:
            self._for_slots.remove(pull)
        if len(pull.slots):
            self._return_slots(pull)
