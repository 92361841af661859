"""How fast one plain TCP connection between two nodes is: what ZMQ can at best be there."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time

import msgspec

from ...kv_transfer.trial import Rate

_PIECE_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 5.0


class TcpPlace(msgspec.Struct, frozen=True):
    """Where a sender listens, and what it must be told."""

    address: str
    port: int
    token: bytes


class TcpSender:
    """Sends zeros to the first who connects with the token, for ``limit_s`` at most, and is gone.

    Args:
        address: of this node.
        num_bytes: to send.
        limit_s: how long it waits, and how long it sends.
    """

    def __init__(self, address: str, num_bytes: int, limit_s: float) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=1)
        self._listener.settimeout(limit_s)
        self.place = TcpPlace(address, self._listener.getsockname()[1], secrets.token_bytes(16))
        self._thread = threading.Thread(target=self._serve, args=(num_bytes, limit_s), name="doctor-tcp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._listener.close()

    def _serve(self, num_bytes: int, limit_s: float) -> None:
        piece = memoryview(bytes(_PIECE_BYTES))
        with contextlib.suppress(OSError), self._listener:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(limit_s)
                size = len(self.place.token)
                if not secrets.compare_digest(connection.recv(size, socket.MSG_WAITALL), self.place.token):
                    return
                for _ in range(-(-num_bytes // _PIECE_BYTES)):
                    connection.sendall(piece)


def receive(place: TcpPlace, limit_s: float) -> Rate:
    """Take what a `TcpSender` sends, for about ``limit_s`` at most. Blocks."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    num_bytes = 0
    try:
        with socket.create_connection((place.address, place.port), timeout=_CONNECT_TIMEOUT_S) as connection:
            connection.settimeout(limit_s)
            connection.sendall(place.token)
            start_s = time.perf_counter()
            while time.perf_counter() - start_s < limit_s and (count := connection.recv_into(buffer)):
                num_bytes += count
            return Rate(num_bytes, time.perf_counter() - start_s)
    except OSError as error:
        return Rate(0, 0.0, f"no TCP connection to {place.address}:{place.port}: {error.strerror or error}")
