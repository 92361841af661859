"""Peers that can be read from: which of our ranks reads which heads from which of theirs, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ..core.errors import TransferError
from ..core.ids import PeerId
from ..core.messages import Hello
from .checksums import unit_of
from .ends import End
from .layout import KVLayout
from .plan import cover_heads
from .transports import PREFERENCE, Transport


class Terms(NamedTuple):
    """What a handoff from a peer depends on."""

    block_tokens: int
    """The peer's."""
    unit_tokens: int
    """What is read ends at multiples of this: a block of whichever end has larger ones, or, with checksums, whole
    blocks of both."""
    num_layer_groups: int
    """That the peer publishes."""
    sum_tokens: int
    """Tokens of a checksum; 0: there are none."""


class Link(NamedTuple):
    """How one of our ranks reads from one of a peer's."""

    rank: int
    """Ours."""
    name: PeerId
    """By which the transport knows the peer's rank."""
    transport: Transport
    heads: range
    layout: KVLayout
    """Of the peer's rank."""
    first_head: int
    """The peer's rank's."""


class Peer(NamedTuple):
    """A peer that we can read from."""

    hello: Hello
    links: list[Link]
    fence: Link
    terms: Terms

    def layers(self, layer_group: int) -> range:
        """The model's layers of a layer group of the peer's."""
        starts = self.hello.layer_groups
        num_layers = sum(len(group.layers) for group in self.hello.cache.groups)
        return range(starts[layer_group], (*starts, num_layers)[layer_group + 1])


def link_peer(layout: KVLayout, ends: Sequence[End], theirs: Hello, choice: str, checksums: bool) -> Peer:
    """Connect each of our ranks to those of a peer's that it reads from.

    Args:
        layout: of our ranks' blocks.
        ends: our ranks'.
        theirs: what the peer said; nothing in it is to be refused.
        choice: "auto" or the transport to use.
        checksums: whether what is read will be summed.

    Raises:
        TransferError: two ranks have no transport in common that works; says why each does not. Or the peer cannot sum
            what it sends.
    """
    spec, peer = theirs.cache, theirs.peer
    if checksums and theirs.no_sums:
        raise TransferError(f"kv.checksums: {peer} sends no sums: {theirs.no_sums}")
    offered = [range(rank.first_head, rank.first_head + rank.num_heads) for rank in theirs.ranks]
    links: list[Link] = []
    try:
        for rank, end in enumerate(ends):
            for peer_rank, heads in cover_heads(end.heads, offered, rank):
                kinds = {end.memory, theirs.ranks[peer_rank].memory}
                dtypes = spec.dtype, layout.dtype
                transport = _choose(end, theirs, peer_rank, choice, kinds, dtypes)
                held = msgspec.structs.replace(
                    layout,
                    num_kv_heads=len(offered[peer_rank]),
                    block_tokens=spec.block_tokens,
                    dtype=spec.dtype,
                )
                first = offered[peer_rank].start
                links.append(Link(rank, _name_of(peer, peer_rank), transport, heads, held, first))
        # Of equal heads the first rank reads the first rank's; small host regions travel by every transport.
        [fence] = {link.transport for link in links if link.rank == 0 and link.name == peer}
    except TransferError:
        for link in links:
            link.transport.remove_peer(link.name)
        raise
    blocks = layout.block_tokens, spec.block_tokens
    sum_tokens = unit_of(*blocks) if checksums else 0
    terms = Terms(spec.block_tokens, sum_tokens or max(blocks), len(theirs.layer_groups), sum_tokens)
    return Peer(theirs, links, Link(0, peer, fence, range(0), layout, 0), terms)


def _choose(
    end: End, theirs: Hello, peer_rank: int, choice: str, kinds: set[str], dtypes: tuple[str, str]
) -> Transport:
    """The first transport that moves such memory between two ranks, ready to use."""
    tried = []
    offered = theirs.ranks[peer_rank].transports
    for name in PREFERENCE if choice == "auto" else (choice,):
        transport = end.transports.get(name)
        if transport is None:
            tried.append(f"{name}: {end.missing.get(name, 'we do not offer it')}")
        elif name not in offered:
            tried.append(f"{name}: {theirs.peer} does not offer it")
        elif not kinds <= transport.memory:
            tried.append(f"{name}: does not move {' and '.join(sorted(kinds))} memory")
        elif dtypes[0] != dtypes[1] and not transport.converts:
            tried.append(f"{name}: does not convert {dtypes[0]} to {dtypes[1]}")
        else:
            try:
                transport.add_peer(_name_of(theirs.peer, peer_rank), offered[name])
            except TransferError as error:
                tried.append(f"{name}: {error.message}")
                continue
            return transport
    raise TransferError(f"kv.transport {choice}: nothing works with rank {peer_rank}: {'; '.join(tried)}")


def _name_of(peer: PeerId, rank: int) -> PeerId:
    """By which a transport knows one of a peer's ranks."""
    return f"{peer}/{rank}" if rank else peer
