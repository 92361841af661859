"""Folders of disk tiers, before anything is written there: whose they are, and whether all tiers have room."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...core.config import OffloadTierConfig
from ...core.errors import ConfigError
from ...core.units import format_bytes

SLOT_FILE = "blocks.tandem"
"""In each worker's folder in a tier's."""
_CLAIM = "cluster"
_CLAIM_S = 2.0
_RETRY_S = 0.01


def claim(folder: Path, cluster: str) -> int:
    """Hold a folder for a cluster: its workers hold it together, those of another are turned away. Blocks a moment.

    Args:
        folder: there is one.
        cluster: a name that no other cluster has.

    Returns:
        a descriptor, which holds the folder until it is closed.

    Raises:
        ConfigError: workers of another cluster use it.
        OSError: it cannot be written to.
    """
    ours = cluster.encode()
    descriptor = os.open(folder / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until_s = time.monotonic() + _CLAIM_S
    try:
        while time.monotonic() < until_s:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, ours, 0)
            # Whoever is alone holds it alone for the time of a write; others may come between the two locks.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.pread(descriptor, len(ours) + 1, 0) == ours:
                    return descriptor
                break
            time.sleep(_RETRY_S)
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise ConfigError(f"path: {folder} is in use by another cluster", fix="give each cluster folders of its own")


def check_room(tiers: Sequence[OffloadTierConfig]) -> None:
    """See that a node's disks have room for all tiers together, what their files take already included.

    Raises:
        ConfigError: one has not; names the key of the tier that finds none.
    """
    free: dict[int, int] = {}
    needed: Counter[int] = Counter()
    for number, tier in enumerate(tiers):
        for path in tier.path:
            folder = Path(path).expanduser()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                device, room = folder.stat().st_dev, os.statvfs(folder)
                # First what is free: what another worker takes in between is then counted twice, rather than never.
                free.setdefault(device, room.f_bavail * room.f_frsize)
                taken = sum(file.stat().st_blocks * 512 for file in folder.glob(f"*/{SLOT_FILE}"))
            except OSError as error:
                raise ConfigError(
                    f"offload.tiers.{number}.path: {folder} cannot be written to: {error.strerror}"
                ) from None
            needed[device] += tier.capacity // len(tier.path) - taken
            if needed[device] > free[device]:
                raise ConfigError(
                    f"offload.tiers.{number}.capacity: {format_bytes(tier.capacity)}, and the file system of {folder} "
                    f"lacks {format_bytes(needed[device] - free[device])} for it",
                    fix="tiers with folders on one file system share its room",
                )
