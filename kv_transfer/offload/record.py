"""A block as it is kept outside of memory: a header of 128 bytes, and the payload. What is torn, flipped or another
block's does not pass `check`.

Little-endian: magic (8 bytes), key (32), generation, payload's length, checksum of the payload, checksum of all that (8
each); zeros up to the payload. Checksums are XXH3 (https://github.com/Cyan4973/xxHash) or, on a machine without its
library, BLAKE2b, at a tenth of the speed; what was written with the other counts as missing.
"""

from __future__ import annotations

import hashlib
import struct
from types import ModuleType
from typing import NamedTuple

import numpy as np

from .keys import TierKey

try:
    import xxhash
except ImportError:
    xxhash = None  # type: ignore[assignment]

HEADER_BYTES = 128
MAGIC = b"tandemKV"
_FIELDS = struct.Struct("<8s32sQQQ")
_CHECK = struct.Struct("<Q")


class Header(NamedTuple):
    """What a record says of its payload."""

    key: TierKey
    generation: int
    num_bytes: int
    checksum: int


def digest_library() -> ModuleType | None:
    """Whose XXH3 checksums are; None: there is none, and they are BLAKE2b."""
    return xxhash


def seal(record: np.ndarray, key: TierKey, generation: int, num_bytes: int) -> None:
    """Write the header of a record whose payload is in place.

    Args:
        record: [HEADER_BYTES + num_bytes or more] uint8.
        key: of the block.
        generation: of its slot.
        num_bytes: of the payload.
    """
    payload = record[HEADER_BYTES : HEADER_BYTES + num_bytes]
    fields = _FIELDS.pack(MAGIC, key, generation, num_bytes, _digest(payload.data))
    fields += _CHECK.pack(_digest(fields))
    record[:HEADER_BYTES] = np.frombuffer(fields.ljust(HEADER_BYTES, b"\0"), np.uint8)


def read_header(record: bytes | np.ndarray) -> Header | None:
    """The header at the beginning of a record, or None: there is none that is whole."""
    head = bytes(record[: _FIELDS.size + _CHECK.size])
    if len(head) < _FIELDS.size + _CHECK.size or not head.startswith(MAGIC):
        return None
    fields = head[: _FIELDS.size]
    if _CHECK.unpack_from(head, _FIELDS.size)[0] != _digest(fields):
        return None
    return Header(*_FIELDS.unpack(fields)[1:])


def check(record: np.ndarray, key: TierKey, generation: int, num_bytes: int) -> tuple[str, str]:
    """Why a record is not the one that was written: a cause in a word, and a sentence; both empty if it is."""
    header = read_header(record)
    if header is None:
        return "torn", "a header is not whole"
    if (header.key, header.generation, header.num_bytes) != (key, generation, num_bytes):
        return "replaced", "a slot holds another block than expected"
    payload = record[HEADER_BYTES : HEADER_BYTES + num_bytes]
    if _digest(payload.data) != header.checksum:
        return "checksum", "a block's bytes are not those that were written"
    return "", ""


def _digest(data: memoryview | bytes) -> int:
    if xxhash is not None:
        return xxhash.xxh3_64_intdigest(data)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
