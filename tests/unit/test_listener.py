"""The gateways' port, over real sockets: shared, and left without a connection that breaks."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gateway import free_port
from tandem.cluster.gateway.listener import BACKLOG, bind, hold_back, listen
from tandem.core.errors import ConfigError

HANDSHAKES_S = 0.2
CLIENTS = 6


def serve(listener: socket.socket, leave: threading.Event, *, held_back: bool) -> None:
    """Answer one byte to each connection, and leave when told: too slow to have nobody wait."""
    listener.settimeout(0.01)
    ends_s = float("inf")
    while time.monotonic() < ends_s:
        if leave.is_set() and ends_s == float("inf"):
            if held_back:
                hold_back(listener)
            ends_s = time.monotonic() + HANDSHAKES_S
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            connection.sendall(b"x")
            connection.close()
            time.sleep(0.001)
    listener.close()


def connect(port: int, over: threading.Event) -> tuple[int, int]:
    """Connect again and again; how often it went well, and how often not."""
    good = bad = 0
    while not over.is_set():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                good += client.recv(1) == b"x"
        except OSError:
            bad += 1
    return good, bad


def changes(times: int, *, held_back: bool) -> tuple[int, int]:
    """Have listeners follow each other on one port, under load; connections that went well, and others."""
    port, over = free_port(), threading.Event()

    def begin() -> tuple[threading.Thread, threading.Event]:
        listener, leave = bind("127.0.0.1", port), threading.Event()
        listener.listen(BACKLOG)
        thread = threading.Thread(target=serve, args=(listener, leave), kwargs={"held_back": held_back})
        thread.start()
        return thread, leave

    with ThreadPoolExecutor(CLIENTS) as clients:
        thread, leave = begin()
        counts = [clients.submit(connect, port, over) for _ in range(CLIENTS)]
        for _ in range(times):
            time.sleep(0.05)
            following = begin()
            leave.set()
            thread.join()
            thread, leave = following
        over.set()
        good, bad = (sum(count) for count in zip(*(count.result() for count in counts), strict=True))
        leave.set()
        thread.join()
    return good, bad


def test_a_listener_leaves_and_no_connection_breaks() -> None:
    good, bad = changes(10, held_back=True)
    assert good > 30
    assert bad == 0


def test_a_port_is_shared_by_those_who_share_and_by_nobody_else() -> None:
    port = free_port()
    with listen("127.0.0.1", port), pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind("127.0.0.1", port)
    with bind("127.0.0.1", port) as first, bind("127.0.0.1", port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)  # bound is not listening
        first.listen(BACKLOG)
        with pytest.raises(ConfigError, match="cannot listen"):
            listen("127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
