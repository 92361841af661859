"""Many records (`record`) of a file read and checked, or sealed and written, in one call without the GIL.

A fast disk reads 16 KiB in some ten microseconds; Python would spend more on it, with the GIL, which an engine needs.
So what is done for each record of a batch is compiled. The disk gets all of them at once, by io_submit(2), and those
that lie side by side as one: a disk, or what plays one for a virtual machine, takes about as long for 256 KiB as for
16. Checksums are those of the XXH3 in xxhash's own shared object, which is the one that `record` uses.

A record that could not be read or written, or is not what it should be, is left to the caller, who finds out why.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...kernels.compiled import AVAILABLE, compiled
from . import record
from .keys import KEY_BYTES, TierKey

_HEADER_WORDS = record.HEADER_BYTES // 8
_KEY, _GENERATION, _NUM_BYTES, _CHECKSUM, _CHECK = 1, 5, 6, 7, 8
"""Words of a header; see `record`."""
_MAGIC = int.from_bytes(record.MAGIC, "little")
_DIGESTS = ("XXH3_64bits_dispatch", "XXH3_64bits")
"""The one that chooses the processor's widest vectors, and the one that every build has."""
_SYMBOL = "tandem_xxh3_64"
_CALLS = {
    "x86_64": {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209},
    "aarch64": {"io_setup": 0, "io_destroy": 1, "io_getevents": 4, "io_submit": 2},
}.get(platform.machine() if sys.platform == "linux" else "", {})
"""Linux' asynchronous I/O: io_submit(2)."""
_SUBMIT, _GETEVENTS = _CALLS.get("io_submit", -1), _CALLS.get("io_getevents", -1)
_PREAD, _PWRITE = 0, 1
_RUN_BYTES = 2 << 20
"""Of records that lie side by side in the file, so much is one request to the disk; or one record, if that is more."""
_libc = ctypes.CDLL(None, use_errno=True)


def _digest_address() -> int:
    """Where the function is that computes XXH3 of memory, or 0: none can be called from compiled code."""
    xxhash: Any = record.digest_library()
    if not AVAILABLE or xxhash is None:
        return 0
    try:
        library = ctypes.CDLL(xxhash._xxhash.__file__)
    except (AttributeError, OSError):
        return 0
    for name in _DIGESTS:
        function: Any = getattr(library, name, None)
        if function is not None:
            function.restype, function.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_size_t)
            sample = bytes(range(250))
            if function(sample, len(sample)) == xxhash.xxh3_64_intdigest(sample):
                return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
    return 0


_ADDRESS = _digest_address()

_syscall: Any = None
_digest: Any = None
if _ADDRESS:
    import llvmlite.binding  # type: ignore[import-untyped]
    from numba import types

    # By name, as what is compiled is cached on disk, and the address is another in each process.
    llvmlite.binding.add_symbol(_SYMBOL, _ADDRESS)
    _syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 6))
    _digest = types.ExternalFunction(_SYMBOL, types.uint64(types.uintp, types.uintp))


def available() -> bool:
    """Whether there is a compiler, a checksum that it can call, and system calls that we know."""
    return bool(_ADDRESS) and record.digest_library() is not None and bool(_CALLS)


class Batch(NamedTuple):
    """Records of one size, where they are in a file and in memory."""

    offsets: np.ndarray
    """[records] int64: where each is in the file."""
    words: np.ndarray
    """[records or more, record bytes / 8] uint64: memory for each, aligned as the file wants it, without gaps."""
    headers: np.ndarray
    """[records, words of a header] uint64: what each header is to be, without checksums."""

    @classmethod
    def of(
        cls,
        offsets: np.ndarray,
        keys: Sequence[TierKey],
        generations: Sequence[int],
        num_bytes: int,
        words: np.ndarray,
    ) -> Batch:
        """Describe records.

        Args:
            offsets: see the fields.
            keys: of the blocks.
            generations: of their slots.
            num_bytes: of a payload.
            words: see the fields.
        """
        headers = np.zeros((len(keys), _HEADER_WORDS), np.uint64)
        headers[:, 0] = _MAGIC
        headers[:, _KEY:_GENERATION] = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, KEY_BYTES // 8)
        headers[:, _GENERATION] = generations
        headers[:, _NUM_BYTES] = num_bytes
        return cls(offsets, words, headers)


