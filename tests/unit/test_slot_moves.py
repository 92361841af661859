"""Batches of records between memory and a file: which of them are one request, and that each is judged by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tandem.kv_transfer.offload import record, slot_moves
from tandem.kv_transfer.offload.disk import SlotFile, batch_blocks, slot_bytes
from tandem.kv_transfer.offload.record import HEADER_BYTES
from tandem.kv_transfer.offload.slot_moves import Batch, Mover

pytestmark = pytest.mark.skipif(not slot_moves.available(), reason="there is no compiler, no xxhash, or no io_submit")

BLOCK_BYTES = 5000
SLOTS = 32
STRIDE = slot_bytes(BLOCK_BYTES)


class Records:
    """A file of records, and memory for a batch."""

    def __init__(self, folder: Path, block_bytes: int = BLOCK_BYTES, num_slots: int = SLOTS) -> None:
        self.path = folder / "records"
        self._num_bytes = block_bytes
        io = SlotFile(folder / "folder", block_bytes, num_slots)
        self.frames = io.frames().whole
        io.close()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        self._mover = Mover(len(self.frames))
        rng = np.random.default_rng(0)
        self._keys = [rng.bytes(32) for _ in range(num_slots)]
        self._payloads = rng.integers(0, 256, (num_slots, block_bytes), np.uint8)

    def write(self, slots: list[int]) -> list[bool]:
        self.frames[: len(slots), HEADER_BYTES : HEADER_BYTES + self._num_bytes] = self._payloads[slots]
        return list(self._mover.write(self._descriptor, self._batch(slots), self._num_bytes).tolist())

    def read(self, slots: list[int]) -> list[bool]:
        """Compares what is said to be good."""
        self.frames[:] = 0xEE
        states = self._mover.read(self._descriptor, self._batch(slots), self._num_bytes)
        found = self.frames[: len(slots), HEADER_BYTES : HEADER_BYTES + self._num_bytes]
        np.testing.assert_array_equal(found[states], self._payloads[slots][states])
        return list(states.tolist())

    def check(self, slot: int) -> str:
        """What `record` says of a slot."""
        stride = self.frames.shape[1]
        whole = np.fromfile(self.path, np.uint8, stride, offset=slot * stride)
        return record.check(whole, self._keys[slot], 7 + slot, self._num_bytes)[0]

    def close(self) -> None:
        self._mover.close()
        os.close(self._descriptor)

    def _batch(self, slots: list[int]) -> Batch:
        offsets = np.array(slots, np.int64) * self.frames.shape[1]
        keys, generations = [self._keys[slot] for slot in slots], [7 + slot for slot in slots]
        return Batch.of(offsets, keys, generations, self._num_bytes, self.frames.view(np.uint64))


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    records = Records(tmp_path)
    yield records
    records.close()


@pytest.mark.parametrize("slots", [[4], [0, 1, 2, 3], [3, 2, 1, 0], [5, 6, 9, 1, 2, 3, 0], list(range(SLOTS))])
def test_every_order_of_slots(records: Records, slots: list[int]) -> None:
    assert all(records.write(slots))
    assert {records.check(slot) for slot in slots} == {""}
    for order in (slots, slots[::-1], sorted(slots)):
        assert all(records.read(order))


def test_neighbours_are_one_request(records: Records) -> None:
    """Which cannot be told from outside but by its end: what is cut off takes with it what was asked for together."""
    records.write([0, 1, 2, 3])
    os.truncate(records.path, 3 * STRIDE + 512)
    assert records.read([0, 1, 2, 3]) == [False] * 4
    assert records.read([0, 1, 3]) == [True, True, False]
    assert records.read([3, 2, 1, 0]) == [False, True, True, True]


def test_requests_have_an_end(tmp_path: Path) -> None:
    """So much at once that all parts of a large disk's controller have something to do."""
    records = Records(tmp_path, 1 << 20, 8)
    slots = list(range(len(records.frames)))
    assert len(slots) == 7
    assert all(records.write(slots))
    os.truncate(records.path, 7 * records.frames.shape[1] - 4096)
    assert records.read(slots) == [True] * 6 + [False]
    records.close()


def test_each_record_of_a_request_is_judged_by_itself(records: Records) -> None:
    slots = list(range(8))
    records.write(slots)
    content = np.memmap(records.path, np.uint8, "r+", 0, (8, STRIDE))
    content[2, HEADER_BYTES + 9] ^= 1
    content[5] = content[4]
    content.flush()
    assert records.read(slots) == [slot not in (2, 5) for slot in slots]


@pytest.mark.parametrize(
    ("block_bytes", "blocks"),
    [(16 << 10, 64), (32 << 10, 56), (64 << 10, 30), (256 << 10, 16), (1 << 20, 7), (2 << 20, 3), (32 << 20, 1)],
)
def test_how_many_go_together(block_bytes: int, blocks: int) -> None:
    assert batch_blocks(block_bytes) == blocks


def test_a_threads_memory(tmp_path: Path) -> None:
    """In huge pages, if the kernel has any; aligned; and not a child's: open(2), of O_DIRECT and fork(2)."""
    records = Records(tmp_path, 1 << 20, 8)
    address = records.frames.ctypes.data
    assert address % (2 << 20) == 0
    areas = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?VmFlags:([a-z0-9 ]*)$", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    [flags] = [flags.split() for first, end, flags in areas if int(first, 16) <= address < int(end, 16)]
    assert "dc" in flags
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags
    records.close()
