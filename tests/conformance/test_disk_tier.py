"""The disk tier when things go wrong: what is found is byte-exact, what is not is a miss, and it comes back by itself."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.patience import stretched
from support.tiers import BLOCK_BYTES, Engine, content_of, keys_of, ready
from tandem.core.clock import SystemClock
from tandem.core.errors import ConfigError
from tandem.kv_transfer.offload import record, slot_moves, threaded
from tandem.kv_transfer.offload.base import HostBlocks, LoadJob, Lookup, Tier
from tandem.kv_transfer.offload.disk import PAGE_BYTES, SlotFile, open_disk, slot_bytes
from tandem.kv_transfer.offload.index import TierIndex
from tandem.kv_transfer.offload.policies import make_policy
from tandem.kv_transfer.offload.record import HEADER_BYTES
from tandem.kv_transfer.offload.threaded import Frames, Outcome, Record, ThreadedTier

SLOTS = 16
CAPACITY = PAGE_BYTES + SLOTS * slot_bytes(BLOCK_BYTES)


class Kit:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.news = threading.Event()
        self.tiers: list[Tier] = []

    def open(self, *paths: Path, capacity: int = CAPACITY, timeout_s: float = 30.0) -> Engine:
        tier = open_disk(
            list(paths) or [self.folder], capacity, BLOCK_BYTES, "lru", SystemClock(), timeout_s, self.news.set
        )
        self.tiers.append(tier)
        ready(tier)
        return Engine(tier, self.news)

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(tmp_path / "kv")
    yield kit
    kit.close()


def slots_on_disk(path: Path) -> np.memmap[tuple[int, int], np.dtype[np.uint8]]:
    """[slots, slot bytes] uint8, written through."""
    return np.memmap(path / "blocks.tandem", np.uint8, "r+", PAGE_BYTES, (SLOTS, slot_bytes(BLOCK_BYTES)))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_blocks_survive_a_restart(kit: Kit) -> None:
    engine = kit.open()
    keys = keys_of(*range(10))
    engine.store(keys)
    engine.tier.remove(keys[:1])
    while engine.tier.stats().num_used > 9:
        engine.tier.poll()
    engine.tier.close()
    engine = kit.open()
    assert engine.tier.lookup(keys) == [Lookup.MISS] + [Lookup.HIT] * 9
    assert engine.load(keys[1:]).good == (True,) * 9
    engine.store(keys_of(*range(100, 110)))
    assert engine.tier.stats().num_used == SLOTS


def test_a_removed_tenant_is_gone_from_the_disk(kit: Kit) -> None:
    engine = kit.open()
    number = engine.submit_store(keys_of(1, 2))
    engine.tier.clear()
    engine.wait(number)
    while engine.tier.stats().num_used:
        engine.tier.poll()
    engine.tier.close()
    engine = kit.open()
    assert engine.tier.lookup(keys_of(1, 2)) == [Lookup.MISS] * 2


def test_a_file_of_other_blocks_is_begun_anew(kit: Kit) -> None:
    kit.open().store(keys_of(1))
    kit.tiers[0].close()
    engine = kit.open(capacity=CAPACITY - slot_bytes(BLOCK_BYTES))
    assert engine.tier.lookup(keys_of(1)) == [Lookup.MISS]
    assert (kit.folder / "blocks.tandem").stat().st_size == CAPACITY - slot_bytes(BLOCK_BYTES)


def test_the_bound_includes_everything(kit: Kit) -> None:
    engine = kit.open()
    for start in range(0, 60, 6):
        engine.store(keys_of(*range(start, start + 6)))
    assert (kit.folder / "blocks.tandem").stat().st_blocks * 512 <= CAPACITY


WRITER = """
import os, sys, threading, random
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from support.tiers import BLOCK_BYTES, Engine, keys_of
from tandem.core.clock import SystemClock
from tandem.kv_transfer.offload import slot_moves
from tandem.kv_transfer.offload.disk import open_disk
# What is compiled is loaded once, not in each child.
slot_moves.prepare()
Engine(None, threading.Event())
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        news = threading.Event()
        tier = open_disk([Path(sys.argv[1])], int(sys.argv[3]), BLOCK_BYTES, "lru", SystemClock(), 30.0, news.set)
        engine, rng = Engine(tier, news), random.Random(int(line))
        while True:
            engine.store(keys_of(*rng.sample(range(40), 6)))
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_a_writer_killed_at_random_points(kit: Kit) -> None:
    """Fifty times: whatever is found afterwards is byte-exact. `Engine.load` compares."""
    arguments = [str(kit.folder), str(Path(__file__).parents[1]), str(CAPACITY)]
    zygote = subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    keys, rng, found = keys_of(*range(40)), random.Random(0), 0
    for attempt in range(50):
        print(attempt, file=zygote.stdin, flush=True)
        child = int(zygote.stdout.readline())
        time.sleep(rng.uniform(0.002, 0.08))
        os.kill(child, signal.SIGKILL)
        deadline_s = time.monotonic() + stretched(10)
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        engine = kit.open()
        hits = [key for key, answer in zip(keys, engine.tier.lookup(keys), strict=True) if answer is Lookup.HIT]
        found += sum(engine.load(hits).good)
        engine.tier.close()
    zygote.stdin.close()
    zygote.wait()
    zygote.stdout.close()
    assert found > 100


