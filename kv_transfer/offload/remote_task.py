"""What the process that serves a node's host tier is told, and how it is started. Knows nothing of transports."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import msgspec

from ...core.errors import ConfigError
from ...core.wire import ClusterKeys


class Task(msgspec.Struct, frozen=True):
    """What a server is to do."""

    path: str
    """Of the keeper's socket."""
    block_bytes: int
    address: str
    """Of this node; it listens there."""
    port: int
    """0: any that is free."""
    keys: ClusterKeys
    kv: str
    """The ``kv`` section, as JSON."""
    timeout_s: float
    """How long a request may be granted."""


def start_server(task: Task) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server, and return it with its endpoint. Blocks for the seconds that this takes. It ends when the
    process's standard input is closed, by us or by our death.

    Raises:
        ConfigError: it could not start; its log says why.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.remote_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    endpoint = ""
    with contextlib.suppress(OSError):
        process.stdin.write(msgspec.json.encode(task) + b"\n")
        process.stdin.flush()
        endpoint = process.stdout.readline().decode().strip()
    process.stdout.close()
    if not endpoint:
        process.stdin.close()
        raise ConfigError(
            f"a remote tier needs a socket at {task.address}:{task.port or '*'}, and its process ended with status "
            f"{process.wait()}",
            fix="see its last lines in the log",
        )
    return process, endpoint
