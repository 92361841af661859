"""A disk that is slow for one process: the kernel lets a single read and a single write a second pass (cgroups)."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def why_not(folder: Path) -> str:
    """Why `slow_disk` cannot be had for what lies in a folder; "" if it can."""
    if os.geteuid():
        return "only root may throttle a disk"
    if not (_CGROUPS / "blkio").is_dir() and "io" not in _controllers():
        return "this kernel throttles no disks"
    if not Path(f"/sys/dev/block/{_device(folder)}").exists():
        return f"{folder} is on no disk"
    return ""


@contextlib.contextmanager
def slow_disk(pid: int, folder: Path) -> Iterator[None]:
    """While it lasts, a process's direct I/O on the disk that a folder is on takes seconds."""
    first = (_CGROUPS / "blkio").is_dir()
    root = _CGROUPS / "blkio" if first else _CGROUPS
    home = root / _home(pid, first).lstrip("/")
    group = root / f"tandem-test-{uuid.uuid4().hex}"
    if not first:
        (root / "cgroup.subtree_control").write_text("+io")
    group.mkdir()
    try:
        for name, slow, _ in _limits(first):
            (group / name).write_text(f"{_device(folder)} {slow}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        # What waits for its turn goes on at once.
        for name, _, fast in _limits(first):
            (group / name).write_text(f"{_device(folder)} {fast}")
        with contextlib.suppress(ProcessLookupError):
            (home / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _limits(first: bool) -> list[tuple[str, str, str]]:
    """File, what makes it slow, and what undoes that."""
    if first:
        return [(f"blkio.throttle.{kind}_iops_device", "1", "0") for kind in ("read", "write")]
    return [("io.max", "riops=1 wiops=1", "riops=max wiops=max")]


def _home(pid: int, first: bool) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (first and "blkio" in controllers.split(",")) or (not first and not controllers):
            return path
    return "/"


def _controllers() -> list[str]:
    path = _CGROUPS / "cgroup.controllers"
    return path.read_text().split() if path.exists() else []


def _device(folder: Path) -> str:
    number = folder.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"
