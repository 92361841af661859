"""What nodes say to each other about their host tiers, over the cluster's authenticated sockets. Bytes of blocks travel
by a transport.

A reader sends `Ask`, and gets `News` when there are any, or after `HOLD_S`; then it asks again. For blocks it sends
`Request`, waits for `Grant`, lets its transport read, and sends `Release`, whose answer `Released` shows whether the
slots still hold what was wanted: it is made after the bytes have landed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .keys import KEY_BYTES
from .pool import RECORD_BYTES

HOLD_S = 1.0
MAX_CHANGES = 4096
MAX_KEYS = 512
"""Of one message."""
SLOTS = "slots"
"""The region that has the blocks."""

_Epoch = Annotated[str, Meta(max_length=64)]
_Number = Annotated[int, Meta(ge=0, le=1 << 60)]
_Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Keys = Annotated[list[_Key], Meta(max_length=MAX_KEYS)]
_Integers = Annotated[bytes, Meta(max_length=8 * MAX_CHANGES)]


class Ask(Struct, array_like=True, frozen=True, tag="ask"):
    """What came after a change of a pool, whose name is ``epoch``. The newest of a reader's questions counts."""

    epoch: _Epoch
    since: _Number


class Request(Struct, array_like=True, frozen=True, tag="request"):
    """May blocks be read now? Counts as a use of them."""

    number: _Number
    epoch: _Epoch
    keys: _Keys


class Release(Struct, array_like=True, frozen=True, tag="release"):
    """Nothing is read any more under a request. ``slots``: int64, little-endian, what the records of are wanted."""

    number: _Number
    epoch: _Epoch
    slots: Annotated[bytes, Meta(max_length=8 * MAX_KEYS)]


class Forget(Struct, array_like=True, frozen=True, tag="forget"):
    """Forget keys, or all of a tenant's, or (both None) everything. Answered by `Forgotten`."""

    number: _Number
    keys: _Keys | None
    tenant: Annotated[bytes, Meta(max_length=8)] | None


class News(Struct, array_like=True, frozen=True, tag="news"):
    """What changed after ``since``, and how the blocks can be read."""

    epoch: _Epoch
    """Another one than was asked about: this is another pool. "": there is none."""
    block_bytes: _Number
    slot_bytes: _Number
    num_slots: Annotated[int, Meta(ge=0, le=1 << 26)]
    transports: Annotated[
        dict[Annotated[str, Meta(max_length=64)], Annotated[bytes, Meta(max_length=1 << 20)]], Meta(max_length=16)
    ]
    """Name → descriptor."""
    since: _Number
    sequence: _Number
    slots: _Integers
    """int64, little-endian."""
    keys: Annotated[bytes, Meta(max_length=KEY_BYTES * MAX_CHANGES)]
    generations: _Integers
    """uint64, little-endian."""


class Grant(Struct, array_like=True, frozen=True, tag="grant"):
    """It may be read under a request."""

    number: _Number


class Released(Struct, array_like=True, frozen=True, tag="released"):
    """The records of the slots, see `pool.unchanged`; none if the pool is another one now."""

    number: _Number
    records: Annotated[bytes, Meta(max_length=RECORD_BYTES * MAX_KEYS)]


class Forgotten(Struct, array_like=True, frozen=True, tag="forgotten"):
    """It is done."""

    number: _Number


Question = Ask | Request | Release | Forget
Answer = News | Grant | Released | Forgotten

questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode
