"""What engines and the keeper of the host tier say to each other: one message a packet of a Unix socket.

The engine asks, the keeper answers each question in order; `Touch` has no answer. Sizes are bounded by `MAX_KEYS`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from .keys import KEY_BYTES

VERSION = 1
MAX_KEYS = 512
"""Of one message."""
MAX_BYTES = 1 << 17

_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Keys = Annotated[list[_Key], msgspec.Meta(max_length=MAX_KEYS)]
_Slot = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
_Slots = Annotated[list[_Slot], msgspec.Meta(max_length=MAX_KEYS)]

NO_ROOM = -1
KNOWN = -2
PENDING = -3


class Attach(msgspec.Struct, array_like=True, frozen=True, tag="attach"):
    """First of all. Answered by `Attached`, with the two descriptors of the pool beside it."""

    version: int
    block_bytes: int


class Reserve(msgspec.Struct, array_like=True, frozen=True, tag="reserve"):
    """Slots for keys, in this order. Answered by `Reserved`."""

    keys: _Keys
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)]


class Settle(msgspec.Struct, array_like=True, frozen=True, tag="settle"):
    """Reserved slots that have their bytes, and some that will not get them. The last one counts as used last."""

    stored: _Slots
    dropped: _Slots


class Touch(msgspec.Struct, array_like=True, frozen=True, tag="touch"):
    """Keys that were used; the first most recently."""

    keys: _Keys


class Pin(msgspec.Struct, array_like=True, frozen=True, tag="pin"):
    """Keep keys, or (``on`` false) undo that. The socket's end undoes all."""

    keys: _Keys
    on: bool


class Remove(msgspec.Struct, array_like=True, frozen=True, tag="remove"):
    """Forget keys."""

    keys: _Keys


class Clear(msgspec.Struct, array_like=True, frozen=True, tag="clear"):
    """Forget everything, or one tenant's keys."""

    tenant: Annotated[bytes, msgspec.Meta(max_length=8)] | None


class Attached(msgspec.Struct, array_like=True, frozen=True, tag="attached"):
    """``error`` says why not; then no descriptors come."""

    error: str


class Reserved(msgspec.Struct, array_like=True, frozen=True, tag="reserved"):
    """For each key a slot, `NO_ROOM`, `KNOWN` (it is stored) or `PENDING` (another engine stores it); and what the slot
    held until now, or b""."""

    slots: list[int]
    evicted: list[bytes]


class Done(msgspec.Struct, array_like=True, frozen=True, tag="done"):
    """It is done."""


Question = Attach | Reserve | Settle | Touch | Pin | Remove | Clear
Answer = Attached | Reserved | Done

questions = msgspec.msgpack.Decoder(Question)
answers = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode
