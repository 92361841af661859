"""Reads that travel in pieces: what waits, what is under way, what has ended.

The owner's thread opens, polls and cancels reads; a transport's own thread takes pieces and finishes them. A read has
ended when its last piece has, and only then may its target be used for something else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from ...core.ids import PeerId
from ...kernels import copy_runs
from ..layout import Runs
from .base import Notify, Read, Region, TransferResult, bytes_of, check_runs

MAX_RUNS = 1 << 16
"""Of one piece."""

_NOTHING = np.empty(0, np.uint8)


class Piece:
    """A part of a read that travels at once."""

    __slots__ = ("number", "read", "runs")

    def __init__(self, number: int, read: Read, runs: Runs) -> None:
        self.number = number
        self.read = read
        self.runs = runs


class _Open:
    """A read that has pieces outstanding."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.error = ""
        self.cancelled = False


class Pieces:
    """The reads of one transport. Thread-safe.

    Args:
        notify: called when `poll` has news.
        piece_bytes: most bytes of a piece.
    """

    def __init__(self, notify: Notify, piece_bytes: int) -> None:
        self._notify = notify
        self._piece_bytes = piece_bytes
        self._lock = threading.Lock()
        self._number = 0
        self._reads: dict[int, _Open] = {}
        self._queued: dict[PeerId, deque[Piece]] = {}
        self._done: list[TransferResult] = []

    def open(self, read: Read, error: str) -> int:
        """Number a read, and queue its pieces, or with an error end it at once."""
        pieces = [] if error else list(split_runs(read.runs, self._piece_bytes))
        with self._lock:
            self._number += 1
            number = self._number
            if pieces:
                self._reads[number] = _Open(len(pieces))
                self._queued.setdefault(read.peer, deque()).extend(Piece(number, read, runs) for runs in pieces)
            else:
                self._done.append(TransferResult(number, error))
        if not pieces:
            self._notify()
        return number

    def submit(self, read: Read, regions: dict[str, Region], *, reachable: bool) -> int:
        """`open` a read from a peer that checks its own end, with what is wrong at ours.

        Args:
            read: to be numbered.
            regions: ours, of the host's memory.
            reachable: whether the peer is there.
        """
        target = bytes_of(regions, read.target)
        if target is None:
            return self.open(read, f"there is no local region {read.target}")
        if not reachable:
            return self.open(read, f"{read.peer} is gone")
        return self.open(read, check_runs(read.runs, 1 << 62, len(target)))

    def poll(self) -> list[TransferResult]:
        """The reads that ended since the last call."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        """See `Transport.cancel`: what waits is dropped, what is under way drains."""
        wanted = set(numbers)
        draining = set()
        with self._lock:
            self._done = [result for result in self._done if result.number not in wanted]
            for peer, pieces in self._queued.items():
                for piece in pieces:
                    if piece.number in wanted:
                        self._reads[piece.number].pieces -= 1
                self._queued[peer] = deque(piece for piece in pieces if piece.number not in wanted)
            for number in wanted:
                read = self._reads.get(number)
                if read is None:
                    continue
                if read.pieces:
                    read.cancelled = True
                    draining.add(number)
                else:
                    del self._reads[number]
        return draining

    def waiting(self) -> list[PeerId]:
        """Peers that pieces wait for."""
        with self._lock:
            return [peer for peer, pieces in self._queued.items() if pieces]

    def take(self, peer: PeerId) -> Piece | None:
        """The next piece to read from a peer: now it is under way."""
        with self._lock:
            pieces = self._queued.get(peer)
            return pieces.popleft() if pieces else None

    def cancelled(self, piece: Piece) -> bool:
        """Whether nobody wants a piece's bytes any more."""
        with self._lock:
            read = self._reads.get(piece.number)
            return read is None or read.cancelled

    def finish(self, piece: Piece, error: str) -> None:
        """A piece that was under way has landed, or with an error never will."""
        with self._lock:
            ended = self._finish(piece, error)
        if ended:
            self._notify()

    def drop(self, peer: PeerId, error: str) -> None:
        """End what waits for a peer."""
        with self._lock:
            ended = [self._finish(piece, error) for piece in self._queued.pop(peer, ())]
        if any(ended):
            self._notify()

    def _finish(self, piece: Piece, error: str) -> bool:
        read = self._reads.get(piece.number)
        if read is None:
            return False
        read.pieces -= 1
        read.error = read.error or error
        if read.pieces:
            return False
        del self._reads[piece.number]
        self._done.append(TransferResult(piece.number, "cancelled" if read.cancelled else read.error))
        return True


def split_runs(runs: Runs, piece_bytes: int) -> Iterator[Runs]:
    """Cut runs into parts of at most ``piece_bytes`` and `MAX_RUNS` runs each, in order. Pure."""
    if len(runs.sizes) == 0:
        return
    ends = np.cumsum(runs.sizes)
    starts = ends - runs.sizes
    # Where a part begins, a run is cut in two.
    bounds = np.union1d(ends, np.arange(piece_bytes, int(ends[-1]), piece_bytes))
    firsts = np.concatenate([starts[:1], bounds[:-1]])
    run = np.searchsorted(ends, firsts, side="right")
    inside = firsts - starts[run]
    cut = Runs(runs.source_offsets[run] + inside, runs.target_offsets[run] + inside, bounds - firsts)
    edges = np.flatnonzero(np.diff(firsts // piece_bytes)) + 1
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(firsts)], strict=True):
        for start in range(first, last, MAX_RUNS):
            part = slice(start, min(start + MAX_RUNS, last))
            yield Runs(*(column[part] for column in cut))


def pack(
    regions: dict[str, Region], name: str, offsets: np.ndarray, sizes: np.ndarray, piece_bytes: int
) -> tuple[str, np.ndarray]:
    """Join the ranges that a peer asks for. Safe for any values; one range is given where it lies, without a copy.

    Args:
        regions: this process's.
        name: of a region.
        offsets: [n] int64.
        sizes: [m] int64.
        piece_bytes: most bytes that may be asked for at once.

    Returns:
        why not, or "", and [bytes] uint8.
    """
    source = bytes_of(regions, name)
    if source is None:
        return f"no region {name[:80]!r}", _NOTHING
    if len(offsets) != len(sizes) or not 0 < len(sizes) <= MAX_RUNS or int(sizes.max()) > piece_bytes:
        return "malformed ranges", _NOTHING
    target_offsets = np.cumsum(sizes) - sizes
    error = check_runs(Runs(offsets, target_offsets, sizes), len(source), piece_bytes)
    if error:
        return error, _NOTHING
    if len(sizes) == 1:
        return "", source[offsets[0] : offsets[0] + sizes[0]]
    payload = np.empty(int(sizes.sum()), np.uint8)
    copy_runs.native(source, payload, offsets, target_offsets, sizes)
    return "", payload


def octets(values: np.ndarray) -> bytes:
    """[n] int64, as a message carries it."""
    return values.astype("<i8").tobytes()


def integers(data: bytes) -> np.ndarray:
    """What `octets` made: [n] int64.

    Raises:
        ValueError: the length is none of whole integers.
    """
    return np.frombuffer(data, "<i8").astype(np.int64)
