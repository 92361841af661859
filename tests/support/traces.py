"""What a run could leave on the machine, besides processes and ports."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .gateway import wait_for


class Traces:
    """What was there before a run: temporary folders of Tandem's, and shared memory without a process."""

    def __init__(self) -> None:
        self._before = _folders() | _orphans()

    def check(self, timeout_s: float = 10) -> None:
        """There is no more now. Waits for what takes time."""

        def left() -> set[str]:
            return (_folders() | _orphans()) - self._before

        try:
            wait_for(lambda: not left(), timeout_s, "traces")
        except AssertionError:
            raise AssertionError(f"left behind: {left()}") from None


def _folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("tandem-*")}


def _orphans() -> set[str]:
    """Shared memory that no process maps: it stays until somebody removes its name."""
    names = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    for process in Path("/proc").glob("[0-9]*") if names else ():
        try:
            mapped = (process / "maps").read_text()
        except OSError:  # it has just ended
            continue
        names = {name for name in names if f"/dev/shm/{name}" not in mapped}
    return names
