"""Folders of disk tiers, before anything is written there: whose they are, and whether all tiers have room."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from ...core.config import OffloadTierConfig
from ...core.errors import ConfigError
from ...core.log import logger
from ...core.units import format_bytes

SLOT_FILE = "blocks.tandem"
"""In each worker's folder in a tier's."""
LOCK_FILE = "lock"
"""Beside it; locked while a worker uses the folder."""
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


def remove_strays(folder: Path, workers: Collection[str], cluster: str) -> None:
    """Remove what workers left that the cluster no longer has: those that it has share the whole capacity. Blocks a
    moment.

    Args:
        folder: a tier's, in which each worker has one of its own.
        workers: names of all that the cluster has.
        cluster: see `claim`.

    Raises:
        ConfigError: workers of another cluster use the folder.
    """
    strays = [file.parent for file in folder.glob(f"*/{SLOT_FILE}") if file.parent.name not in workers]
    if not strays:
        return
    claimed = -1
    try:
        claimed = claim(folder, cluster)
        for stray in strays:
            _remove(stray)
    except OSError as error:
        logger.warning("%s: what workers left that are no more cannot be removed: %s", folder, error)
    finally:
        if claimed >= 0:
            os.close(claimed)


def _remove(stray: Path) -> None:
    lock = os.open(stray / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):  # it is still about to end
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in (SLOT_FILE, LOCK_FILE):
                (stray / name).unlink(missing_ok=True)
            stray.rmdir()
            logger.info("%s: removed, there is no such worker any more", stray)
    finally:
        os.close(lock)


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
