"""What a worker's first rank asks of the process that moves another rank's KV, and what that answers.

MessagePack over a socket that only they have: `Order` one way, `News` the other.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from ..layout import Runs
from .base import Read

MAX_FRAME_BYTES = 256 << 20
"""Of one order: ten million ranges."""

Name = Annotated[str, Meta(max_length=256)]
MAX_TEXT = 4096
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Number = Annotated[int, Meta(ge=0)]
Descriptor = Annotated[bytes, Meta(max_length=1 << 20)]
Offsets = Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES // 3)]
"""[runs] int64, little-endian."""


class AddPeer(msgspec.Struct, frozen=True, tag=True):
    """Get ready to read from a peer; answered by `PeerAdded`."""

    transport: Name
    number: Number
    peer: Name
    descriptor: Descriptor


class RemovePeer(msgspec.Struct, frozen=True, tag=True):
    """Forget a peer; its reads end."""

    transport: Name
    peer: Name


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a read; answered by `Ended`."""

    transport: Name
    number: Number
    peer: Name
    source: Name
    target: Name
    source_offsets: Offsets
    target_offsets: Offsets
    sizes: Offsets
    dtypes: tuple[Name, ...]
    after: Number
    """Blocks that must have been copied before: the read may land where one of them was, or went to."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Give reads up; each that has not ended yet is answered by `Ended`, when nothing will be written for it."""

    transport: Name
    numbers: list[Number]


class Close(msgspec.Struct, frozen=True, tag=True):
    """Let go of a transport's memory; answered by `Closed`."""

    transport: Name


class Offer(msgspec.Struct, frozen=True):
    """A transport that works in the other process."""

    name: Name
    descriptor: Descriptor
    converts: bool
    memory: list[Name]


class Offers(msgspec.Struct, frozen=True, tag=True):
    """What there is, told first, or why there is nothing."""

    transports: Annotated[list[Offer], Meta(max_length=64)]
    error: Text = ""


class PeerAdded(msgspec.Struct, frozen=True, tag=True):
    """Whether a peer can be read from."""

    number: Number
    error: Text = ""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """Reads that ended, by number, with why they failed or ""."""

    transport: Name
    results: list[tuple[Number, Text]]


class Closed(msgspec.Struct, frozen=True, tag=True):
    """A transport writes no more."""

    transport: Name


class BadFrame(msgspec.Struct, frozen=True, tag=True):
    """A transport refused a frame from the network."""


Order = AddPeer | RemovePeer | Submit | Cancel | Close
News = Offers | PeerAdded | Ended | Closed | BadFrame

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_news: msgspec.msgpack.Decoder[News] = msgspec.msgpack.Decoder(News)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Order | News) -> bytes:
    """A message as a frame."""
    return _encoder.encode(message)


def decode_order(frame: bytes | bytearray) -> Order:
    """The order that a frame holds.

    Raises:
        msgspec.DecodeError: none.
    """
    return _orders.decode(frame)


def decode_news(frame: bytes | bytearray) -> News:
    """The news that a frame holds.

    Raises:
        msgspec.DecodeError: none.
    """
    return _news.decode(frame)


def submit_of(transport: str, number: int, read: Read, after: int) -> Submit:
    """The order to start a read.

    Args:
        transport: its name.
        number: the read's.
        read: what to read.
        after: blocks that must have been copied before.
    """
    source_offsets, target_offsets, sizes = (values.astype("<i8").tobytes() for values in read.runs)
    return Submit(
        transport=transport,
        number=number,
        peer=read.peer,
        source=read.source,
        target=read.target,
        source_offsets=source_offsets,
        target_offsets=target_offsets,
        sizes=sizes,
        dtypes=tuple(read[4:]),
        after=after,
    )  # fmt: skip


def read_of(order: Submit) -> Read:
    """The read that an order starts.

    Raises:
        ValueError: its ranges are malformed.
    """
    columns = (order.source_offsets, order.target_offsets, order.sizes)
    if len({len(column) for column in columns}) != 1:
        raise ValueError("offsets and sizes of a read differ in number")
    runs = Runs(*(np.frombuffer(column, "<i8").astype(np.int64) for column in columns))
    return Read(order.peer, order.source, order.target, runs, *order.dtypes)
