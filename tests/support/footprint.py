"""What a process holds of the system: read from /proc, to see whether anything is left behind."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil

from .gateway import Gateway, wait_for


def held(process: psutil.Process) -> Counter[str]:
    """Descriptors by kind, mapped memory of peers, and threads of a process."""
    counts: Counter[str] = Counter()
    folder = Path(f"/proc/{process.pid}")
    for entry in os.listdir(folder / "fd"):
        try:
            target = os.readlink(folder / "fd" / entry)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("/memfd:") and "tandem" not in target:  # a library's own, for code that it made
            continue
        counts[re.sub(r"[^a-z_/]", "", target.partition(":")[0]) if ":" in target else "file"] += 1
    maps = (folder / "maps").read_text()
    counts["mapped"] = len(set(re.findall(r"/memfd:tandem-\w+", maps)))
    return counts


class Footprint:
    """What workers hold when they are idle: take it after a first request, and compare at the end.

    Args:
        gateway: whose blocks and leases must be back at zero.
        processes: of the workers.
    """

    def __init__(self, gateway: Gateway, processes: Iterable[psutil.Process]) -> None:
        self._gateway = gateway
        gateway.wait_idle(30)
        self._before = {process: held(process) for process in processes}
        self._shared = set(os.listdir("/dev/shm"))

    def check(self, timeout_s: float = 40) -> None:
        """All is as it was: blocks, leases, descriptors, sockets, mapped memory, /dev/shm. Waits for what takes time."""
        self._gateway.wait_idle(timeout_s)

        def grown() -> dict[str, Counter[str]]:
            alive = [process for process in self._before if process.is_running()]
            return {str(p.pid): more for p in alive if (more := held(p) - self._before[p])}

        try:
            wait_for(lambda: not grown(), timeout_s, "descriptors")
        except AssertionError:
            raise AssertionError(f"more than before: {grown()}") from None
        left = {name for name in set(os.listdir("/dev/shm")) - self._shared if "tandem" in name}
        assert not left, left
