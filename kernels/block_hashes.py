"""Keys of KV blocks (`core.hashing`), compiled: a fourth of the time that a call of hashlib for each block takes.

BLAKE2b is RFC 7693's: unkeyed, 16 bytes long, without salt and person.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.hashing import HASH_BYTES, BlockHash
from ..core.hashing import block_hashes as reference
from .compiled import AVAILABLE, compiled

Words = NDArray[np.uint64]

_FEW = 6
"""So many blocks are hashed sooner without all this."""
_IV = np.array(
    [
        0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
        0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
    ],
    dtype=np.uint64,
)  # fmt: skip
_SCHEDULE = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
        [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
        [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
        [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
        [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
        [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
        [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
        [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
        [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    ],
    dtype=np.int64,
)


def chain(tokens: Sequence[int], block_tokens: int, parent: BlockHash) -> bytes:
    """Keys of the full blocks of ``tokens``, one after the other: 16 bytes each.

    Args:
        tokens: token ids, each in 0 … 2³²−1.
        block_tokens: tokens a block; a last partial block has no key.
        parent: the key of the block before them, or `root_hash`.
    """
    num_blocks = len(tokens) // block_tokens
    if num_blocks <= _FEW or block_tokens % 2 or not AVAILABLE:
        return b"".join(reference(tokens, block_tokens, parent))
    words = np.frombuffer(array("I", tokens[: num_blocks * block_tokens]), dtype=np.uint64)
    keys = bytearray(parent) + bytes(HASH_BYTES * num_blocks)
    _chain(words, block_tokens // 2, np.frombuffer(keys, dtype=np.uint64))
    return bytes(keys[HASH_BYTES:])


def prepare() -> None:
    """Compile it, or load it from the cache. Blocks, for half a second on a machine's first start."""
    chain(range(2 * _FEW + 2), 2, bytes(HASH_BYTES))


@compiled
def _chain(words: Words, block_words: int, keys: Words) -> None:
    """Write the keys of all blocks.

    Args:
        words: [blocks · block_words], two tokens each.
        block_words: of a block.
        keys: [2 + 2 · blocks]: the first block's parent, then what is written.
    """
    state, message = np.empty(8, dtype=np.uint64), np.empty(16, dtype=np.uint64)
    for block in range(len(words) // block_words):
        for at in range(8):
            state[at] = _IV[at]
        state[0] ^= np.uint64(0x01010000 ^ 16)
        message[0] = keys[2 * block]
        message[1] = keys[2 * block + 1]
        filled, num_bytes = 2, 0
        for word in words[block * block_words : (block + 1) * block_words]:
            if filled == 16:
                num_bytes += 128
                _compress(state, message, np.uint64(num_bytes), False)
                filled = 0
            message[filled] = word
            filled += 1
        message[filled:] = 0
        _compress(state, message, np.uint64(num_bytes + 8 * filled), True)
        keys[2 * block + 2] = state[0]
        keys[2 * block + 3] = state[1]


@compiled
def _compress(state: Words, message: Words, num_bytes: np.uint64, last: bool) -> None:
    """RFC 7693's F: 16 words go into the state, when ``num_bytes`` are in with them."""
    a0, a1, a2, a3, b0, b1, b2, b3 = state
    c0, c1, c2, c3, d0, d1, d2, d3 = _IV
    d0 ^= num_bytes
    if last:
        d2 = ~d2
    for r in range(12):
        s = _SCHEDULE[r]
        a0, b0, c0, d0 = _mix(a0, b0, c0, d0, message[s[0]], message[s[1]])
        a1, b1, c1, d1 = _mix(a1, b1, c1, d1, message[s[2]], message[s[3]])
        a2, b2, c2, d2 = _mix(a2, b2, c2, d2, message[s[4]], message[s[5]])
        a3, b3, c3, d3 = _mix(a3, b3, c3, d3, message[s[6]], message[s[7]])
        a0, b1, c2, d3 = _mix(a0, b1, c2, d3, message[s[8]], message[s[9]])
        a1, b2, c3, d0 = _mix(a1, b2, c3, d0, message[s[10]], message[s[11]])
        a2, b3, c0, d1 = _mix(a2, b3, c0, d1, message[s[12]], message[s[13]])
        a3, b0, c1, d2 = _mix(a3, b0, c1, d2, message[s[14]], message[s[15]])
    state[0] ^= a0 ^ c0
    state[1] ^= a1 ^ c1
    state[2] ^= a2 ^ c2
    state[3] ^= a3 ^ c3
    state[4] ^= b0 ^ d0
    state[5] ^= b1 ^ d1
    state[6] ^= b2 ^ d2
    state[7] ^= b3 ^ d3


@compiled
def _mix(
    a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64, x: np.uint64, y: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """RFC 7693's G."""
    a = a + b + x
    d ^= a
    d = (d >> np.uint64(32)) | (d << np.uint64(32))
    c = c + d
    b ^= c
    b = (b >> np.uint64(24)) | (b << np.uint64(40))
    a = a + b + y
    d ^= a
    d = (d >> np.uint64(16)) | (d << np.uint64(48))
    c = c + d
    b ^= c
    b = (b >> np.uint64(63)) | (b << np.uint64(1))
    return a, b, c, d
