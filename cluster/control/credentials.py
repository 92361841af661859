"""What a client needs to reach the operators' API: a file beside the logs that this user alone can read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from ...core.environment import cache_folder
from ...core.errors import ConfigError

NAME = "control.json"
_CONNECT_TIMEOUT_S = 2.0


class Credentials(msgspec.Struct, frozen=True):
    """Where the API is, what it asks for, and whom to trust."""

    address: str
    """HOST:PORT."""
    token: str
    certificate: str | None
    """PEM, of the server and its issuers; None: no TLS."""

    def __repr__(self) -> str:
        return f"Credentials({self.address!r}, …)"

    def write(self, path: Path) -> None:
        """Write the file, with mode 0600 from its first byte. Replaces an older one."""
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self))

    @classmethod
    def read(cls, path: Path) -> Credentials:
        """Raises ConfigError if the file is not there or says something else."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"{path}: cannot be read: {error}", fix=f"it is the {NAME} in the log folder of `tandem up`"
            ) from None

    @classmethod
    def find(cls) -> Credentials:
        """Those of this user's newest cluster that listens. Blocks for two seconds for each that is cut off.

        Raises:
            ConfigError: there is none.
        """
        for path in sorted(cache_folder().glob(f"logs/*/{NAME}"), reverse=True):
            found = cls.read(path)
            host, _, port = found.address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
            except (OSError, ValueError):
                continue  # what a killed cluster has left
            return found
        raise ConfigError(
            "no Tandem of this user listens to operators on this host",
            fix=f"`tandem serve` or `tandem up` starts one; --control FILE names the {NAME} of another host's",
        )
