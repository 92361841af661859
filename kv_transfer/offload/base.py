"""What every tier does: keep blocks by key, and say honestly which it has.

Threading: one thread, the engine's, calls every method of a tier. Bytes move on threads or in processes of the tier's
own, which call ``notify``, thread-safe and quick, whenever `Tier.poll` has something new. Nothing here raises because a
disk is full or a process is gone: the tier then has fewer blocks, and says so.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, overload

import numpy as np

from .keys import TierKey

Notify = Callable[[], None]


class Lookup(enum.IntEnum):
    """What a tier knows of a key."""

    MISS = 0
    PENDING = 1
    """It is being stored; ask again."""
    HIT = 2
    """It can be loaded. The load may still fail."""


class BlockMemory(Protocol):
    """Blocks that jobs copy from and to: an engine's cache, or a `Spill`. Called by tiers' threads, several at a time
    for different blocks."""

    block_bytes: int

    def read(self, blocks: Sequence[int], targets: Sequence[np.ndarray]) -> None:
        """Copy blocks into host memory, [block_bytes] uint8 each. Returns when the bytes are there."""
        ...

    def write(self, blocks: Sequence[int], sources: Sequence[np.ndarray]) -> None:
        """Copy host memory, [block_bytes] uint8 each, into blocks. Returns when the bytes are there."""
        ...


class SomeRows(Sequence[np.ndarray]):
    """Some blocks of a pool. Where each is, is computed for all at once: a thread that makes views one by one keeps the
    engine's from running.

    Args:
        array: [rows, block_bytes] uint8.
        rows: [blocks] int64.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self._array = array
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return SomeRows(self._array, self._rows[index])
        row: np.ndarray = self._array[self._rows[index]]
        return row

    def addresses(self) -> np.ndarray:
        """Of each block: [blocks] int64."""
        starts: np.ndarray = self._array.ctypes.data + self._rows * self._array.strides[0]
        return starts


def addresses_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Where arrays begin: [arrays] int64."""
    if isinstance(arrays, SomeRows):
        return arrays.addresses()
    return np.array([array.ctypes.data for array in arrays], np.int64)


class HostBlocks:
    """Blocks that lie one after the other in host memory.

    Args:
        array: [num_blocks * block_bytes] uint8.
        block_bytes: of each.
    """

    def __init__(self, array: np.ndarray, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.array = array.reshape(-1, block_bytes)
        self._address = self.array.ctypes.data
        # Imported here: a keeper has no blocks of its own, and does without compiled code.
        from ...kernels import copy_blocks

        self._copy = copy_blocks.native
        # What is compiled for copies is compiled now, not when the first block is wanted.
        self._copy(self._addresses([]), self._addresses([]), block_bytes)

    def read(self, blocks: Sequence[int], targets: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        self._copy(self._addresses(blocks), addresses_of(targets), self.block_bytes)

    def write(self, blocks: Sequence[int], sources: Sequence[np.ndarray]) -> None:
        """See `BlockMemory`."""
        self._copy(addresses_of(sources), self._addresses(blocks), self.block_bytes)

    def _addresses(self, blocks: Sequence[int]) -> np.ndarray:
        places = np.asarray(blocks, np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < len(self.array):
            raise IndexError(f"blocks {places.min()} to {places.max()} of {len(self.array)}")
        return self._address + places * self.block_bytes


class Spill:
    """Places for blocks between the cache or tier that gives them up and the next, and a bound on how many there are at
    a time. Thread-safe.

    Args:
        num_blocks: places.
        memory: of as many blocks; None where nothing is copied, as in a simulation.
    """

    def __init__(self, num_blocks: int, memory: HostBlocks | None) -> None:
        self.memory = memory
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Places that nobody holds."""
        return len(self._free)

    def take(self) -> int | None:
        """A free place, or None."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def give(self, place: int) -> None:
        """Give a place back."""
        self._free.append(place)


class Spilled(NamedTuple):
    """A block that a store pushed out, and the place of the `Spill` that holds it now. Whoever gets the result gives
    the place back."""

    key: TierKey
    place: int


class StoreJob(NamedTuple):
    """Blocks to be kept. The caller leaves them as they are until the job's result is there.

    The first keys get room first, and count as used last: of a prefix that does not fit, or that goes later, the
    beginning stays.
    """

    keys: Sequence[TierKey]
    """All different."""
    memory: BlockMemory | None
    """None where nothing is copied, as in a simulation."""
    blocks: Sequence[int]
    """Of `memory`, one a key."""
    priority: int = 0
    spill: Spill | None = None
    """Where blocks go that must make room; None: they are dropped."""


class LoadJob(NamedTuple):
    """Blocks to be copied from a tier. Nobody else touches the targets until the job's result is there."""

    keys: Sequence[TierKey]
    memory: BlockMemory | None
    blocks: Sequence[int]


