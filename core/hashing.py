"""Content hashes of KV blocks: equal in every process and on every host.

A block's key is a 128-bit BLAKE2b over its parent's key and its token ids, so that a key names the whole prefix up to
and including the block. The root of the chain holds everything else that KV depends on: the model's fingerprint and the
tenant's salt. Nothing here uses Python's ``hash`` or the environment.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

BlockHash = bytes
"""16 bytes."""

HASH_BYTES = 16


def root_hash(fingerprint: str, salt: str = "") -> BlockHash:
    """The parent of every first block of a model and tenant."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, person=b"tandem-kv-root")
    for part in (fingerprint.encode(), salt.encode()):
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return digest.digest()


def block_hashes(tokens: Sequence[int], block_tokens: int, parent: BlockHash, start_block: int = 0) -> list[BlockHash]:
    """Keys of the full blocks of ``tokens`` from ``start_block`` on. `kernels.block_hashes` is sooner for many.

    Args:
        tokens: token ids, each in 0 … 2³²−1.
        block_tokens: tokens a block; a last partial block has no key.
        parent: the key before ``start_block``: `root_hash` for block 0.

    Returns:
        one 16-byte key a full block.
    """
    tokens = tokens[start_block * block_tokens : len(tokens) // block_tokens * block_tokens]
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    keys = []
    for at in range(0, len(packed), 4 * block_tokens):
        parent = hashlib.blake2b(parent + packed[at : at + 4 * block_tokens], digest_size=HASH_BYTES).digest()
        keys.append(parent)
    return keys


def split_hashes(data: bytes) -> list[BlockHash]:
    """Hashes that lie one after the other; a rest that is shorter than a hash is left out."""
    return [data[at : at + HASH_BYTES] for at in range(0, len(data) - HASH_BYTES + 1, HASH_BYTES)]
