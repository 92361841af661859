"""What a block is called in a tier: 32 bytes that are equal for equal content and differ for all else.

::

    block hash (16)          tenant (8)               layout (8)
    model, salt, tokens      the salt alone           shape, type, KV group

The hash alone is unique to model, tenant and tokens. The tenant stands in it once more so that all of a tenant's blocks
can be found and dropped; the layout, because the bytes of equal tokens differ between KV groups and types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ...core.hashing import HASH_BYTES, BlockHash
from ..layout import KVLayout

TierKey = bytes
"""32 bytes."""

KEY_BYTES = 32
_TAG_BYTES = 8
_TENANT = slice(HASH_BYTES, HASH_BYTES + _TAG_BYTES)


class KeySpace(NamedTuple):
    """The keys of one tenant and KV group."""

    suffix: bytes

    def of(self, hashes: Sequence[BlockHash]) -> list[TierKey]:
        """Keys of some blocks."""
        return [block_hash + self.suffix for block_hash in hashes]


def key_space(salt: str, layout: KVLayout, group: int = 0) -> KeySpace:
    """Where the blocks of one kind have their keys. Pure: equal on every host.

    Args:
        salt: the tenant's, as in `core.hashing.root_hash`.
        layout: of the blocks, with the heads of all ranks.
        group: index of the KV group whose layers the blocks hold.
    """
    fields = msgspec.msgpack.encode((msgspec.structs.astuple(layout), group))
    return KeySpace(
        tenant_tag(salt) + hashlib.blake2b(fields, digest_size=_TAG_BYTES, person=b"tandem-layout").digest()
    )


def tenant_tag(salt: str) -> bytes:
    """Which part of a key tells the tenant. 8 bytes."""
    return hashlib.blake2b(salt.encode(), digest_size=_TAG_BYTES, person=b"tandem-tenant").digest()


def tenant_of(key: TierKey) -> bytes:
    """The `tenant_tag` in a key."""
    return key[_TENANT]
