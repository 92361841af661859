"""From the YAML to tiers that work, and what is said when one cannot be."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.tiers import BLOCK_BYTES, content_of, end, keys_of, ready
from tandem.core.clock import SystemClock
from tandem.core.config import Config, OffloadConfig
from tandem.core.errors import ConfigError
from tandem.kv_transfer.offload.base import HostBlocks
from tandem.kv_transfer.offload.build import Place, memory_bytes, open_stack, start_host_tier
from tandem.kv_transfer.offload.folders import check_room, claim
from tandem.kv_transfer.offload.stack import OffloadStack


def offload(*tiers: dict[str, object]) -> OffloadConfig:
    return Config.model_validate({"offload": {"tiers": tiers}}).offload


def open_for(config: OffloadConfig, folder: Path, worker: str = "decode-0", num_workers: int = 1) -> object:
    place = Place(folder, worker, num_workers)
    return open_stack(config, BLOCK_BYTES, place, SystemClock(), lambda: None)


def test_no_tiers_no_stack(tmp_path: Path) -> None:
    assert open_for(offload(), tmp_path) is None
    assert start_host_tier(offload(), BLOCK_BYTES, tmp_path) is None


def test_two_workers_of_a_node(tmp_path: Path) -> None:
    """What one stores in the node's memory the other loads; each has a disk of its own for what must go."""
    config = offload(
        {"kind": "host", "capacity": "64KiB", "policy": "lru"},
        {"kind": "disk", "capacity": "1MiB", "path": str(tmp_path / "disk"), "write": "write_back"},
    )
    keeper = start_host_tier(config, BLOCK_BYTES, tmp_path)
    assert keeper is not None
    news = threading.Event()
    stacks = []
    for worker in ("decode-0", "decode-1"):
        stack = open_stack(config, BLOCK_BYTES, Place(tmp_path, worker, 2), SystemClock(), news.set)
        assert stack is not None
        for level in stack.levels:
            ready(level.tier)
        stacks.append(stack)
    memory = HostBlocks(np.zeros(40 * BLOCK_BYTES, np.uint8), BLOCK_BYTES)

    def run(worker: int, number: int) -> tuple[bool, ...]:
        while True:
            for result in stacks[worker].poll():
                if result.number == number:
                    return result.good
            news.wait(0.005)
            news.clear()

    keys = keys_of(*range(40))
    for block, key in enumerate(keys):
        memory.array[block] = content_of(key)
    for start in range(0, 40, 5):
        assert run(0, stacks[0].store(keys[start : start + 5], memory, range(start, start + 5))) == (True,) * 5
    memory.array[:] = 0
    while stacks[0].next_event_s() is not None:  # on their way down
        stacks[0].poll()
    assert run(0, stacks[0].load(keys, memory, range(40))) == (True,) * 40
    for block, key in enumerate(keys):
        np.testing.assert_array_equal(memory.array[block], content_of(key))
    good = run(1, stacks[1].load(keys, memory, range(40)))
    assert 0 < sum(good) < 40, "only what is in the node's memory"
    for stack in stacks:
        stack.close()
    end(keeper)


@pytest.mark.parametrize(
    ("tier", "complaint"),
    [
        (
            {"kind": "disk", "capacity": "4KiB", "path": "/tmp/x"},
            "offload.tiers.0.capacity: 4.0 KiB in 1 folders holds no",
        ),
        ({"kind": "disk", "capacity": "1MiB", "path": "/proc/x"}, "offload.tiers.0.path: /proc/x cannot be"),
        ({"kind": "disk", "capacity": "9999TiB", "path": "."}, "offload.tiers.0.capacity: 9999.0 TiB, and"),
        ({"kind": "disk", "capacity": "1MiB", "path": "/dev/null"}, "offload.tiers.0.path: /dev/null cannot be"),
    ],
)
def test_tiers_that_cannot_be(tier: dict[str, object], complaint: str, tmp_path: Path) -> None:
    if tier["path"] == ".":
        tier = {**tier, "path": str(tmp_path)}
    with pytest.raises(ConfigError) as caught:
        open_for(offload({"kind": "host", "capacity": "1MiB"}, tier), tmp_path)
    assert complaint.replace("tiers.0", "tiers.1") in caught.value.message


