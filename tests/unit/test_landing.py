"""Conversion in a small staging region: any pieces, cancelled, broken and refused reads."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.kernels import convert_runs
from tandem.kernels.convert_runs import DTYPES
from tandem.kv_transfer.layout import Runs, coalesce
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region, TransferResult
from tandem.kv_transfer.transports.inproc import InprocTransport
from tandem.kv_transfer.transports.landing import Landing

SIZE = 4096
PEER = "prefill-0#1"


class Slow(InprocTransport):
    """Ends a few reads at a time, in any order; some cannot be cancelled any more."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(lambda: None)
        self.rng = np.random.default_rng(seed)
        self.broken: set[int] = set()
        self.draining: dict[int, Read] = {}
        self.largest = 0

    def submit(self, read: Read) -> int:
        number = super().submit(read)
        self.largest = max(self.largest, len(self._pending))
        return number

    def poll(self) -> list[TransferResult]:
        chosen = [number for number in self._pending if self.rng.random() < 0.5]
        results = [
            TransferResult(n, "broken" if n in self.broken else self._copy(self._pending.pop(n))) for n in chosen
        ]
        for number in chosen:
            self._pending.pop(number, None)
        results += [TransferResult(number, "cancelled") for number in self.draining]
        self.draining.clear()
        return results

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        numbers = [number for number in numbers if number in self._pending]
        stuck = {number for number in numbers if number % 2}
        for number in numbers:
            read = self._pending.pop(number)
            if number in stuck:
                self.draining[number] = read
        return stuck


class Ends:
    """A reader that converts, and an owner."""

    def __init__(self, piece_bytes: int = 16, pieces: int = 3, seed: int = 0) -> None:
        self.owner = InprocTransport(lambda: None)
        self.source, self.target = Buffer(SIZE), Buffer(SIZE)
        self.source.array[:] = np.random.default_rng(seed).integers(0, 60, SIZE, np.uint8)
        self.owner.register(Region("blocks", self.source))
        self.slow = Slow(seed)
        self.reader = Landing(self.slow, piece_bytes, pieces)
        self.reader.register(Region("blocks", self.target))
        self.reader.add_peer(PEER, self.owner.descriptor())

    def read(self, runs: Runs, source: str = "float32", target: str = "float16") -> int:
        return self.reader.submit(Read(PEER, "blocks", "blocks", runs, source, target))

    def close(self) -> None:
        for end in (self.owner, self.reader, self.source, self.target):
            end.close()

    def finish(self) -> dict[int, str]:
        results: dict[int, str] = {}
        for _ in range(10_000):
            for number, error in self.reader.poll():
                assert number not in results, "it ended twice"
                results[number] = error
            if not (self.reader._plain or self.reader._converting or self.reader._flying or self.reader._done):
                break
        return results


def spread(rng: np.random.Generator, dtypes: tuple[str, str], count: int) -> Runs:
    """Ranges of whole elements, apart at both ends."""
    slots = rng.permutation(32)[:count], rng.permutation(32)[:count]
    sizes = rng.integers(1, 33, count) * DTYPES[dtypes[0]].itemsize
    scale = DTYPES[dtypes[0]].itemsize, DTYPES[dtypes[1]].itemsize
    return coalesce(slots[0] * 128, slots[1] * 128, sizes, scale)


names = st.sampled_from(sorted(DTYPES))


@given(names, names, st.integers(0, 32), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_elements_land_converted_and_nowhere_else(
    source: str, target: str, count: int, piece_words: int, pieces: int, seed: int
) -> None:
    ends = Ends(4 * piece_words, pieces, seed)
    runs = spread(np.random.default_rng(seed), (source, target), count)
    expected = ends.target.array.copy()
    convert_runs.reference(ends.source.array, expected, *runs, source, target)
    number = ends.read(runs, source, target)
    assert ends.finish() == {number: ""}
    np.testing.assert_array_equal(ends.target.array, expected)
    assert source == target or ends.slow.largest <= pieces, "more on its way than there is room for"
    ends.close()


@given(st.integers(0, 200), st.integers(0, 12))
def test_a_read_that_is_given_up_writes_no_more(seed: int, polls: int) -> None:
    ends, rng = Ends(seed=seed), np.random.default_rng(seed)
    dtypes = [("float32", "float16"), ("float16", "float16"), ("bfloat16", "float32")]
    numbers = [ends.read(spread(rng, pair, 8), *pair) for pair in dtypes]
    for _ in range(polls):
        ends.reader.poll()
    given_up = numbers[int(rng.integers(3))]
    draining = ends.reader.cancel([given_up, 1234])
    assert draining <= {given_up}
    before = ends.target.array.copy()
    if given_up == numbers[1]:
        assert (given_up in draining) or given_up not in ends.finish()
        ends.close()
        return
    assert draining == set(), "what still lands lands in staging"
    others = [n for n in numbers if n != given_up]
    assert ends.reader.cancel(others) <= {numbers[1]}
    results = ends.finish()
    np.testing.assert_array_equal(ends.target.array, before)
    assert given_up not in results
    # All of staging is free again.
    runs = spread(rng, dtypes[0], 8)
    number = ends.read(runs)
    assert ends.finish() == {number: ""}
    assert sorted(ends.reader._free) == [0, 1, 2]
    ends.close()


def test_one_broken_piece_is_the_reads_error() -> None:
    for broken in range(1, 11):
        ends = Ends(seed=broken)
        ends.slow.broken = {broken}
        number = ends.read(Runs(*(np.array([value], np.int64) for value in (0, 0, 160))))
        assert ends.finish() == {number: "broken"}
        again = ends.read(Runs(*(np.array([value], np.int64) for value in (0, 0, 16))))
        ends.slow.broken = set()
        assert ends.finish() == {again: ""}
        ends.close()


@pytest.mark.parametrize(
    ("runs", "dtypes", "error"),
    [
        ((0, SIZE - 8, 16), ("float16", "float32"), "beyond the local region"),
        ((0, 0, 16), ("float32", "int4"), "no conversion from float32 to int4"),
        ((SIZE - 8, 0, 16), ("float32", "float16"), "beyond the peer's region"),
    ],
)
def test_what_does_not_fit_is_an_error(runs: tuple[int, int, int], dtypes: tuple[str, str], error: str) -> None:
    ends = Ends()
    number = ends.read(Runs(*(np.array([value], np.int64) for value in runs)), *dtypes)
    [(ended, why)] = ends.finish().items()
    assert ended == number
    assert error in why
    assert (ends.target.array == 0).all()
    ends.close()
