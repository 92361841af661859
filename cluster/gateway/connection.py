"""A client's connection: uvicorn's, and a shorter way for streams, whose bodies are very many small parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LINGER_S = 5
"""For how long a connection without a request is kept by a gateway that leaves."""


def _nobody() -> None:
    pass


class Connection(HttpToolsProtocol):
    """Parts of a body can be written at once, from anywhere in the loop.

    ASGI's `send` is a coroutine, which waits for a slow client: a task has to be woken for each part. Who answers a
    request may instead begin the response by `send`, `write` unless the client `is_slow`, and end it by `send`.
    """

    is_slow = False
    """Whether more waits to be sent than a transport should hold: nothing may be written until `on_writable`."""
    on_writable: Callable[[], None] = staticmethod(_nobody)
    """Called when a client is slow no more."""
    _leaves = False

    def leave(self) -> None:
        """Let the client go without a request of his lost: the answer to his next one tells him that it is the last
        here, and one who sends nothing for a while is left alone."""
        self._leaves = True
        self.timeout_keep_alive = _LINGER_S
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(_LINGER_S, self.timeout_keep_alive_handler)
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        """A request is there to be answered."""
        super().on_headers_complete()
        if self._leaves and self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """The server ends: whoever does not `leave` ends as soon as he has what he waits for."""
        if not self._leaves:
            super().shutdown()

    def on_message_begin(self) -> None:
        """A request begins: it knows its connection."""
        super().on_message_begin()
        self.scope["state"]["connection"] = self

    def pause_writing(self) -> None:
        """The transport has no more room."""
        super().pause_writing()
        self.is_slow = True

    def resume_writing(self) -> None:
        """The transport has room again."""
        super().resume_writing()
        self.is_slow = False
        self.on_writable()

    def write(self, part: bytes) -> None:
        """Send a part, which is not empty, of a body without a declared length; to a client that is gone, nothing."""
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


def connection_of(scope: Scope) -> Connection:
    """The connection that a request came by."""
    connection: Connection = scope["state"]["connection"]
    return connection


class Outbox:
    """Parts for many connections, written one after the other once all that a turn of the loop makes are there.

    A host that gets a packet whenever one has been made is woken for each, and the writer pays for that. Belongs to
    the event loop.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Connection, bytes]] = []

    def put(self, connection: Connection, part: bytes) -> None:
        """Write a part soon: before any task that is woken from now on gets on."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._write)
        self._parts.append((connection, part))

    def _write(self) -> None:
        parts, self._parts = self._parts, []
        for connection, part in parts:
            connection.write(part)