class Mover:
    """What one thread moves records with; nobody else uses it.

    Args:
        most: records at a time.

    Raises:
        OSError: the kernel has no asynchronous I/O for us.
    """

    def __init__(self, most: int) -> None:
        context = ctypes.c_ulong(0)
        if _libc.syscall(_CALLS["io_setup"], most, ctypes.byref(context)) != 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self._context = context.value

    def read(self, descriptor: int, batch: Batch, num_bytes: int) -> np.ndarray:
        """Read records, all at once, and check them. Blocks, without the GIL.

        Args:
            descriptor: of the file.
            batch: what is to be read; neighbours in the file that are so in the batch are read together.
            num_bytes: of a payload.

        Returns:
            [records] bool: whether each was read, is whole, and the one that was expected.
        """
        states = np.zeros(len(batch.offsets), np.bool_)
        _read(self._context, descriptor, *batch, states, num_bytes)
        return states

    def write(self, descriptor: int, batch: Batch, num_bytes: int) -> np.ndarray:
        """Put headers before payloads that are in place, and write the records, all at once. Blocks, without the GIL.

        Args:
            descriptor: see `read`, as the others.
            batch: what is to be written; payloads are there.
            num_bytes: of a payload.

        Returns:
            [records] bool: whether all of each was written; if not, its header is in place.
        """
        states = np.zeros(len(batch.offsets), np.bool_)
        _write(self._context, descriptor, *batch, states, num_bytes)
        return states

    def close(self) -> None:
        """Give it back. Idempotent."""
        if self._context:
            _libc.syscall(_CALLS["io_destroy"], ctypes.c_ulong(self._context))
            self._context = 0


def prepare() -> None:
    """Compile, or load what was compiled, now rather than with the first block. Blocks, a second or so at worst."""
    if available():
        nothing = Batch.of(np.zeros(0, np.int64), [], [], 0, np.zeros((0, _HEADER_WORDS), np.uint64))
        _read(0, -1, *nothing, np.zeros(0, np.bool_), 0)
        _write(0, -1, *nothing, np.zeros(0, np.bool_), 0)


@compiled
def _read(
    context: int,
    descriptor: int,
    offsets: np.ndarray,
    words: np.ndarray,
    headers: np.ndarray,
    states: np.ndarray,
    num_bytes: int,
) -> None:
    _move(context, _PREAD, descriptor, offsets, words, states)
    first, stride = words.ctypes.data, words.shape[1] * 8
    for i in range(len(offsets)):
        if states[i]:
            at = first + i * stride
            same = words[i, _CHECK] == _digest(at, 8 * _CHECK)
            for word in range(_CHECKSUM):
                same &= words[i, word] == headers[i, word]
            states[i] = same and words[i, _CHECKSUM] == _digest(at + 8 * _HEADER_WORDS, num_bytes)


@compiled
def _write(
    context: int,
    descriptor: int,
    offsets: np.ndarray,
    words: np.ndarray,
    headers: np.ndarray,
    states: np.ndarray,
    num_bytes: int,
) -> None:
    first, stride = words.ctypes.data, words.shape[1] * 8
    for i in range(len(offsets)):
        at = first + i * stride
        for word in range(_HEADER_WORDS):
            words[i, word] = headers[i, word]
        words[i, _CHECKSUM] = _digest(at + 8 * _HEADER_WORDS, num_bytes)
        words[i, _CHECK] = _digest(at, 8 * _CHECK)
    _move(context, _PWRITE, descriptor, offsets, words, states)


@compiled
def _move(
    context: int, operation: int, descriptor: int, offsets: np.ndarray, words: np.ndarray, states: np.ndarray
) -> None:
    """Move records, and wait for all; ``states`` tells which were moved whole.

    To be woken for each costs more than working on some while others are on their way would save.
    """
    first, stride = words.ctypes.data, words.shape[1] * 8
    # struct iocb of linux/aio_abi.h: number, -, operation and file, memory, bytes, offset.
    blocks = np.zeros((max(len(offsets), 1), 8), np.int64)
    pointers, events = np.empty(len(blocks), np.int64), np.empty((len(blocks), 4), np.int64)
    runs = 0
    for i in range(len(offsets)):
        if i and offsets[i] == offsets[i - 1] + stride and blocks[runs - 1, 4] + stride <= _RUN_BYTES:
            blocks[runs - 1, 4] += stride
            continue
        blocks[runs, 0] = runs
        blocks[runs, 2] = operation | (descriptor << 32)
        blocks[runs, 3] = first + i * stride
        blocks[runs, 4] = stride
        blocks[runs, 5] = offsets[i]
        pointers[runs] = blocks.ctypes.data + runs * 64
        runs += 1
    begun = 0
    while begun < runs:
        count = _syscall(_SUBMIT, context, runs - begun, pointers.ctypes.data + 8 * begun, 0, 0)
        if count <= 0:
            break
        begun += count
    while begun:
        count = _syscall(_GETEVENTS, context, begun, begun, events.ctypes.data, 0)
        for n in range(count):
            run = events[n, 0]
            if events[n, 2] == blocks[run, 4]:
                i = (blocks[run, 3] - first) // stride
                states[i : i + blocks[run, 4] // stride] = True
        begun -= max(count, 0)
