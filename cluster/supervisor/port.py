"""One port for HTTP/1 and gRPC: a connection goes to the one or the other by its first bytes.

A client of HTTP/2 says "PRI * HTTP/2.0" before anything else (RFC 9113, 3.4), which is no request of HTTP/1. What
either server speaks passes through unread. They listen on the loopback address: sockets in a folder would outlive a
process that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib

from ...core.config import SupervisorConfig
from ...core.errors import ConfigError
from ..tls import tls_context

LOOPBACK = "127.0.0.1"
_PREFACE = b"PRI "
_HEAD_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 256
_CHUNK_BYTES = 1 << 16


class Port:
    """Belongs to one event loop.

    Args:
        http: port of the server for HTTP/1.
        grpc: port of the server for gRPC.
    """

    def __init__(self, http: int, grpc: int) -> None:
        self._http = http
        self._grpc = grpc
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, host: str, config: SupervisorConfig, port: int) -> int:
        """Bind and listen; returns the port.

        Args:
            host: the address to listen on.
            config: TLS.
            port: 0: any that is free.

        Raises:
            ConfigError: the port is taken, or the TLS files are no certificate and key.
        """
        tls = tls_context(config.tls_cert, config.tls_key, "supervisor")
        try:
            self._server = await asyncio.start_server(self._accept, host, port, ssl=tls)
        except OSError as error:
            raise ConfigError(
                f"supervisor.port: cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}",
                fix="stop what uses it, or leave supervisor.port out",
            ) from None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Idempotent."""
        if self._server is not None:
            self._server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # either side may leave at any time
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b""
        async with asyncio.timeout(_HEAD_TIMEOUT_S):
            while len(head) < len(_PREFACE) and _PREFACE.startswith(head):
                more = await reader.read(_CHUNK_BYTES)
                if not more:
                    return
                head += more
        port = self._grpc if head.startswith(_PREFACE) else self._http
        far_reader, far_writer = await asyncio.open_connection(LOOPBACK, port)
        try:
            far_writer.write(head)
            async with asyncio.TaskGroup() as group:
                there = group.create_task(_copy(reader, far_writer))
                await _copy(far_reader, writer)
                there.cancel()
        except* OSError:
            pass
        finally:
            far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError, NotImplementedError):
        writer.write_eof()
