"""What a gateway knows of the KV that workers hold, from what they tell. Owned by one thread; nothing blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..core.hashing import root_hash, split_hashes
from ..core.ids import PeerId
from ..core.kv_messages import KVEvents, KVSnapshot, KVWatch
from ..core.messages import Membership, Message
from .prefix_index import PrefixIndex
from .prompt_hashes import PromptHashes


class Held(NamedTuple):
    """How much of a prompt a worker has, in tokens."""

    in_cache: int
    """In its prefix cache."""
    with_tiers: int
    """In its prefix cache and the tiers that it loads from."""


class _Kind(NamedTuple):
    """What hashes of a worker's blocks are made from."""

    fingerprint: str
    block_tokens: int


NOTHING = Held(0, 0)
_WITH_TIERS = "+"


class KVView:
    """See the module.

    Args:
        send: delivers a message to a worker.
        index: where it is kept.
    """

    def __init__(self, send: Callable[[PeerId, Message], None], index: PrefixIndex | None = None) -> None:
        self._send = send
        self._index = PrefixIndex() if index is None else index
        self._nodes: dict[PeerId, str] = {}
        self._kinds: dict[PeerId, _Kind] = {}
        self._all_kinds: set[_Kind] = set()
        self._next: dict[PeerId, int] = {}
        """Number of the next event of those whose snapshot has begun."""
        self._holders: dict[PeerId, set[str]] = {}

    def follow(self, membership: Membership) -> None:
        """Workers have come or gone."""
        self._nodes = {member.peer: member.node for member in membership.members}
        for peer in self._kinds.keys() - self._nodes.keys():
            self.forget(peer)

    def watch(self, peer: PeerId) -> None:
        """Ask a worker to tell what it holds. Whatever is on its way from before is void."""
        self._next.pop(peer, None)
        self._send(peer, KVWatch())

    def forget(self, peer: PeerId) -> None:
        """A worker is gone, and what it alone could reach."""
        self._next.pop(peer, None)
        self._kinds.pop(peer, None)
        self._all_kinds = set(self._kinds.values())
        holders = self._holders.pop(peer, set())
        for holder in holders - set().union(*self._holders.values()):
            self._index.forget(holder)
        self._index.reach(peer, ())
        self._index.reach(peer + _WITH_TIERS, ())

    def receive(self, peer: PeerId, message: KVSnapshot | KVEvents) -> None:
        """A worker tells what it holds, or what has changed."""
        if peer not in self._nodes:
            return
        holder = self._holder(peer, message.medium, message.shared)
        if isinstance(message, KVSnapshot):
            if message.first:
                for own in [own for own in self._holders.get(peer, ()) if own == peer or own.startswith(peer + "/")]:
                    self._index.forget(own)
                self._kinds[peer] = _Kind(message.fingerprint, message.block_tokens)
                self._all_kinds = set(self._kinds.values())
            self._next[peer] = message.next_number
            self._index.apply(holder, split_hashes(message.blocks), ())
        elif (expected := self._next.get(peer)) is None:
            return  # from before the snapshot that was asked for
        elif expected != message.first_number:
            self.watch(peer)
            return
        else:
            self._next[peer] = message.next_number
            if message.cleared:
                self._index.forget(holder)
            self._index.apply(holder, split_hashes(message.stored), split_hashes(message.removed))
        self._reach(peer, holder)

    def match(self, tokens: Sequence[int], salt: str) -> dict[PeerId, Held]:
        """The workers that have a prompt's beginning. Hashes the prompt about as far as anybody has it."""
        held: dict[PeerId, Held] = {}
        for kind in self._all_kinds:
            size = kind.block_tokens
            # A worker computes at least one token, and so uses one block less of a prompt that is whole blocks.
            num_blocks = max(0, len(tokens) - 1) // size
            lengths = self._index.match(PromptHashes(tokens, size, root_hash(kind.fingerprint, salt), num_blocks))
            for name in lengths:
                peer = name.removesuffix(_WITH_TIERS)
                if self._kinds.get(peer) == kind:
                    in_cache = lengths.get(peer, 0)
                    held[peer] = Held(in_cache * size, lengths.get(peer + _WITH_TIERS, in_cache) * size)
        return held

    def _holder(self, peer: PeerId, medium: str, shared: bool) -> str:
        if not medium:
            return peer
        return f"{self._nodes[peer] if shared else peer}/{medium}"

    def _reach(self, peer: PeerId, holder: str) -> None:
        holders = self._holders.setdefault(peer, set())
        if holder not in holders:
            holders.add(holder)
            self._index.reach(peer, [own for own in holders if own == peer])
            if len(holders) > 1:
                self._index.reach(peer + _WITH_TIERS, holders)
