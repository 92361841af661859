"""Blocks in a preallocated file of slots, read and written past the page cache (O_DIRECT, open(2)) where that works.

A slot is one record (`record`), written in one go. Nothing is flushed and nothing is journalled: a record that is not
whole, whatever happened to it, is found out when it is read, and counts as missing. After a start, however the last run
ended, the headers tell what is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...core.clock import Clock
from ...core.errors import ConfigError
from ...core.log import logger
from ...core.units import format_bytes
from .base import Notify, Tier
from .folders import LOCK_FILE, SLOT_FILE, claim
from .index import TierIndex
from .keys import TierKey
from .policies import make_policy
from .record import HEADER_BYTES, check, read_header, seal
from .striped import StripedTier
from .threaded import BadBlock, Frame, Lost, ThreadedTier

PAGE_BYTES = 4096
"""Of which O_DIRECT wants multiples, everywhere."""
THREADS_PER_PATH = 8
_SUPERBLOCK = struct.Struct("<8sIQQ")
_MAGIC = b"tandemKV"
_VERSION = 1
_SCANNERS = 8


def open_disk(
    paths: Sequence[Path],
    capacity_bytes: int,
    block_bytes: int,
    policy: str,
    clock: Clock,
    timeout_s: float,
    notify: Notify,
    name: str = "disk",
    cluster: str = "",
) -> Tier:
    """A tier over one or several folders, which share the blocks evenly. Takes the folders' locks; does not wait until
    what is there has been looked through.

    Args:
        paths: folders of this tier alone, made if they are not there.
        capacity_bytes: of all together, never exceeded.
        block_bytes: of a block.
        policy: one of `policies.POLICIES`.
        clock: for deadlines.
        timeout_s: after which a read or a write counts as failed.
        notify: see `base`.
        name: in logs and metrics.
        cluster: whose workers alone may use the folders' parents; see `folders.claim`. "": anybody.

    Raises:
        ConfigError: a folder cannot be written to, is in use by another tier, or has no room; or the capacity is less
            than a block for each folder.
    """
    slots = (capacity_bytes // len(paths) - PAGE_BYTES) // slot_bytes(block_bytes)
    if slots < 1:
        raise ConfigError(
            f"capacity: {format_bytes(capacity_bytes)} in {len(paths)} folders holds no block of "
            f"{format_bytes(block_bytes)} in each"
        )
    tiers: list[Tier] = []
    try:
        for path in paths:
            one = name if len(paths) == 1 else f"{name}:{path}"
            rule = make_policy(policy, slots)
            io = SlotFile(path, block_bytes, slots, cluster)
            tiers.append(ThreadedTier(one, TierIndex(slots, rule), io, THREADS_PER_PATH, clock, timeout_s, notify))
    except ConfigError:
        for tier in tiers:
            tier.close()
        raise
    return tiers[0] if len(tiers) == 1 else StripedTier(name, tiers)


def slot_bytes(block_bytes: int) -> int:
    """What a block takes on disk."""
    return -(-(HEADER_BYTES + block_bytes) // PAGE_BYTES) * PAGE_BYTES


class SlotFile:
    """See `BlockIO`: one folder's file.

    Args:
        folder: made if it is not there.
        block_bytes: of a block.
        num_slots: how many there are.
        cluster: see `open_disk`.

    Raises:
        ConfigError: see `open_disk`.
    """

    def __init__(self, folder: Path, block_bytes: int, num_slots: int, cluster: str = "") -> None:
        self.direct = True
        """Whether the page cache is passed by."""
        self._folder = folder
        self._path = folder / SLOT_FILE
        self._block_bytes = block_bytes
        self._slot_bytes = slot_bytes(block_bytes)
        self._num_slots = num_slots
        self._num_bytes = PAGE_BYTES + num_slots * self._slot_bytes
        self._descriptor = self._lock = self._claim = -1
        try:
            self._lock = self._take_folder(cluster)
        except ConfigError:
            self.close()
            raise

    def frame(self) -> Frame:
        """See `BlockIO`. Pages of its own, as O_DIRECT wants them aligned."""
        whole = np.frombuffer(mmap.mmap(-1, self._slot_bytes), np.uint8)
        return Frame(whole, whole[HEADER_BYTES : HEADER_BYTES + self._block_bytes])

    def write(self, slot: int, key: TierKey, generation: int, frame: Frame) -> None:
        """See `BlockIO`."""
        seal(frame.whole, key, generation, self._block_bytes)
        self._write(frame.whole.data, self._offset(slot))

    def read(self, slot: int, key: TierKey, generation: int, frame: Frame) -> None:
        """See `BlockIO`."""
        if self._read(frame.whole.data, self._offset(slot)) < len(frame.whole):
            raise BadBlock("truncated", f"{self._path} is shorter than it was")
        cause, detail = check(frame.whole, key, generation, self._block_bytes)
        if cause:
            raise BadBlock(cause, f"{self._path}: {detail}")

    def erase(self, slot: int, key: TierKey) -> None:
        """See `BlockIO`."""
        self._write(memoryview(mmap.mmap(-1, PAGE_BYTES)), self._offset(slot))

    def recover(self) -> Sequence[tuple[int, TierKey, int]]:
        """See `BlockIO`. A file of other blocks is begun anew."""
        descriptor = self._open()
        try:
            page = memoryview(mmap.mmap(-1, PAGE_BYTES))
            wanted = _SUPERBLOCK.pack(_MAGIC, _VERSION, self._block_bytes, self._num_slots)
            known = os.preadv(descriptor, [page], 0) == PAGE_BYTES and bytes(page[: len(wanted)]) == wanted
            if not known:
                os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, self._num_bytes)
            if not known:
                page[:] = wanted.ljust(PAGE_BYTES, b"\0")
                _complete(os.pwritev(descriptor, [page], 0), PAGE_BYTES)
        except OSError:
            os.close(descriptor)
            raise
        if self._descriptor < 0:
            self._descriptor = descriptor
        else:
            # Threads that still use the old file, whose space this frees, go on with this one.
            os.dup2(descriptor, self._descriptor, inheritable=False)
            os.close(descriptor)
        if not known:
            return []
        with ThreadPoolExecutor(_SCANNERS) as scanners:
            parts = scanners.map(self._scan, range(_SCANNERS))
            return [entry for part in parts for entry in part]

    def close(self) -> None:
        """See `BlockIO`. Gives the folder free."""
        for descriptor in (self._descriptor, self._lock, self._claim):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = self._claim = -1

    def _take_folder(self, cluster: str) -> int:
        lock = -1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if cluster:
                self._claim = claim(self._folder.parent, cluster)
            lock = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            room = os.statvfs(self._folder)
            free = room.f_bavail * room.f_frsize
            with contextlib.suppress(FileNotFoundError):
                free += self._path.stat().st_blocks * 512
        except OSError as error:
            if lock >= 0:
                os.close(lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and lock >= 0:
                raise ConfigError(
                    f"path: {self._folder} is in use by another tier", fix="give each tier folders of its own"
                ) from None
            raise ConfigError(f"path: {self._folder} cannot be written to: {error.strerror}") from None
        if free < self._num_bytes:
            os.close(lock)
            raise ConfigError(
                f"path: {self._folder} has {format_bytes(free)} free, {format_bytes(self._num_bytes)} are needed"
            )
        return lock

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        if self.direct:
            with contextlib.suppress(OSError):
                return self._try(os.open(self._path, flags | os.O_DIRECT, 0o600))
            self.direct = False
            logger.info("%s: the file system knows no O_DIRECT; blocks go through the page cache", self._folder)
        return os.open(self._path, flags, 0o600)

    def _try(self, descriptor: int) -> int:
        """Some file systems open for O_DIRECT what they then cannot read."""
        try:
            os.preadv(descriptor, [memoryview(mmap.mmap(-1, PAGE_BYTES))], 0)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _scan(self, part: int) -> list[tuple[int, TierKey, int]]:
        page = memoryview(mmap.mmap(-1, PAGE_BYTES))
        found = []
        for slot in range(part, self._num_slots, _SCANNERS):
            if os.preadv(self._descriptor, [page], self._offset(slot)) < PAGE_BYTES:
                continue
            header = read_header(bytes(page[:HEADER_BYTES]))
            if header is not None and header.num_bytes == self._block_bytes:
                found.append((slot, header.key, header.generation))
        return found

    def _offset(self, slot: int) -> int:
        return PAGE_BYTES + slot * self._slot_bytes

    def _read(self, memory: memoryview, offset: int) -> int:
        self._exists()
        done = 0
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            if count <= 0:
                break
            done += count
        return done

    def _write(self, memory: memoryview, offset: int) -> None:
        self._exists()
        done = 0
        while done < len(memory):
            done += _complete(os.pwritev(self._descriptor, [memory[done:]], offset + done), 1)

    def _exists(self) -> None:
        if os.fstat(self._descriptor).st_nlink == 0:
            raise Lost(errno.ENOENT, f"{self._path} was deleted")


def _complete(count: int, least: int) -> int:
    if count < least:
        raise OSError(errno.ENOSPC, "a write ended early")
    return count
