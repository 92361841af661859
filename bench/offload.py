"""`python -m tandem.bench.offload lookup | disk FOLDER | memory | remote | copies | chat | misses`: what tiers cost,
and what they give, as JSON lines.

lookup: 1,000 keys in one tier of the node's memory, and over three tiers, as an engine asks. disk: blocks stored and
loaded in random order, in turns with what fio(1) does with the same file, block size and depth, or, where there is
none, a bare loop. memory: what a host tier that is full takes. remote: see `offload_remote`. copies: scattered
ranges between a GPU and the host's memory, either way and both at once, beside memcpy. chat, misses: see `tiers`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from ..core.clock import SystemClock
from ..core.units import parse_bytes
from ..kv_transfer.offload.base import HostBlocks, LoadJob, Lookup, Spill, StoreJob, Tier
from ..kv_transfer.offload.disk import PAGE_BYTES, THREADS_PER_PATH, batch_blocks, open_disk
from ..kv_transfer.offload.folders import SLOT_FILE
from ..kv_transfer.offload.host import HostTier
from ..kv_transfer.offload.keeper import start_keeper
from ..kv_transfer.offload.keys import KEY_BYTES, TierKey
from ..kv_transfer.offload.pool import pool_bytes
from ..kv_transfer.offload.simulated import Cost, SimulatedTier
from ..kv_transfer.offload.stack import Level, OffloadStack, Write
from .machine import describe
from .offload_copies import copy_records
from .summary import percentile
from .tiers import measure_chat, measure_misses

_JOB_BLOCKS = 16
"""Of a job, or as many as one thread of the tier takes, if that is more."""
_JOBS = 8
"""In flight at a time, or as many as twice the blocks that the disk is given, or the tier would wait for us."""
_TIERS = "[{kind: host, capacity: 256MiB}, {kind: disk, capacity: 256MiB, path: FOLDER/disk}]"


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m tandem.bench.offload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    lookup = kinds.add_parser("lookup")
    lookup.add_argument("--slots", type=int, default=100_000, help="of each tier")
    disk = kinds.add_parser("disk")
    disk.add_argument("folder", type=Path)
    disk.add_argument("--capacity", type=parse_bytes, default="1GiB")
    disk.add_argument("--block", type=parse_bytes, default="2MiB")
    disk.add_argument("--seconds", type=float, default=5.0, help="of each run")
    disk.add_argument("--repeats", type=int, default=5, help="runs of each, in turns")
    memory = kinds.add_parser("memory")
    memory.add_argument("--capacity", type=parse_bytes, default="1GiB")
    memory.add_argument("--block", type=parse_bytes, default="2MiB")
    remote = kinds.add_parser("remote")
    remote.add_argument("--capacity", type=parse_bytes, default="512MiB")
    remote.add_argument("--block", type=parse_bytes, default="2MiB")
    remote.add_argument("--seconds", type=float, default=5.0)
    remote.add_argument("--transport", default="zmq")
    copies = kinds.add_parser("copies")
    copies.add_argument("--run", type=parse_bytes, nargs="+", default=[16 << 10, 32 << 10, 2 << 20])
    copies.add_argument("--programs", type=int, nargs="+", default=[8, 16, 32])
    copies.add_argument("--total", type=parse_bytes, default="512MiB", help="copied at a time, each way")
    chat = kinds.add_parser("chat")
    chat.add_argument("--users", type=int, default=20)
    chat.add_argument("--turns", type=int, default=5)
    chat.add_argument("--input-tokens", type=int, default=600, help="of the first question")
    misses = kinds.add_parser("misses")
    misses.add_argument("--requests", type=int, default=64)
    misses.add_argument("--input-tokens", type=int, default=256)
    misses.add_argument("--output-tokens", type=int, default=64)
    for served in (chat, misses):
        served.add_argument("--set", action="append", default=[], help="of both arms, as of tandem serve")
        served.add_argument("--tiers", default=_TIERS, help="offload.tiers of one arm; FOLDER is a temporary one")
        served.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    machine = describe() | {"load": os.getloadavg()}
    for result in _measure(options):
        print(json.dumps({"bench": options.kind, **result, "machine": machine}), flush=True)


def _measure(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    if options.kind == "lookup":
        return [measure_lookup(options.slots)]
    if options.kind == "disk":
        return [measure_disk(options.folder, options.capacity, options.block, options.seconds, options.repeats)]
    if options.kind == "memory":
        return [measure_memory(options.capacity, options.block)]
    if options.kind == "remote":
        # Imported here: the others need no transports.
        from .offload_remote import measure_remote

        return [measure_remote(options.capacity, options.block, options.seconds, options.transport)]
    if options.kind == "copies":
        return copy_records(options.run, options.programs, options.total)
    settings = ["model.max_model_len=2048", "pools={colocated: {}}", "kv.capacity=8MiB", *options.set]
    if options.kind == "chat":
        turns = options.users, options.turns, options.input_tokens
        return [measure_chat(*turns, settings, options.tiers, options.repeats)]
    sizes = options.requests, options.input_tokens, options.output_tokens
    return [measure_misses(*sizes, settings, options.tiers, options.repeats)]


def measure_lookup(num_slots: int) -> dict[str, Any]:
    """Times to look 1,000 random keys up, nine of ten of which are there: in a full host tier; over that and two tiers
    whose index is this process's, with a third of the keys each; and, in turns, in three dictionaries."""
    rng, memory = np.random.default_rng(0), HostBlocks(np.zeros(64, np.uint8), 64)
    keys = [[rng.bytes(KEY_BYTES) for _ in range(num_slots)] for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        keeper = start_keeper(path, pool_bytes(num_slots, 64), 64, "lru")
        host = HostTier(path, 64, SystemClock(), 60.0, lambda: None)
        _wait_ready(host)
        _fill(host, keys[0], memory)
        tiers: list[Tier] = [host]
        for name, known in (("disk", keys[1]), ("s3", keys[2])):
            # What threads do with bytes is not looked up; the index is the one of these tiers.
            tier = SimulatedTier(name, num_slots, 64, "lru", Cost(0.0, 1e15, 1e15), SystemClock(), 60.0)
            _fill(tier, known, None)
            tiers.append(tier)
        stack = OffloadStack([Level(tier, Write.THROUGH) for tier in tiers], Spill(1, None))
        dictionaries = [dict.fromkeys(known, 0) for known in keys]
        times_s: dict[str, list[float]] = {"host": [], "three": [], "dictionaries": []}
        for _ in range(300):
            absent = [rng.bytes(KEY_BYTES) for _ in range(100)]
            one = [keys[0][n] for n in rng.choice(num_slots, 900).tolist()] + absent
            three = [keys[place % 3][n] for place, n in enumerate(rng.choice(num_slots, 900).tolist())] + absent
            answers = _timed(times_s["host"], host.lookup, one)
            assert answers == [Lookup.HIT] * 900 + [Lookup.MISS] * 100
            found = _timed(times_s["three"], stack.lookup, three)
            assert [answer.level for answer in found] == [0, 1, 2] * 300 + [-1] * 100
            _timed(times_s["dictionaries"], lambda keys: [[d.get(key) for key in keys] for d in dictionaries], three)
        stack.close()
        keeper.communicate()
    return {
        "slots": num_slots,
        "keys": 1000,
        **{
            f"{name}_ms": {f"p{percent}": round(1e3 * percentile(values, percent), 4) for percent in (0, 50, 90, 99)}
            for name, values in times_s.items()
        },
    }


def measure_memory(capacity_bytes: int, block_bytes: int) -> dict[str, Any]:
    """What a host tier takes of the machine's memory when every slot has been written, beside what was configured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        keeper = start_keeper(path, capacity_bytes, block_bytes, "s3fifo")
        tier = HostTier(path, block_bytes, SystemClock(), 60.0, lambda: None)
        _wait_ready(tier)
        rng, memory = np.random.default_rng(0), HostBlocks(np.ones(block_bytes, np.uint8), block_bytes)
        num_slots = tier.stats().num_slots
        _fill(tier, [rng.bytes(KEY_BYTES) for _ in range(num_slots)], memory)
        process = psutil.Process(keeper.pid)
        shared = sum(
            descriptor.stat().st_blocks * 512
            for descriptor in Path(f"/proc/{keeper.pid}/fd").iterdir()
            if os.readlink(descriptor).startswith("/memfd:tandem")
        )
        own = process.memory_full_info().uss
        used = tier.stats().num_used
        tier.close()
        keeper.communicate()
    return {
        "capacity_bytes": capacity_bytes,
        "block_bytes": block_bytes,
        "slots": num_slots,
        "used_slots": used,
        "pool_bytes": shared,
        "pool_share": round(shared / capacity_bytes, 4),
        "process_bytes": own,
        "share": round((shared + own) / capacity_bytes, 4),
    }


def measure_disk(folder: Path, capacity_bytes: int, block_bytes: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Bytes a second, of the tier and of the bare disk in turns, writing and reading."""
    folder = folder / f"tandem-bench-{os.getpid()}"
    news = threading.Event()
    tier = open_disk([folder], capacity_bytes, block_bytes, "lru", SystemClock(), 60.0, news.set)
    try:
        _wait_ready(tier)
        # Of bytes that are stored, as fio counts; what headers take of the disk's time is the tier's loss.
        size, rng = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES, np.random.default_rng(0)
        keys = [rng.bytes(KEY_BYTES) for _ in range(tier.stats().num_slots)]
        batch = batch_blocks(block_bytes)
        job_blocks = max(_JOB_BLOCKS, batch)
        num_blocks = max(_JOBS, -(-2 * THREADS_PER_PATH * batch // job_blocks)) * job_blocks
        memory = HostBlocks(rng.integers(0, 256, num_blocks * block_bytes, dtype=np.uint8), block_bytes)
        result: dict[str, Any] = {
            "block_bytes": block_bytes, "slots": len(keys), "threads": THREADS_PER_PATH,
            "depth": THREADS_PER_PATH * batch, "job_blocks": job_blocks, "bare_block_bytes": size, "seconds": seconds,
        }  # fmt: skip
        for kind in ("store", "load"):
            ours, bare = [], []
            for _ in range(repeats):
                ours.append(_run(tier, kind, keys, memory, job_blocks, news, seconds))
                name, rate = _bare(folder / SLOT_FILE, kind, size, batch, seconds)
                bare.append(rate)
            if kind == "store":
                tier.clear()
                while tier.stats().num_used:
                    tier.poll()
                    time.sleep(0.01)  # threads that erase need the GIL
                # Writing past the tier has left it nothing.
                _run(tier, "store", keys, memory, job_blocks, news, 0.0, len(keys))
            shares = [one / other for one, other in zip(ours, bare, strict=True)]
            result |= {
                f"{kind}_bytes_per_s": [round(rate) for rate in ours],
                f"{kind}_{name}_bytes_per_s": [round(rate) for rate in bare],
                f"{kind}_share": round(median(shares), 3),
            }
    finally:
        tier.close()
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _run(
    tier: Tier,
    kind: str,
    keys: list[bytes],
    memory: HostBlocks,
    job_blocks: int,
    news: threading.Event,
    seconds: float,
    least_blocks: int = 0,
) -> float:
    """Jobs without a pause; bytes a second of what was good."""
    rng = np.random.default_rng()
    order = [keys[n] for n in rng.permutation(len(keys)).tolist()]
    number, good, start_s = 0, 0, time.perf_counter()
    open_: dict[int, int] = {}
    free = list(range(len(memory.array) // job_blocks))
    while time.perf_counter() - start_s < seconds or good < least_blocks or open_:
        while free and (time.perf_counter() - start_s < seconds or number * job_blocks < least_blocks):
            place = free.pop()
            blocks = range(place * job_blocks, (place + 1) * job_blocks)
            first = number * job_blocks
            if kind == "load":
                wanted = [order[n % len(order)] for n in range(first, first + job_blocks)]
                open_[tier.submit_load(LoadJob(wanted, memory, blocks))] = place
            else:
                octets = rng.bytes(job_blocks * KEY_BYTES)
                wanted = [octets[n : n + KEY_BYTES] for n in range(0, len(octets), KEY_BYTES)]
                if least_blocks:
                    wanted = [keys[n % len(keys)] for n in range(first, first + job_blocks)]
                open_[tier.submit_store(StoreJob(wanted, memory, blocks))] = place
            number += 1
        if not open_:
            break
        news.clear()
        results = tier.poll()
        for result in results:
            good += sum(result.good)
            free.append(open_.pop(result.number))
        if not results:
            # Not in a loop: threads of the tier want the GIL.
            news.wait(1.0)
    return good * memory.block_bytes / (time.perf_counter() - start_s)


def _bare(file: Path, kind: str, block_bytes: int, depth: int, seconds: float) -> tuple[str, float]:
    """What the disk does without us: (how measured, bytes a second)."""
    if shutil.which("fio") is None:
        return "loop", _loop(file, kind, block_bytes, seconds)
    command = [
        "fio", "--name=bare", f"--filename={file}", "--direct=1", f"--rw=rand{'read' if kind == 'load' else 'write'}",
        f"--bs={block_bytes}", f"--size={file.stat().st_size // block_bytes * block_bytes}", "--ioengine=libaio",
        f"--iodepth={depth}", "--thread", f"--numjobs={THREADS_PER_PATH}", "--group_reporting", "--time_based",
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


def _fill(tier: Tier, keys: Sequence[TierKey], memory: HostBlocks | None) -> None:
    for start in range(0, len(keys), 1000):
        part = keys[start : start + 1000]
        tier.submit_store(StoreJob(part, memory, [0] * len(part)))
        while not (results := tier.poll()):
            time.sleep(0.001)
        assert all(results[0].good)


def _timed(times_s: list[float], call: Callable[[list[TierKey]], Any], keys: list[TierKey]) -> Any:
    start_s = time.perf_counter()
    answer = call(keys)
    times_s.append(time.perf_counter() - start_s)
    return answer


if __name__ == "__main__":
    main()
