"""From the configuration to a worker's stack of tiers, and to the process that keeps its node's memory."""

from __future__ import annotations

import contextlib
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil

from ...core.clock import Clock
from ...core.config import OffloadConfig, OffloadTierConfig
from ...core.errors import ConfigError
from ...core.units import format_bytes
from .base import HostBlocks, Notify, Spill, Tier
from .disk import open_disk
from .folders import check_room, remove_strays
from .host import HostTier
from .keeper import start_keeper
from .objects import open_objects
from .pool import slots_within
from .stack import Level, OffloadStack, Write

if TYPE_CHECKING:
    from .network import Network

_SOCKET = "host.socket"
_CGROUPS = Path("/sys/fs/cgroup")


class Place(NamedTuple):
    """Whose stack it is. Workers of a node share its host tier; disk and objects are divided among them."""

    folder: Path
    """Where the node's workers meet; this user's alone."""
    worker: str
    """A name that is the same after a restart: "decode-0"."""
    num_workers: int
    """Of the node, that open stacks."""
    cluster: str = ""
    """A name that no other cluster has, and that a worker's next life still has; "": nobody else is there."""
    network: Network | None = None
    """For a remote tier."""
    workers: frozenset[str] = frozenset()
    """Names of all that the cluster has. What others left on disks is removed; empty: whoever was there may return."""


def host_socket(folder: Path) -> Path:
    """Where a node's keeper listens; see `Place`."""
    return folder / _SOCKET


def memory_bytes(groups: Path = _CGROUPS) -> int:
    """Of this node: of the host, or what the container may use (cgroups(7), either version) if that is less.

    Args:
        groups: where the cgroups are seen.
    """
    total = int(psutil.virtual_memory().total)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is no such group, or "max"
            total = min(total, int((groups / limit).read_text()))
    return total


def start_host_tier(
    config: OffloadConfig, block_bytes: int, folder: Path, cache_bytes: int = 0
) -> subprocess.Popen[bytes] | None:
    """Start the process that keeps a node's host tier; None: none is configured. To be started again when it dies.

    Args:
        config: which tiers.
        block_bytes: of a block, with the heads of all ranks.
        folder: see `Place`.
        cache_bytes: of the node's memory that KV caches take, as far as is known.

    Raises:
        ConfigError: the capacity is more than the node has beside caches, or less than a block; names the key.
    """
    for number, tier in enumerate(config.tiers):
        if tier.kind == "host":
            key, total = f"offload.tiers.{number}.capacity", memory_bytes()
            if tier.capacity + cache_bytes > total:
                caches = f", of which a worker's kv.capacity takes {format_bytes(cache_bytes)}" if cache_bytes else ""
                raise ConfigError(
                    f"{key}: {format_bytes(tier.capacity)}, and the node has {format_bytes(total)} of memory{caches}",
                    fix="leave room for the workers, too",
                )
            if not slots_within(tier.capacity, block_bytes):
                raise ConfigError(f"{key}: {format_bytes(tier.capacity)} holds no block of {format_bytes(block_bytes)}")
            return start_keeper(host_socket(folder), tier.capacity, block_bytes, tier.policy)
    return None


def open_stack(
    config: OffloadConfig,
    block_bytes: int,
    place: Place,
    clock: Clock,
    notify: Notify,
    pin: Callable[[np.ndarray], Callable[[], None]] | None = None,
) -> OffloadStack | None:
    """A worker's tiers; None: none are configured. Does not wait for any of them to be ready.

    Args:
        config: which.
        block_bytes: of a block, with the heads of all ranks.
        place: whose they are.
        clock: for deadlines.
        notify: called, on any thread, when `OffloadStack.poll` has something new.
        pin: see `HostTier`.

    Raises:
        ConfigError: a tier cannot be; names the key.
    """
    if not config.tiers:
        return None
    for number, tier in enumerate(config.tiers if place.workers else ()):
        for path in tier.path:
            try:
                remove_strays(Path(path).expanduser(), place.workers, place.cluster)
            except ConfigError as error:
                raise ConfigError(f"offload.tiers.{number}.{error.message}", fix=error.fix) from None
    check_room(config.tiers)
    levels: list[Level] = []
    try:
        for number, tier in enumerate(config.tiers):
            write = None if tier.kind == "remote" else Write(tier.write)
            levels.append(Level(_open(number, tier, block_bytes, place, clock, notify, pin), write))
    except ConfigError:
        for level in levels:
            level.tier.close()
        raise
    num_moving = config.moving // block_bytes
    memory = HostBlocks(np.zeros(num_moving * block_bytes, np.uint8), block_bytes)
    if pin is not None and num_moving:
        weakref.finalize(memory, pin(memory.array.reshape(-1))).atexit = False
    return OffloadStack(levels, Spill(num_moving, memory))


def _open(
    number: int,
    tier: OffloadTierConfig,
    block_bytes: int,
    place: Place,
    clock: Clock,
    notify: Notify,
    pin: Callable[[np.ndarray], Callable[[], None]] | None,
) -> Tier:
    name, capacity = f"{tier.kind}-{number}", tier.capacity // place.num_workers
    try:
        if tier.kind == "host":
            return HostTier(host_socket(place.folder), block_bytes, clock, tier.timeout_s, notify, pin, name)
        if tier.kind == "remote":
            # Imported here: who owns a host tier needs neither torch nor transports.
            from .remote import RemoteTier

            assert place.network is not None
            return RemoteTier(place.network, block_bytes, clock, tier.timeout_s, notify, name)
        if tier.kind == "disk":
            paths = [Path(path).expanduser() / place.worker for path in tier.path]
            return open_disk(
                paths, capacity, block_bytes, tier.policy, clock, tier.timeout_s, notify, name, place.cluster
            )
        return open_objects(
            str(tier.bucket),
            f"{tier.prefix}/{place.worker}",
            tier.endpoint,
            capacity,
            block_bytes,
            tier.policy,
            clock,
            tier.timeout_s,
            notify,
            name,
            place.cluster,
        )
    except ConfigError as error:
        raise ConfigError(f"offload.tiers.{number}.{error.message}", fix=error.fix) from None
