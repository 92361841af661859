"""The gateways' port: bound before anything is told where to find it, shared by gateways, and left without a connection
that is refused."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

from ...core.config import Config
from ...core.errors import ConfigError

BACKLOG = 2048
"""Connections that wait to be accepted."""
_SO_ATTACH_FILTER = 26
_NO_SYN = (
    (0x30, 0, 0, 13),  # the flags of the TCP header
    (0x54, 0, 0, 0x12),  # of these SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone:
    (0x06, 0, 0, 0),  # dropped
    (0x06, 0, 0, 0xFFFFFFFF),
)
"""A socket filter (man 7 socket): code, jump if true, jump if false, operand."""


def gateway_url(config: Config) -> str:
    """Where clients reach the gateway."""
    host, scheme = config.gateway.host, "https" if config.gateway.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.gateway.port}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that has the port for itself.

    Args:
        host: address.
        port: to listen on.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    return _opened(host, port, shared=False)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, and shares its port with others of this user that ask for the same
    (SO_REUSEPORT): the kernel gives each that listens a part of the connections.

    Args:
        host: address.
        port: to listen on.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    return _opened(host, port, shared=True)


def hold_back(listener: socket.socket) -> None:
    """Have no connection begin at a listening socket that will be closed, which breaks those that are not accepted yet.
    The kernel drops the first packet of each; a second later its client sends another, which comes to whoever
    listens on the port then. Connections that have begun go on. Where there are no socket filters, nothing happens."""
    program = b"".join(struct.pack("HBBI", *step) for step in _NO_SYN)
    buffer = ctypes.create_string_buffer(program)
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_NO_SYN), ctypes.addressof(buffer))
        )


def _opened(host: str, port: int, *, shared: bool) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if opened.family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind((host, port))
        if not shared:
            opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        other = port + 1 if port < 65535 else 8000
        raise ConfigError(
            f"gateway.port: cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}",
            fix=f"stop what uses it, or choose another with --set gateway.port={other}",
        ) from None
    return opened
