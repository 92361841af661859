"""The gateway's listening socket: bound before anything is told where to find it."""

from __future__ import annotations

import socket

from ...core.config import Config
from ...core.errors import ConfigError


def gateway_url(config: Config) -> str:
    """Where clients reach the gateway."""
    host, scheme = config.gateway.host, "https" if config.gateway.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.gateway.port}"


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket.

    Args:
        host: address.
        port: to listen on.
        shared: with others of this user that ask for the same (SO_REUSEPORT): the kernel gives each a part of the
            connections.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=shared)
    except OSError as error:
        other = port + 1 if port < 65535 else 8000
        raise ConfigError(
            f"gateway.port: cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}",
            fix=f"stop what uses it, or choose another with --set gateway.port={other}",
        ) from None
