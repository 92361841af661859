"""TLS of servers that speak HTTP, and who needs none."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from ..core.errors import ConfigError


def tls_context(certificate: str | None, key: str | None, section: str) -> ssl.SSLContext | None:
    """For a server of HTTP/1 and HTTP/2, from TLS 1.2 on; None: no TLS. Reads two files.

    Args:
        certificate: a file with the certificate in PEM, those of its issuers behind it; None: no TLS.
        key: a file with its private key in PEM.
        section: of the configuration, for errors.

    Raises:
        ConfigError: they are no certificate and key.
    """
    if certificate is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(Path(certificate).expanduser(), Path(key).expanduser())
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{section}.tls_cert and tls_key: {error.strerror or error}", fix="give two PEM files that belong together"
        ) from None
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
