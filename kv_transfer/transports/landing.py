"""Conversion for transports that only copy: bytes land in a bounded staging region, and elements go where they belong.

::

    peer's region ──transport──► staging (PIECE_BYTES a piece, PIECES at a time) ──convert──► target region

Reads whose dtypes are equal pass through untouched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from ...core.ids import PeerId
from ...kernels import convert_runs
from ..layout import DTYPE_BYTES, Runs
from ..memory import Buffer
from .base import Read, Region, TransferResult, Transport, check_runs

PIECE_BYTES = 1 << 20
PIECES = 16
_STAGING = "staging"


class _Piece:
    """A part of a converting read that lands at once. ``runs``: from staging, relative to its slot, to the target."""

    def __init__(self, owner: int, read: Read, source_offsets: np.ndarray, runs: Runs) -> None:
        self.owner = owner
        self.read = read
        self.source_offsets = source_offsets
        self.runs = runs
        self.slot = -1


class _Converting:
    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.error = ""


class Landing:
    """A `Transport` that converts, made of one that copies. Converts in `poll`, a piece in a millisecond or two.

    Args:
        inner: moves the bytes. Its regions are registered here.
        piece_bytes: of the source, a multiple of every element's size.
        pieces: on their way at a time.
    """

    converts = True

    def __init__(self, inner: Transport, piece_bytes: int = PIECE_BYTES, pieces: int = PIECES) -> None:
        self.name = inner.name
        self.memory = inner.memory
        self._inner = inner
        self._piece_bytes = piece_bytes
        self._staging = Buffer(piece_bytes * pieces)
        self._free = list(range(pieces))
        self._targets: dict[str, np.ndarray] = {}
        self._number = 0
        self._plain: dict[int, int] = {}
        """The transport's number of a read → ours."""
        self._flying: dict[int, _Piece] = {}
        """The transport's number of a read into staging → what it is a part of."""
        self._waiting: deque[_Piece] = deque()
        self._converting: dict[int, _Converting] = {}
        self._done: list[TransferResult] = []
        inner.register(Region(_STAGING, self._staging))

    def register(self, region: Region) -> None:
        if isinstance(region.buffer, Buffer):
            self._targets[region.name] = region.buffer.array
        self._inner.register(region)

    def descriptor(self) -> bytes:
        return self._inner.descriptor()

    def add_peer(self, peer: PeerId, descriptor: bytes) -> None:
        self._inner.add_peer(peer, descriptor)

    def remove_peer(self, peer: PeerId) -> None:
        self._inner.remove_peer(peer)

    def submit(self, read: Read) -> int:
        self._number += 1
        if not read.converts:
            self._plain[self._inner.submit(read)] = self._number
            return self._number
        error = self._refusal(read)
        pieces = [] if error else self._cut(read)
        if pieces:
            self._converting[self._number] = _Converting(len(pieces))
            self._waiting.extend(pieces)
            self._submit_pieces()
        else:
            self._done.append(TransferResult(self._number, error))
        return self._number

    def poll(self) -> list[TransferResult]:
        results, self._done = self._done, []
        for number, error in self._inner.poll():
            piece = self._flying.pop(number, None)
            if piece is not None:
                results += self._land(piece, error)
            elif number in self._plain:
                results.append(TransferResult(self._plain.pop(number), error))
        self._submit_pieces()
        return results

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        wanted = set(numbers)
        self._done = [result for result in self._done if result.number not in wanted]
        plain = {inner: ours for inner, ours in self._plain.items() if ours in wanted}
        draining = self._inner.cancel(plain)
        for inner in plain.keys() - draining:
            del self._plain[inner]
        # What still lands for a converting read lands in staging: its target is free at once.
        self._waiting = deque(piece for piece in self._waiting if piece.owner not in wanted)
        staged = [number for number, piece in self._flying.items() if piece.owner in wanted]
        for number in set(staged) - self._inner.cancel(staged):
            self._free.append(self._flying.pop(number).slot)
        for number in wanted:
            self._converting.pop(number, None)
        self._submit_pieces()
        return {plain[inner] for inner in draining}

    def close(self) -> None:
        self._inner.close()
        self._staging.close()

    def _refusal(self, read: Read) -> str:
        if not {read.source_dtype, read.target_dtype} <= DTYPE_BYTES.keys():
            return f"there is no conversion from {read.source_dtype} to {read.target_dtype}"
        target = self._targets.get(read.target)
        if target is None:
            return f"there is no local region {read.target}"
        sizes = read.runs.sizes // DTYPE_BYTES[read.source_dtype] * DTYPE_BYTES[read.target_dtype]
        return check_runs(read.runs._replace(sizes=sizes), 1 << 62, len(target))

    def _cut(self, read: Read) -> list[_Piece]:
        source, target, sizes = read.runs
        starts = np.cumsum(sizes) - sizes
        total = int(sizes.sum())
        edges = np.arange(0, total, self._piece_bytes)
        cuts = np.union1d(starts, edges)
        run = np.searchsorted(starts, cuts, side="right") - 1
        inside = cuts - starts[run]
        converted = inside // DTYPE_BYTES[read.source_dtype] * DTYPE_BYTES[read.target_dtype]
        lengths = np.diff(cuts, append=total)
        first = [*np.searchsorted(cuts, edges).tolist(), len(cuts)]
        pieces = []
        for edge, start, stop in zip(edges.tolist(), first, first[1:], strict=False):
            part = slice(start, stop)
            runs = Runs(cuts[part] - edge, (target[run] + converted)[part], lengths[part])
            pieces.append(_Piece(self._number, read, (source[run] + inside)[part], runs))
        return pieces

    def _submit_pieces(self) -> None:
        while self._waiting and self._free:
            piece = self._waiting.popleft()
            piece.slot = self._free.pop()
            runs = Runs(
                piece.source_offsets, piece.runs.source_offsets + piece.slot * self._piece_bytes, piece.runs.sizes
            )
            self._flying[self._inner.submit(Read(piece.read.peer, piece.read.source, _STAGING, runs))] = piece

    def _land(self, piece: _Piece, error: str) -> list[TransferResult]:
        read = self._converting.get(piece.owner)
        if read is not None and not (error or read.error):
            start = piece.slot * self._piece_bytes
            convert_runs.native(
                self._staging.array[start : start + self._piece_bytes], self._targets[piece.read.target], *piece.runs,
                piece.read.source_dtype, piece.read.target_dtype,
            )  # fmt: skip
        self._free.append(piece.slot)
        if read is None:  # cancelled
            return []
        read.error = read.error or error
        read.pieces -= 1
        if read.error:
            before = len(self._waiting)
            self._waiting = deque(other for other in self._waiting if other.owner != piece.owner)
            read.pieces -= before - len(self._waiting)
        if read.pieces:
            return []
        del self._converting[piece.owner]
        return [TransferResult(piece.owner, read.error)]
