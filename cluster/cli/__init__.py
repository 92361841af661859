"""The `tandem` command."""

from __future__ import annotations

import sys

from ...core.errors import TandemError


def main() -> None:
    """Run the command line; errors that we foresaw are one clear line, and exit status 1."""
    from .app import app

    try:
        app()
    except TandemError as error:
        print(f"tandem: {error.message}", file=sys.stderr)  # noqa: T201
        if error.fix:
            print(f"  fix: {error.fix}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