@pytest.mark.parametrize("cut", [8, 60, HEADER_BYTES, 4096, 4608, 5000])
def test_torn_writes(kit: Kit, cut: int) -> None:
    """A slot whose first bytes are one block's and whose others are another's, both ways round."""
    engine = kit.open()
    keys = keys_of(*range(SLOTS))
    engine.store(keys)
    engine.tier.close()
    slots = slots_on_disk(kit.folder)
    slots[0, :cut] = slots[1, :cut]
    slots[2, cut:] = slots[3, cut:]
    slots.flush()
    engine = kit.open()
    hits = [key for key, answer in zip(keys, engine.tier.lookup(keys), strict=True) if answer is Lookup.HIT]
    assert len(hits) >= SLOTS - 2
    good = engine.load(hits).good
    assert sum(good) >= SLOTS - 3
    assert all(answer is Lookup.HIT for answer, fine in zip(engine.tier.lookup(hits), good, strict=True) if fine)
    assert all(answer is Lookup.MISS for answer, fine in zip(engine.tier.lookup(hits), good, strict=True) if not fine)


def test_flipped_bits_are_misses_and_one_warning(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    engine = kit.open()
    keys = keys_of(*range(SLOTS))
    engine.store(keys)
    slots, rng = slots_on_disk(kit.folder), np.random.default_rng(0)
    for slot in range(SLOTS // 2):
        slots[slot, HEADER_BYTES + int(rng.integers(BLOCK_BYTES))] ^= 1 << int(rng.integers(8))
    slots.flush()
    with caplog.at_level(logging.WARNING, "tandem"):
        assert sum(engine.load(keys).good) == SLOTS // 2
        assert engine.tier.stats().failures == {"checksum": SLOTS // 2}
    assert len(warnings(caplog)) == 1
    assert engine.tier.lookup(keys).count(Lookup.MISS) == SLOTS // 2
    assert engine.store(keys).good == (True,) * SLOTS
    assert engine.load(keys).good == (True,) * SLOTS


def test_a_file_that_is_cut_off(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    engine = kit.open()
    keys = keys_of(*range(SLOTS))
    engine.store(keys)
    os.truncate(kit.folder / "blocks.tandem", PAGE_BYTES + 4 * slot_bytes(BLOCK_BYTES))
    with caplog.at_level(logging.WARNING, "tandem"):
        assert sum(engine.load(keys).good) == 4
    assert len(warnings(caplog)) == 1
    assert engine.store(keys).good == (True,) * SLOTS
    assert engine.load(keys).good == (True,) * SLOTS


def test_a_file_that_is_deleted(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    engine = kit.open()
    keys = keys_of(*range(SLOTS))
    engine.store(keys)
    (kit.folder / "blocks.tandem").unlink()
    with caplog.at_level(logging.WARNING, "tandem"):
        assert engine.load(keys).good == (False,) * SLOTS
        assert engine.tier.lookup(keys) == [Lookup.MISS] * SLOTS
        assert engine.tier.stats().away == "lost"
        ready(engine.tier)
    assert len(warnings(caplog)) == 1
    assert engine.store(keys).good == (True,) * SLOTS
    assert engine.load(keys).good == (True,) * SLOTS
    assert (kit.folder / "blocks.tandem").stat().st_size == CAPACITY


def test_a_disk_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system of its own, where somebody took the room that the file had; later they give it back."""
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "t", tmp_path], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs rights that are not there")
    kit = Kit(tmp_path / "kv")
    try:
        with pytest.raises(ConfigError, match="are needed"):
            kit.open(capacity=4 << 20)
        engine = kit.open()
        keys = keys_of(*range(4))
        punched = [
            "fallocate",
            "--punch-hole",
            "-o",
            str(PAGE_BYTES),
            "-l",
            str(CAPACITY),
            kit.folder / "blocks.tandem",
        ]
        subprocess.run(punched, check=True)
        filler = tmp_path / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}"], check=False, stderr=subprocess.DEVNULL)
        with caplog.at_level(logging.WARNING, "tandem"):
            assert engine.store(keys).good == (False,) * 4
            assert engine.tier.stats().away == "full"
            assert engine.store(keys).good == (False,) * 4
        assert len(warnings(caplog)) == 1
        filler.unlink()
        ready(engine.tier)
        assert engine.store(keys).good == (True,) * 4
        assert engine.load(keys).good == (True,) * 4
    finally:
        kit.close()
        subprocess.run(["umount", tmp_path], check=True)


class SluggishFile(SlotFile):
    """A disk whose reads take as long as ``gate`` is closed, and whose writes take ``write_s``."""

    write_s = 0.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, BLOCK_BYTES, SLOTS)
        self.gate = threading.Event()
        self.gate.set()

    def read(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        self.gate.wait(30)
        return super().read(records, frames)

    def write(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """One after the other, as a disk does that is busy."""
        time.sleep(self.write_s)
        return super().write(records[:1] if self.write_s else records, frames)


def test_a_slow_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A load ends in time, with misses; what the disk answers later is not written anywhere; then it serves again."""
    file, news = SluggishFile(tmp_path / "kv"), threading.Event()
    tier = ThreadedTier("disk", TierIndex(SLOTS, make_policy("lru", SLOTS)), file, 2, SystemClock(), 0.3, news.set)
    ready(tier)
    engine = Engine(tier, news)
    keys = keys_of(*range(4))
    engine.store(keys)
    with caplog.at_level(logging.WARNING, "tandem"):
        file.gate.clear()
        start_s = time.monotonic()
        assert engine.load(keys).good == (False,) * 4
        assert time.monotonic() - start_s < stretched(5)
        assert tier.lookup(keys) == [Lookup.MISS] * 4
        assert tier.stats().failures["slow"] == 4
        engine.memory.array[:] = 7
        time.sleep(1.3)
        tier.poll()
        assert tier.lookup(keys) == [Lookup.MISS] * 4, "two reads still hang"
        file.gate.set()
        ready(tier)
    assert (engine.memory.array == 7).all()
    assert len(warnings(caplog)) == 1
    assert engine.load(keys).good == (True,) * 4
    tier.close()


def test_reads_that_hang_keep_nobody_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads together are waited for as long as one."""
    monkeypatch.setattr(threaded, "_STOP_S", 0.3)
    file, news = SluggishFile(tmp_path / "kv"), threading.Event()
    tier = ThreadedTier("disk", TierIndex(SLOTS, make_policy("lru", SLOTS)), file, 8, SystemClock(), 30.0, news.set)
    ready(tier)
    engine, keys = Engine(tier, news), keys_of(*range(8))
    engine.store(keys)
    file.gate.clear()
    number = tier.submit_load(LoadJob(keys, engine.memory, range(8)))
    start_s = time.monotonic()
    tier.close()
    assert time.monotonic() - start_s < 8 * 0.3
    assert [result.number for result in tier.poll()] == [number]
    file.gate.set()


def test_more_stores_than_the_disk_can_take(tmp_path: Path) -> None:
    """Those that wait too long fail; what is there is still found."""
    file, news = SluggishFile(tmp_path / "kv"), threading.Event()
    tier = ThreadedTier("disk", TierIndex(SLOTS, make_policy("lru", SLOTS)), file, 1, SystemClock(), 0.5, news.set)
    ready(tier)
    engine = Engine(tier, news)
    engine.store(keys_of(0))
    file.write_s = 0.2
    good = engine.store(keys_of(*range(1, 9))).good
    assert 1 <= sum(good) <= 4
    assert tier.stats().failures["slow"] == 8 - sum(good)
    assert tier.lookup(keys_of(0)) == [Lookup.HIT]
    assert engine.load(keys_of(0)).good == (True,)
    file.write_s = 0.0
    deadline_s = time.monotonic() + stretched(10)
    while tier.lookup(keys_of(*range(1, 9))).count(Lookup.PENDING):
        tier.poll()
        assert time.monotonic() < deadline_s, "slots of stores that were late stay reserved"
    assert engine.store(keys_of(*range(1, 9))).good == (True,) * 8
    tier.close()


def test_a_folder_has_one_owner(kit: Kit) -> None:
    kit.open()
    with pytest.raises(ConfigError, match="is in use by another tier"):
        kit.open()
    kit.tiers[0].close()
    kit.open()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        Kit(tmp_path / "file" / "kv").open()
    with pytest.raises(ConfigError, match="holds no block"):
        Kit(tmp_path / "kv").open(capacity=4096)


def test_stripes_share_the_blocks_and_do_without_each_other(kit: Kit, tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    engine = kit.open(*paths, capacity=2 * CAPACITY)
    keys = keys_of(*range(20))
    engine.store(keys)
    assert engine.load(keys).good == (True,) * 20
    engine.tier.close()
    engine = kit.open(*paths, capacity=2 * CAPACITY)
    assert engine.load(keys).good == (True,) * 20
    (paths[1] / "blocks.tandem").unlink()
    good = engine.load(keys).good
    assert 4 < sum(good) < 16
    assert engine.tier.lookup([key for key, fine in zip(keys, good, strict=True) if fine]) == [Lookup.HIT] * sum(good)


def test_stripes_are_all_or_none(kit: Kit, tmp_path: Path) -> None:
    kit.open(tmp_path / "b")
    with pytest.raises(ConfigError, match="in use"):
        kit.open(tmp_path / "a", tmp_path / "b", capacity=2 * CAPACITY)
    kit.open(tmp_path / "a")


def test_memory_without_o_direct() -> None:
    """Where a file system has none, the tier works through the page cache."""

    class Plain(SlotFile):
        def _try(self, descriptor: int) -> int:
            os.close(descriptor)
            raise OSError(errno.EINVAL, "no O_DIRECT here")

    folder = Path("/dev/shm") / f"tandem-test-{os.getpid()}"
    file, news = Plain(folder, BLOCK_BYTES, SLOTS), threading.Event()
    try:
        tier = ThreadedTier("disk", TierIndex(SLOTS, make_policy("lru", SLOTS)), file, 2, SystemClock(), 5, news.set)
        ready(tier)
        engine = Engine(tier, news)
        assert not file.direct
        engine.store(keys_of(1))
        assert engine.load(keys_of(1)).good == (True,)
        tier.close()
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


def test_without_the_library_for_checksums(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = kit.open()
    engine.store(keys_of(1))
    engine.tier.close()
    monkeypatch.setattr(record, "xxhash", None)
    engine = kit.open()
    assert engine.tier.lookup(keys_of(1)) == [Lookup.MISS]
    engine.store(keys_of(2))
    assert engine.load(keys_of(2)).good == (True,)


def test_without_asynchronous_io(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses io_setup(2), blocks go one by one, and mean the same."""
    keys = keys_of(*range(SLOTS))
    engine = kit.open()
    engine.store(keys)
    engine.tier.close()
    with monkeypatch.context() as refusing:
        refusing.setitem(slot_moves._CALLS, "io_setup", 100_000)
        engine = kit.open()
        assert engine.load(keys).good == (True,) * SLOTS
        others = keys_of(*range(SLOTS, 2 * SLOTS))
        assert engine.store(others).good == (True,) * SLOTS
        engine.tier.close()
    engine = kit.open()
    assert engine.load(others).good == (True,) * SLOTS


def test_one_bad_block_of_a_batch(kit: Kit) -> None:
    """Those that were read with it are good."""
    engine = kit.open()
    keys = keys_of(*range(SLOTS))
    engine.store(keys)
    slots = slots_on_disk(kit.folder)
    slots[3, 8] ^= 1
    slots[7] = slots[6]
    slots.flush()
    good = engine.load(keys).good
    assert sum(good) == SLOTS - 2
    assert engine.tier.stats().failures == {"torn": 1, "replaced": 1}


def test_loads_go_before_stores(tmp_path: Path) -> None:
    """One thread, a read that blocks it, and behind that stores and a load: the load is next."""
    file, news = SluggishFile(tmp_path / "kv"), threading.Event()
    tier = ThreadedTier("disk", TierIndex(SLOTS, make_policy("lru", SLOTS)), file, 1, SystemClock(), 30, news.set)
    ready(tier)
    engine = Engine(tier, news)
    keys = keys_of(*range(4))
    engine.store(keys[:2])
    file.gate.clear()
    first = tier.submit_load(LoadJob(keys[:1], engine.memory, [10]))
    time.sleep(0.05)
    store = engine.submit_store(keys[2:])
    second = tier.submit_load(LoadJob(keys[1:2], HostBlocks(engine.memory.array.reshape(-1), BLOCK_BYTES), [11]))
    file.gate.set()
    ended: list[int] = []
    while len(ended) < 3:
        ended += [result.number for result in tier.poll()]
    assert ended.index(second) < ended.index(store)
    assert first in ended
    np.testing.assert_array_equal(engine.memory.array[11], content_of(keys[1]))
    tier.close()
