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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...core.clock import Clock
from ...core.errors import ConfigError
from ...core.log import logger
from ...core.units import format_bytes
from . import slot_moves
from .base import Notify, Tier
from .folders import LOCK_FILE, SLOT_FILE, claim
from .index import TierIndex
from .keys import TierKey
from .policies import make_policy
from .record import HEADER_BYTES, check, read_header, seal
from .slot_moves import Batch, Mover
from .striped import StripedTier
from .threaded import BadBlock, Frames, Lost, Outcome, Record, ThreadedTier, outcome_of

PAGE_BYTES = 4096
"""Of which O_DIRECT wants multiples, everywhere."""
THREADS_PER_PATH = 8
_BATCH_BYTES = 8 << 20
_BATCH_BLOCKS = 16
"""Which a thread reads or writes at a time, at most: as many as have so many bytes, and at least one."""
_SMALL_BATCH_BYTES = 2 << 20
_SMALL_BATCH_BLOCKS = 64
"""Of small slots it takes more: Python's part of a batch is then less than the disk's."""
_HUGE_PAGE_BYTES = 2 << 20
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


def batch_blocks(block_bytes: int) -> int:
    """How many blocks a thread reads or writes at a time."""
    if not slot_moves.available():
        return 1
    size = slot_bytes(block_bytes)
    small = min(_SMALL_BATCH_BYTES // size, _SMALL_BATCH_BLOCKS)
    return max(small, min(_BATCH_BYTES // size, _BATCH_BLOCKS), 1)


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
        slot_moves.prepare()
        self._descriptor = self._lock = self._claim = -1
        try:
            self._lock = self._take_folder(cluster)
        except ConfigError:
            self.close()
            raise

    def frames(self) -> Frames:
        """See `BlockIO`. Pages of its own, as O_DIRECT wants them aligned."""
        num_blocks = batch_blocks(self._block_bytes)
        whole = _huge_pages(num_blocks * self._slot_bytes).reshape(num_blocks, self._slot_bytes)
        return _SlotFrames(whole, self._block_bytes)

    def write(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """See `BlockIO`."""
        mover = self._mover(frames)
        if mover is None:
            return [outcome_of(self._write_one, records[0], frames.whole[0])]
        return self._move(mover.write, self._write_one, records, frames)

    def read(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """See `BlockIO`."""
        mover = self._mover(frames)
        if mover is None:
            return [outcome_of(self._read_one, records[0], frames.whole[0])]
        return self._move(mover.read, self._read_one, records, frames)

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

    def _mover(self, frames: Frames) -> Mover | None:
        """What moves several slots at a time; None: nothing does. Through the page cache, each would wait its turn."""
        return frames.mover if isinstance(frames, _SlotFrames) and self.direct and slot_moves.available() else None

    def _move(
        self,
        together: Callable[[int, Batch, int], np.ndarray],
        alone: Callable[[Record, np.ndarray], None],
        records: Sequence[Record],
        frames: Frames,
    ) -> Sequence[Outcome]:
        """All at once; then one by one those with which something was wrong, to find out what."""
        try:
            self._exists()
        except OSError as error:
            return [error] * len(records)
        slots, keys, generations = zip(*records, strict=True)
        offsets = PAGE_BYTES + np.array(slots, np.int64) * self._slot_bytes
        batch = Batch.of(offsets, keys, generations, self._block_bytes, frames.whole.view(np.uint64))
        states = together(self._descriptor, batch, self._block_bytes)
        if states.all():
            return [None] * len(states)
        return [
            None if good else outcome_of(alone, records[place], frames.whole[place])
            for place, good in enumerate(states.tolist())
        ]

    def _write_one(self, record: Record, whole: np.ndarray) -> None:
        seal(whole, record.key, record.generation, self._block_bytes)
        self._write(whole.data, self._offset(record.slot))

    def _read_one(self, record: Record, whole: np.ndarray) -> None:
        if self._read(whole.data, self._offset(record.slot)) < len(whole):
            raise BadBlock("truncated", f"{self._path} is shorter than it was")
        cause, detail = check(whole, record.key, record.generation, self._block_bytes)
        if cause:
            raise BadBlock(cause, f"{self._path}: {detail}")

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


def _huge_pages(num_bytes: int) -> np.ndarray:
    """Memory for O_DIRECT: [num_bytes] uint8. In huge pages, where the kernel has any: it looks each page up and hands
    it to the disk, which for 2 MiB in pages of 4 KiB takes longer than the disk does. Children of the process do not
    see it (open(2), "O_DIRECT").
    """
    whole = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    area = mmap.mmap(-1, whole + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError, AttributeError):
            area.madvise(getattr(mmap, advice))
    memory = np.frombuffer(area, np.uint8)
    first = -memory.ctypes.data % _HUGE_PAGE_BYTES
    return memory[first : first + num_bytes]


def _complete(count: int, least: int) -> int:
    if count < least:
        raise OSError(errno.ENOSPC, "a write ended early")
    return count


class _SlotFrames(Frames):
    """A thread's frames, and what moves them.

    Args:
        whole: [blocks, slot_bytes] uint8, aligned.
        block_bytes: of a payload.
    """

    def __init__(self, whole: np.ndarray, block_bytes: int) -> None:
        super().__init__(whole, HEADER_BYTES, block_bytes)
        self.mover: Mover | None = None
        if slot_moves.available():
            with contextlib.suppress(OSError):
                self.mover = Mover(len(whole))

    def __del__(self) -> None:
        if self.mover is not None:
            self.mover.close()
