"""`tandem trace record`: what a gateway serves, as a trace."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from ...core.errors import ConfigError
from .kv import post


def record(output: Path, duration_s: float | None, max_requests: int, url: str, admin_key: str) -> None:
    """Start a recording, wait, end it, write the file. Blocks, until Ctrl-C at the latest.

    Raises:
        ConfigError: the file cannot be written; nothing was started.
        WorkerError: the gateway refuses.
    """
    try:
        output.touch()
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from None
    post(url, "/admin/trace/start", {"max_requests": max_requests}, admin_key)
    typer.echo(f"recording at {url}; " + ("stop with Ctrl-C" if duration_s is None else f"{duration_s:g} s"))
    end_s = None if duration_s is None else time.monotonic() + duration_s
    try:
        while end_s is None or time.monotonic() < end_s:
            time.sleep(1.0 if end_s is None else max(min(1.0, end_s - time.monotonic()), 0.0))
    except KeyboardInterrupt:
        typer.echo()
    lines = post(url, "/admin/trace/stop", {}, admin_key).content
    output.write_bytes(lines)
    typer.echo(f"{output}: {lines.count(bytes([10]))} requests; replay them with: tandem tune FILE --trace {output}")