class JobResult(NamedTuple):
    """How a job ended."""

    number: int
    good: tuple[bool, ...]
    """For each key: stored and to be found, or loaded and checked. Where not, a load's target holds anything."""
    error: str = ""
    """Why some are not good; "" also when the tier merely did not have them, or had no room."""
    spilled: tuple[Spilled, ...] = ()


class Change(NamedTuple):
    """What can be found in a tier has changed."""

    key: TierKey
    """b"": of all keys."""
    found: bool
    """Whether it can be found from now on."""


class _Busy:
    """For how long there was something to do."""

    def __init__(self) -> None:
        self._num_open = 0
        self._since_s = 0.0

    def begin(self, now_s: float) -> None:
        if not self._num_open:
            self._since_s = now_s
        self._num_open += 1

    def end(self, now_s: float) -> float:
        self._num_open -= 1
        return 0.0 if self._num_open else now_s - self._since_s


class TierStats:
    """What a tier counts. Changed by the tier alone."""

    def __init__(self) -> None:
        self.num_slots = 0
        self.num_used = 0
        self.stored = 0
        self.loaded = 0
        self.evicted = 0
        self.refused = 0
        """Blocks for which there was no room."""
        self.failures: Counter[str] = Counter()
        """Blocks that were not stored, or not found as promised, by cause."""
        self.away = ""
        """Why the tier answers nothing at present, or ""."""
        self.load_s = 0.0
        """For so long loads were under way."""
        self.store_s = 0.0
        self.oldest_at_s = 0.0
        """Wall clock when the oldest block was stored, or found there at the start; 0: unknown, or none is there."""
        self._loads = _Busy()
        self._stores = _Busy()

    def job_began(self, job: StoreJob | LoadJob, now_s: float) -> None:
        """A job is under way, from ``now_s`` on the monotonic clock."""
        (self._loads if isinstance(job, LoadJob) else self._stores).begin(now_s)

    def job_ended(self, job: StoreJob | LoadJob, now_s: float) -> None:
        """A job that began has ended."""
        if isinstance(job, LoadJob):
            self.load_s += self._loads.end(now_s)
        else:
            self.store_s += self._stores.end(now_s)


class Tier(Protocol):
    """Keeps blocks by key."""

    name: str
    shared: bool
    """By all workers of the node."""

    def lookup(self, keys: Sequence[TierKey]) -> list[Lookup]:
        """What it knows of some keys. Does no I/O and waits for nobody; counts as no use."""
        ...

    def submit_store(self, job: StoreJob) -> int:
        """Start to keep blocks, and return the job's number. Keys that it has are good at once."""
        ...

    def submit_load(self, job: LoadJob) -> int:
        """Start to copy blocks back, and return the job's number. Counts as a use of each."""
        ...

    def poll(self) -> list[JobResult]:
        """Drive progress, and return the jobs that ended since the last call. Does not block."""
        ...

    def touch(self, keys: Sequence[TierKey]) -> None:
        """Some keys were used, wherever; unknown ones are ignored. The last key counts as the oldest use."""
        ...

    def pin(self, keys: Sequence[TierKey]) -> None:
        """Do not give these up, as far as they are there, until as many calls of `unpin`, or this process's end."""
        ...

    def unpin(self, keys: Sequence[TierKey]) -> None:
        """Undo one `pin`."""
        ...

    def remove(self, keys: Sequence[TierKey]) -> None:
        """Forget keys. A load that has begun may still end well."""
        ...

    def clear(self, tenant: bytes | None = None) -> None:
        """Forget everything, or all keys with this `keys.tenant_tag`."""
        ...

    def watch(self) -> list[TierKey]:
        """The keys that can be found now; from now on `changes` are kept."""
        ...

    def changes(self) -> list[Change]:
        """What has changed since the last call, in order. Of a shared tier, what this process did."""
        ...

    def stats(self) -> TierStats:
        """What it counted so far; a live object."""
        ...

    def next_event_s(self) -> float | None:
        """When `poll` has something to do although nobody called ``notify``, on the clock's monotonic scale."""
        ...

    def close(self) -> None:
        """Wait for copies in flight, and let go of everything. Jobs in flight end in a last `poll`. Idempotent."""
        ...
