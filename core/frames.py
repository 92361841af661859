"""Frames over a stream socket that two processes of one host inherit: a length, and so many bytes."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<Q")


def send_frame(connection: socket.socket, frame: bytes) -> None:
    """Write a frame. Blocks while the other side is behind.

    Raises:
        OSError: the other side is gone.
    """
    connection.sendall(_LENGTH.pack(len(frame)))
    connection.sendall(frame)


def receive_frame(connection: socket.socket, max_bytes: int) -> bytearray:
    """Read a frame. Blocks.

    Raises:
        EOFError: the other side is gone.
        OSError: so is the socket.
        ValueError: the frame is longer than ``max_bytes``; nothing more can be read.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > max_bytes:
        raise ValueError(f"a frame of {length} bytes, expected {max_bytes} at most")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data
