"""Tells gateways which blocks a worker's prefix cache and tiers hold.

The engine thread writes a key and a bool into a dict for each block that comes or goes; everything else is done about
ten times a second, for as many blocks as have changed. A block that came and went between two tellings costs no more
than one that stayed. As long as nobody has asked, nothing is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..core.clock import Clock
from ..core.hashing import HASH_BYTES, BlockHash
from ..core.ids import PeerId
from ..core.kv_messages import MAX_KV_HASHES, KVEvents, KVSnapshot
from ..core.messages import Message
from ..engine.block_pool import BlockPool
from ..kv_transfer.offload.stack import OffloadStack

PERIOD_S = 0.1
_FULL = 8192
"""So many changed blocks are told at once."""
_MOST_TOLD = 1 << 20
"""Of one medium, in a snapshot: what there is beyond goes untold."""


class KVPublisher:
    """See the module. Owned by the engine thread; nothing blocks.

    Args:
        pool: the prefix cache.
        stack: the tiers, if there are any.
        fingerprint: of the model, root of the block hashes.
        block_tokens: tokens of a block.
        clock: tells the time.
        send: delivers a message to a peer; never blocks.
    """

    def __init__(
        self,
        pool: BlockPool,
        stack: OffloadStack | None,
        fingerprint: str,
        block_tokens: int,
        clock: Clock,
        send: Callable[[PeerId, Message], None],
    ) -> None:
        self._pool = pool
        self._stack = stack
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._clock = clock
        self._send = send
        self._watchers: set[PeerId] = set()
        self._next_number = 0
        self._told_s = 0.0

    def watch(self, peer: PeerId) -> None:
        """A gateway wants to know: tell it all that is held."""
        self.publish()
        self._watchers.add(peer)
        held: list[tuple[str, bool, Sequence[bytes]]] = [("", False, self._pool.keys())]
        self._pool.journal = {}
        if self._stack is not None:
            held += [(tier.name, tier.shared, keys) for tier, keys in self._stack.watch()]
        first = True
        for medium, shared, keys in held:
            for blocks in _parts(_hashes(keys[:_MOST_TOLD])):
                self._send(
                    peer,
                    KVSnapshot(first, self._next_number, self._fingerprint, self._block_tokens, medium, shared, blocks),
                )
                first = False

    def forget(self, peer: PeerId) -> None:
        """A gateway is gone."""
        self._watchers.discard(peer)

    def next_due_s(self) -> float | None:
        """When `publish` should be called, on the monotonic clock; None: there is nothing to tell. Tiers' news are
        noticed when something else has woken the thread, as their results do."""
        journal = self._pool.journal
        if not journal:
            return None
        return 0.0 if len(journal) >= _FULL else self._told_s + PERIOD_S

    def poll(self, now_s: float) -> None:
        """`publish`, if it is time."""
        if self._pool.journal is None:
            return
        if len(self._pool.journal) >= _FULL or now_s >= self._told_s + PERIOD_S:
            self._told_s = now_s
            self.publish()

    def publish(self) -> None:
        """Tell what has changed."""
        if self._pool.journal is None:
            return
        if self._pool.journal:
            changes, self._pool.journal = self._pool.journal, {}
            self._tell("", False, False, changes)
        for tier, news in self._stack.changes() if self._stack is not None else ():
            if not news:
                continue
            start = max((n for n, change in enumerate(news, 1) if not change.key), default=0)
            tiered = {change.key: change.found for change in news[start:]}
            self._tell(tier.name, tier.shared, start > 0, tiered)

    def _tell(self, medium: str, shared: bool, cleared: bool, changes: dict[bytes, bool]) -> None:
        stored = _hashes(key for key, found in changes.items() if found)
        removed = _hashes(key for key, found in changes.items() if not found)
        if not (stored or removed or cleared):
            return
        # Blocks make way before others come: whoever has a bound on them has room.
        batches = [(part, b"") for part in _parts(removed) if part] + [(b"", part) for part in _parts(stored) if part]
        if len(stored) + len(removed) <= MAX_KV_HASHES:
            batches = [(b"".join(removed), b"".join(stored))]
        for gone, come in batches:
            events = KVEvents(self._next_number, medium, shared, cleared, come, gone)
            cleared = False
            self._next_number = events.next_number
            for watcher in self._watchers:
                self._send(watcher, events)


def _hashes(keys: Iterable[bytes]) -> list[BlockHash]:
    """What keys of the cache and of tiers begin with. Those of further KV groups, which the cache has under longer
    names, are left out: where the first group's blocks are, theirs have been."""
    return [key[:HASH_BYTES] for key in keys if len(key) != HASH_BYTES + 2]


def _parts(hashes: Sequence[BlockHash]) -> Iterator[bytes]:
    """As many as a message may have, joined; at least one."""
    for start in range(0, max(len(hashes), 1), MAX_KV_HASHES):
        yield b"".join(hashes[start : start + MAX_KV_HASHES])
