"""What the first rank of a tensor-parallel worker tells the others: MessagePack over a socket that only they have."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import numpy as np

from ..core.frames import receive_frame
from ..core.wire import ClusterKeys
from ..kv_transfer.memory import SharedMemory
from .batch import StepInput
from .draws import Fill

MAX_FRAME_BYTES = 1 << 30
"""No step is as large: its numbers are a few for each token."""


class Task(msgspec.Struct, frozen=True, tag=True):
    """What to be, told first."""

    config: bytes
    """The cluster's, as JSON."""
    rank: int
    size: int
    rendezvous: str
    device: str
    max_running: int
    max_batched_tokens: int
    threads: int
    among: tuple[int, int] | None = None
    """Of the ranks that share experts, which meet at the rendezvous: the first rank's number, and how many there are.
    None: only those that share layers meet."""
    learned: bytes = b""
    """See `ExpertPlace`."""


class Built(msgspec.Struct, frozen=True, tag=True):
    """The follower's answer to a task, and the first rank's to all of these: as many blocks as every rank has room for.

    Or why there is no engine: ``error``.
    """

    num_blocks: int
    error: str = ""


class Holds(msgspec.Struct, frozen=True, tag=True):
    """Where a follower's KV is; told by it when it is built."""

    host: SharedMemory | None
    """None on a GPU, and where the system cannot share memory."""
    handle: bytes = b""
    """On a GPU, of an allocation (cudaIpcMemHandle_t)."""


class Capture(msgspec.Struct, frozen=True, tag=True):
    """Record the CUDA graphs."""


class Serve(msgspec.Struct, frozen=True, tag=True):
    """From now on ranks that share experts wait for each other no longer than in service."""


class Accompany(msgspec.Struct, frozen=True, tag=True):
    """Take part in the next step of the ranks that share experts, with no tokens."""


class CopyBlock(msgspec.Struct, frozen=True, tag=True):
    """Copy one block's KV to another."""

    source: int
    target: int


class PeerAccess(msgspec.Struct, frozen=True, tag=True):
    """From now on move KV, as the other socket orders. Told after `Capture`: opening transports may call what must not
    be called while a graph is recorded."""

    keys: ClusterKeys
    address: str
    """Of this host, where peers reach it."""


class Balance(msgspec.Struct, frozen=True, tag=True):
    """From now on experts move between steps, if the group's are to. Told after `Serve`; all ranks meet for it."""

    access: PeerAccess


class Array(msgspec.Struct, frozen=True, array_like=True):
    """Of numbers, C-contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Compute(msgspec.Struct, frozen=True, tag=True):
    """Compute a step; its log probabilities are the first rank's business."""

    arrays: list[Array]
    num_single: int
    num_draws: int
    greedy: bool
    adjusted: bool
    fills: list[tuple[int, list[int], list[int]]]
    eager: bool


Message = Task | Built | Holds | Capture | Serve | Accompany | CopyBlock | PeerAccess | Balance | Compute

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def encode_step(step: StepInput, eager: bool) -> bytes:
    """A step as a frame.

    Args:
        step: to be computed by all ranks.
        eager: without CUDA graphs.
    """
    arrays = [Array(name, a.dtype.str, a.shape, a.tobytes()) for name, a in step.arrays.items()]
    fills = [tuple(fill) for fill in step.fills]
    fields: Any = arrays, step.num_single, step.num_draws, step.greedy, step.adjusted, fills, eager
    return _encoder.encode(Compute(*fields))


def step_of(message: Compute) -> StepInput:
    """The step that a message holds."""
    arrays = {
        array.name: np.frombuffer(array.data, np.dtype(array.dtype)).reshape(array.shape).copy()
        for array in message.arrays
    }
    return StepInput(
        arrays,
        message.num_single,
        message.num_draws,
        message.greedy,
        message.adjusted,
        [Fill(*fill) for fill in message.fills],
        [],
        [],
        [],
    )


def encode(message: Message) -> bytes:
    """A message as a frame."""
    return _encoder.encode(message)


def receive(connection: socket.socket) -> Message:
    """Read a message. Blocks.

    Raises:
        EOFError: the other side is gone.
        ValueError: the frame is too long.
        msgspec.DecodeError: not a message.
    """
    return _decoder.decode(receive_frame(connection, MAX_FRAME_BYTES))