def test_workers_and_tiers_share_the_room_of_a_disk(tmp_path: Path) -> None:
    """Each part alone would find room."""
    room = os.statvfs(tmp_path)
    free = room.f_bavail * room.f_frsize
    one = {"kind": "disk", "capacity": free * 3 // 2, "path": str(tmp_path / "a")}
    with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.capacity: .* lacks"):
        open_for(offload(one), tmp_path, num_workers=4)
    two = [{"kind": "disk", "capacity": free * 3 // 4, "path": str(tmp_path / name)} for name in "ab"]
    with pytest.raises(ConfigError, match=r"offload\.tiers\.1\.capacity: .* lacks"):
        open_for(offload(*two), tmp_path, num_workers=100)


def test_what_files_take_already_is_room(tmp_path: Path) -> None:
    """A restart on a disk that is full but for them."""
    kept = tmp_path / "a" / "decode-0" / "blocks.tandem"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(8 << 20))
    room = os.statvfs(tmp_path)
    free = room.f_bavail * room.f_frsize
    tier = {"kind": "disk", "capacity": free + (4 << 20), "path": str(tmp_path / "a")}
    check_room(offload(tier).tiers)
    kept.unlink()
    with pytest.raises(ConfigError, match="lacks"):
        check_room(offload(tier | {"capacity": free + (64 << 20)}).tiers)


def test_a_folder_is_one_clusters(tmp_path: Path) -> None:
    """Also where its workers have other names; the next cluster may have it."""
    config = offload({"kind": "disk", "capacity": "1MiB", "path": str(tmp_path / "a")})

    def open_as(cluster: str, worker: str) -> OffloadStack:
        stack = open_stack(config, BLOCK_BYTES, Place(tmp_path, worker, 1, cluster), SystemClock(), lambda: None)
        assert stack is not None
        return stack

    stacks = [open_as("one", "decode-0"), open_as("one", "prefill-0")]
    for worker in ("colocated-0", "decode-0"):
        with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.path: \S+/a is in use by another cluster"):
            open_as("another", worker)
    with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.path: \S+/decode-0 is in use by another tier"):
        open_as("one", "decode-0")
    for stack in stacks:
        stack.close()
    open_as("another", "colocated-0").close()


def test_fewer_workers_leave_nothing_behind(tmp_path: Path) -> None:
    """Those that are left have the whole capacity, and no more; what is in use, or nobody's, is left alone."""
    config = offload({"kind": "disk", "capacity": "1MiB", "path": str(tmp_path / "a")})
    names = [f"decode-{number}" for number in range(4)]

    def open_as(worker: str, workers: list[str]) -> OffloadStack:
        place = Place(tmp_path, worker, len(workers), "one", None, frozenset(workers))
        stack = open_stack(config, BLOCK_BYTES, place, SystemClock(), lambda: None)
        assert stack is not None
        ready(stack.levels[0].tier)
        return stack

    stacks = [open_as(name, names) for name in names]
    (tmp_path / "a" / "notes").mkdir()
    for stack in stacks[:3]:
        stack.close()
    left = open_as("decode-0", names[:1])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"cluster", "notes", "decode-0", "decode-3"}
    for stack in (stacks[3], left):
        stack.close()
    open_as("decode-0", names[:1]).close()
    taken = sum(file.stat().st_blocks * 512 for file in (tmp_path / "a").glob("**/*") if file.is_file())
    assert taken <= (1 << 20) + (8 << 10)
    place = Place(tmp_path, "decode-7", 1, "another", None, frozenset({"decode-7"}))
    with contextlib.ExitStack() as stop:
        stop.callback(os.close, claim(tmp_path / "a", "one"))
        with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.path: .* another cluster"):
            open_stack(config, BLOCK_BYTES, place, SystemClock(), lambda: None)
    assert (tmp_path / "a" / "decode-0").exists()


def test_clusters_that_start_at_once(tmp_path: Path) -> None:
    """One of them has the folder, with all of its workers."""
    barrier = threading.Barrier(12)
    taken: list[tuple[str, int]] = []

    def run(cluster: str) -> None:
        barrier.wait()
        with contextlib.suppress(ConfigError):
            taken.append((cluster, claim(tmp_path, cluster)))

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc" * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({cluster for cluster, _ in taken}) <= 1
    for _, descriptor in taken:
        os.close(descriptor)


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.capacity: 1024\.0 TiB, and the node has"):
        start_host_tier(offload({"kind": "host", "capacity": "1024TiB"}), BLOCK_BYTES, tmp_path)
    with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.capacity: 4\.0 KiB holds no block"):
        start_host_tier(offload({"kind": "host", "capacity": "4KiB"}), BLOCK_BYTES, tmp_path)


def test_workers_and_the_tier_share_the_memory(tmp_path: Path) -> None:
    half = memory_bytes() * 6 // 10
    with pytest.raises(ConfigError, match=r"of memory, of which a worker's kv\.capacity takes"):
        start_host_tier(offload({"kind": "host", "capacity": half}), BLOCK_BYTES, tmp_path, half)


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "1048576\n", 1 << 20),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "2097152\n", 2 << 20),
        ("memory/memory.limit_in_bytes", f"{(1 << 63) - 4096}\n", None),
    ],
)
def test_a_container_has_less_memory_than_its_host(tmp_path: Path, name: str, text: str, limit: int | None) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert memory_bytes(tmp_path) == (limit or psutil.virtual_memory().total)
