"""`python -m tandem.bench.offload lookup | disk FOLDER | remote | copies`: what the tiers of KV offload cost, as JSON
lines.

lookup: 1,000 keys in the host tier's index, as an engine reads it. disk: blocks stored and loaded in random order,
beside what fio(1) does with the same file, block size and number of threads, or, where there is none, a bare loop.
remote: see `offload_remote`. copies: scattered ranges between a GPU and the host's memory, either way and both at once,
beside memcpy.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..core.clock import SystemClock
from ..core.units import parse_bytes
from ..kv_transfer.offload.base import HostBlocks, LoadJob, Lookup, StoreJob, Tier
from ..kv_transfer.offload.disk import THREADS_PER_PATH, open_disk, slot_bytes
from ..kv_transfer.offload.host import HostTier
from ..kv_transfer.offload.keeper import start_keeper
from ..kv_transfer.offload.keys import KEY_BYTES
from ..kv_transfer.offload.pool import pool_bytes
from .machine import describe
from .offload_copies import copy_records

_JOB_BLOCKS = 16
_JOBS = 4
"""In flight at a time."""


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.offload", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    lookup = kinds.add_parser("lookup")
    lookup.add_argument("--slots", type=int, default=100_000)
    disk = kinds.add_parser("disk")
    disk.add_argument("folder", type=Path)
    disk.add_argument("--capacity", type=parse_bytes, default="1GiB")
    disk.add_argument("--block", type=parse_bytes, default="2MiB")
    disk.add_argument("--seconds", type=float, default=5.0)
    remote = kinds.add_parser("remote")
    remote.add_argument("--capacity", type=parse_bytes, default="512MiB")
    remote.add_argument("--block", type=parse_bytes, default="2MiB")
    remote.add_argument("--seconds", type=float, default=5.0)
    remote.add_argument("--transport", default="zmq")
    copies = kinds.add_parser("copies")
    copies.add_argument("--run", type=parse_bytes, nargs="+", default=[16 << 10, 32 << 10, 2 << 20])
    copies.add_argument("--programs", type=int, nargs="+", default=[8, 16, 32])
    copies.add_argument("--total", type=parse_bytes, default="512MiB", help="copied at a time, each way")
    options = parser.parse_args()
    if options.kind == "lookup":
        results: Iterable[dict[str, Any]] = [measure_lookup(options.slots)]
    elif options.kind == "disk":
        results = [measure_disk(options.folder, options.capacity, options.block, options.seconds)]
    elif options.kind == "remote":
        # Imported here: the others need no transports.
        from .offload_remote import measure_remote

        results = [measure_remote(options.capacity, options.block, options.seconds, options.transport)]
    else:
        results = copy_records(options.run, options.programs, options.total)
    for result in results:
        print(json.dumps({"bench": options.kind, **result, "machine": describe()}), flush=True)


def measure_lookup(num_slots: int) -> dict[str, Any]:
    """Times to look 1,000 random keys up in a full pool, nine of ten of which are there."""
    rng, memory = np.random.default_rng(0), HostBlocks(np.zeros(64, np.uint8), 64)
    keys = [rng.bytes(KEY_BYTES) for _ in range(num_slots)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        keeper = start_keeper(path, pool_bytes(num_slots, 64), 64, "lru")
        tier = HostTier(path, 64, SystemClock(), 60.0, lambda: None)
        _wait_ready(tier)
        for start in range(0, num_slots, 1000):
            part = keys[start : start + 1000]
            _drain(tier, {tier.submit_store(StoreJob(part, memory, [0] * len(part)))}, threading.Event())
        times_s = []
        for _ in range(300):
            wanted = [keys[n] for n in rng.choice(num_slots, 900).tolist()] + [rng.bytes(KEY_BYTES) for _ in range(100)]
            start_s = time.perf_counter()
            answers = tier.lookup(wanted)
            times_s.append(time.perf_counter() - start_s)
            assert answers == [Lookup.HIT] * 900 + [Lookup.MISS] * 100
        tier.close()
        keeper.communicate()
    ordered = sorted(times_s)
    return {
        "slots": num_slots,
        "keys": 1000,
        "best_ms": round(1e3 * ordered[0], 4),
        "median_ms": round(1e3 * statistics.median(ordered), 4),
        "p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 4),
    }


def measure_disk(folder: Path, capacity_bytes: int, block_bytes: int, seconds: float) -> dict[str, Any]:
    """Bytes a second, of the tier and of the bare disk, reading and writing."""
    folder = folder / f"tandem-bench-{os.getpid()}"
    news = threading.Event()
    tier = open_disk([folder], capacity_bytes, block_bytes, "lru", SystemClock(), 60.0, news.set)
    try:
        _wait_ready(tier)
        size, rng = slot_bytes(block_bytes), np.random.default_rng(0)
        keys = [rng.bytes(KEY_BYTES) for _ in range(tier.stats().num_slots)]
        num_blocks = _JOBS * _JOB_BLOCKS
        memory = HostBlocks(rng.integers(0, 256, num_blocks * block_bytes, dtype=np.uint8), block_bytes)
        result: dict[str, Any] = {"block_bytes": block_bytes, "slots": len(keys), "threads": THREADS_PER_PATH}
        for kind in ("store", "load"):
            ours = _run(tier, kind, keys, memory, news, seconds)
            rates = [_bare(folder / "blocks.tandem", kind, size, seconds)]
            ours = max(ours, _run(tier, kind, keys, memory, news, seconds))
            rates.append(_bare(folder / "blocks.tandem", kind, size, seconds))
            name, bare = rates[0][0], max(rate for _, rate in rates)
            result |= {
                f"{kind}_bytes_per_s": round(ours),
                f"{kind}_{name}_bytes_per_s": round(bare),
                f"{kind}_share": round(ours / bare, 3),
            }
            if kind == "store":
                # Writing past the tier has left it nothing.
                tier.clear()
                while tier.stats().num_used:
                    tier.poll()
                _run(tier, kind, keys, memory, news, 0.0, len(keys))
    finally:
        tier.close()
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _run(
    tier: Tier,
    kind: str,
    keys: list[bytes],
    memory: HostBlocks,
    news: threading.Event,
    seconds: float,
    least_blocks: int = 0,
) -> float:
    """Jobs without a pause; bytes a second of what was good."""
    rng = np.random.default_rng(1)
    number, good, start_s = 0, 0, time.perf_counter()
    open_: dict[int, int] = {}
    free = list(range(_JOBS))
    while time.perf_counter() - start_s < seconds or good < least_blocks or open_:
        while free and (time.perf_counter() - start_s < seconds or number * _JOB_BLOCKS < least_blocks):
            place = free.pop()
            blocks = range(place * _JOB_BLOCKS, (place + 1) * _JOB_BLOCKS)
            if kind == "load":
                wanted = [keys[n] for n in rng.choice(len(keys), _JOB_BLOCKS, replace=False).tolist()]
                open_[tier.submit_load(LoadJob(wanted, memory, blocks))] = place
            else:
                first = number * _JOB_BLOCKS
                wanted = [
                    keys[n % len(keys)] if least_blocks else rng.bytes(KEY_BYTES) for n in range(first, first + 16)
                ]
                open_[tier.submit_store(StoreJob(wanted, memory, blocks))] = place
            number += 1
        if not open_:
            break
        for result in tier.poll():
            good += sum(result.good)
            free.append(open_.pop(result.number))
        if not free:
            news.wait(1.0)
            news.clear()
    return good * memory.block_bytes / (time.perf_counter() - start_s)


def _bare(file: Path, kind: str, block_bytes: int, seconds: float) -> tuple[str, float]:
    """What the disk does without us: (how measured, bytes a second)."""
    if shutil.which("fio") is None:
        return "loop", _loop(file, kind, block_bytes, seconds)
    command = [
        "fio", "--name=bare", f"--filename={file}", "--direct=1", f"--rw=rand{'read' if kind == 'load' else 'write'}",
        f"--bs={block_bytes}", f"--size={file.stat().st_size // block_bytes * block_bytes}", "--ioengine=psync",
        "--thread", f"--numjobs={THREADS_PER_PATH}", "--group_reporting", "--time_based",
        f"--runtime={max(1, round(seconds))}", "--fallocate=none", "--output-format=json",
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return "fio", float(job["read" if kind == "load" else "write"]["bw_bytes"])


def _loop(file: Path, kind: str, block_bytes: int, seconds: float) -> float:
    descriptor = os.open(file, os.O_RDWR | os.O_DIRECT)
    num_blocks, done = file.stat().st_size // block_bytes, [0] * THREADS_PER_PATH

    def work(number: int) -> None:
        memory, rng = memoryview(mmap.mmap(-1, block_bytes)), np.random.default_rng(number)
        while time.perf_counter() < end_s:
            offset = int(rng.integers(num_blocks)) * block_bytes
            move = os.preadv if kind == "load" else os.pwritev
            done[number] += move(descriptor, [memory], offset)

    start_s = time.perf_counter()
    end_s = start_s + seconds
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS_PER_PATH)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    return sum(done) / (time.perf_counter() - start_s)


def _wait_ready(tier: Tier) -> None:
    while tier.stats().away:
        tier.poll()
        time.sleep(0.002)


def _drain(tier: Tier, numbers: set[int], news: threading.Event) -> None:
    while numbers:
        numbers -= {result.number for result in tier.poll()}
        news.wait(0.001)


if __name__ == "__main__":
    main()
