"""Messages about the KV that workers keep: what they hold, for routers. Part of `messages`."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from .bounds import MAX_TOKENS, Count, Name, Seconds, Text, TokenIds
from .hashing import HASH_BYTES

MAX_KV_HASHES: Final = 1 << 16
"""Block hashes of one message."""

KVHashes = Annotated[bytes, Meta(max_length=HASH_BYTES * MAX_KV_HASHES)]
"""Block hashes (`core.hashing`), one after the other."""


class KVReport(Struct, array_like=True, frozen=True):
    """What a worker's prefix cache, or one of its tiers, has done since the worker started."""

    medium: Name
    """A tier's name; "" for the prefix cache."""
    num_blocks: Count
    num_used: Count
    """Of the prefix cache, those in use and those that can be found."""
    lookups: Count
    """Blocks of prompts that it was asked for; of the prefix cache not counted."""
    hits: Count
    loaded_bytes: Count
    stored_bytes: Count
    load_s: Seconds
    """For so long loads were under way."""
    store_s: Seconds
    evicted: Count
    oldest_at_s: Seconds
    """Wall clock when the oldest block was stored; 0: unknown."""
    failures: Count
    """Blocks that were not stored, or not found as promised."""
    away: Name
    """Why it answers nothing at present, or ""."""


class KVClear(Struct, tag=True, frozen=True):
    """Gateway → worker: forget cached KV, in the prefix cache and in tiers. Answered by `KVControlled`."""

    number: Count
    salt: Name | None
    """The tenant's; None: everybody's."""


class KVPin(Struct, tag=True, frozen=True):
    """Gateway → worker: keep the KV of a prompt's full blocks, those that are computed later too. Answered likewise."""

    number: Count
    salt: Name
    tokens: Annotated[TokenIds, Meta(min_length=1)]
    ttl_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """For so long; 0: until `KVUnpin`, or the worker's end."""


class KVUnpin(Struct, tag=True, frozen=True):
    """Gateway → worker: undo a pin. Answered likewise."""

    number: Count
    salt: Name | None
    """None: undo all pins."""
    tokens: TokenIds
    """Empty: all pins of the tenant."""


class KVControlled(Struct, tag=True, frozen=True):
    """Worker → gateway: it is done, or why not."""

    number: Count
    num_blocks: Count
    """Blocks of the prefix cache that were cleared; blocks that were pinned, or are not any more."""
    error: Text = ""


class KVWatch(Struct, tag=True, frozen=True):
    """Gateway → worker: tell me which blocks you hold, and from then on what changes. Also after a gap."""


class KVSnapshot(Struct, tag=True, frozen=True):
    """Worker → gateway: what it holds, in as many parts as needed, all sent before the events that follow."""

    first: bool
    """The first part: what was told before is void."""
    next_number: Count
    """Of the first event that is not in it."""
    fingerprint: Name
    """Of the model, for `root_hash`."""
    block_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    medium: Name
    """Where these blocks are: "" for the worker's prefix cache, else a tier's name."""
    shared: bool
    """By all workers of the node."""
    blocks: KVHashes


class KVEvents(Struct, tag=True, frozen=True):
    """Worker → gateways that watch, about every 100 ms while anything changes: blocks that came and went."""

    first_number: Count
    """Events are numbered through a worker's life, whatever their medium: who finds a gap has missed some."""
    medium: Name
    shared: bool
    cleared: bool
    """Everything has gone, before the rest of this; an event too."""
    stored: KVHashes
    removed: KVHashes
    """None of which was stored again since."""

    @property
    def next_number(self) -> int:
        """Of the events that follow."""
        return self.first_number + self.cleared + (len(self.stored) + len(self.removed)) // HASH_BYTES
