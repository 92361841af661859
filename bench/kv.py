"""`tandem bench kv`: how fast each transport moves scattered blocks between two processes of this host.

A pull moves a quarter of a region, in blocks that lie in random order at both ends. Each is timed in turn with its
baseline, in the same two processes (`kv_bare`), so that whatever else the machine does slows both. A row gives
percentiles of both and the quotient of their medians, and what both processes computed for a pull, which says more than
time does where others use the machine.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from ..core.environment import prepare_children
from ..core.errors import ConfigError, TransferError
from ..core.wire import ClusterKeys, SecureContext, make_cluster_keys
from ..kv_transfer.layout import Runs, coalesce
from ..kv_transfer.memory import Buffer
from ..kv_transfer.transports import Read, Region, Transport
from ..kv_transfer.transports.nixl import NixlTransport
from ..kv_transfer.transports.shm import ShmTransport
from ..kv_transfer.transports.ucx import UcxTransport
from ..kv_transfer.transports.zmq import ZmqTransport
from . import kv_bare
from .machine import describe

_TIMEOUT_S = 120.0
_PEER = "owner-0#1"


class Case(NamedTuple):
    """What is measured: a transport, how its link is secured, and where the memory is."""

    transport: str
    security: str
    device: str
    baseline: str
    """What the baseline does, for people."""
    wanted: float
    """The quotient that is good enough."""


CASES = [
    Case("shm", "none", "cpu", "memcpy of the same runs, one thread", 0.8),
    Case("zmq", "none", "cpu", "pyzmq: as many contiguous frames", 0.8),
    Case("zmq", "curve", "cpu", "pyzmq with CURVE: as many contiguous frames", 0.8),
    Case("nixl", "none", "cpu", "nixl: the same descriptors in one transfer", 0.8),
    Case("ucx", "none", "cpu", "ucxx: as many contiguous frames", 0.8),
]


class Load(NamedTuple):
    """How much is moved."""

    region_bytes: int
    block_bytes: int
    repeats: int

    def runs(self) -> Runs:
        """A quarter of the region's blocks, in random order at both ends."""
        rng = np.random.default_rng(self.block_bytes)
        slots = self.region_bytes // self.block_bytes
        count = max(1, slots // 4)
        source, target = (rng.permutation(slots)[:count] * self.block_bytes for _ in range(2))
        return coalesce(source, target, np.full(count, self.block_bytes, np.int64))


def records(cases: list[Case], block_bytes: list[int], region_bytes: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The header, and a row for each case and size of block. Blocks for seconds a row; starts two processes a case.

    A transport that is not installed has one row, which says so.
    """
    prepare_children()
    yield {"bench": "kv", "region_mib": region_bytes / 2**20, "repeats": repeats, "machine": describe()}
    for case in cases:
        told = case._asdict()
        try:
            for load in (Load(region_bytes, size, repeats) for size in block_bytes):
                yield told | _measure(case, load)
        except ConfigError as error:
            yield told | {"skipped": str(error)}


def _measure(case: Case, load: Load) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    keys = make_cluster_keys()
    ours, theirs = spawn.Pipe()
    result, answer = spawn.Pipe(duplex=False)
    owner = spawn.Process(target=_own, args=(case, load, keys, theirs), daemon=True)
    reader = spawn.Process(target=_read, args=(case, load, keys, ours, answer), daemon=True)
    owner.start()
    reader.start()
    try:
        # Only the children hold the other ends: when one dies, the wait ends.
        for end in (ours, theirs, answer):
            end.close()
        found = result.recv()
    except EOFError:
        raise TransferError(f"bench kv: {case.transport}: a process of the benchmark died") from None
    finally:
        for process in (reader, owner):
            process.join(timeout=10)
            process.kill()
            process.join()
    if isinstance(found, str):
        raise ConfigError(found)
    seconds: dict[str, list[tuple[float, float]]] = found
    num_bytes = load.runs().num_bytes
    rows = {name: _summary(times, num_bytes) for name, times in seconds.items()}
    quotient = rows["ours"]["gb_per_s"] / rows["bare"]["gb_per_s"]
    return {
        "block_kib": load.block_bytes / 1024,
        "pulled_mib": num_bytes / 2**20,
        "runs": len(load.runs().sizes),
        **rows,
        "quotient": round(quotient, 3),
        "enough": quotient >= case.wanted,
    }


def _summary(times: list[tuple[float, float]], num_bytes: int) -> dict[str, float]:
    wall, cpu = np.array(times).T * 1e3
    p10, p50, p90 = np.percentile(wall, (10, 50, 90))
    return {
        "p10_ms": round(float(p10), 3),
        "p50_ms": round(float(p50), 3),
        "p90_ms": round(float(p90), 3),
        "gb_per_s": round(num_bytes / float(p50) / 1e6, 3),
        "cpu_ms": round(float(np.median(cpu)), 3),
    }


# ---- the two processes ----------------------------------------------------------------------------------------------


def _own(case: Case, load: Load, keys: ClusterKeys, reader: Connection) -> None:
    _quiet()
    context = SecureContext(keys, encrypt=case.security == "curve")
    source = Buffer(load.region_bytes)
    source.array[:] = np.random.default_rng(0).integers(0, 256, load.region_bytes, dtype=np.uint8)
    try:
        transport = _transport(case, lambda: None, context)
        bare = _owner(case, source, context)
    except ConfigError as error:
        reader.send(str(error))
        return
    transport.register(Region("blocks", source))
    reader.send((transport.descriptor(), bare.told()))
    num_bytes = load.runs().num_bytes
    while (what := reader.recv()) != "stop":
        reader.send(time.process_time())
        if what == "serve":
            bare.serve(num_bytes)
    transport.close()
    context.close()


def _read(case: Case, load: Load, keys: ClusterKeys, owner: Connection, answer: Connection) -> None:
    _quiet()
    context = SecureContext(keys, encrypt=case.security == "curve")
    target = Buffer(load.region_bytes)
    target.array[:] = 1
    news = threading.Event()
    found = owner.recv()
    if isinstance(found, str):
        answer.send(found)
        return
    transport = _transport(case, news.set, context)
    transport.register(Region("landing", target))
    transport.add_peer(_PEER, found[0])
    bare = _reader(case, found[1], target, context)
    runs = load.runs()

    def pull_ours() -> None:
        number = transport.submit(Read(_PEER, "blocks", "landing", runs))
        while not (ended := transport.poll()):
            if not news.wait(_TIMEOUT_S):
                raise TransferError(f"bench kv: {case.transport}: read {number} did not end in {_TIMEOUT_S:g} s")
            news.clear()
        if ended[0].error:
            raise TransferError(f"bench kv: {case.transport}: {ended[0].error}")

    def ask_owner(what: str) -> float:
        """What it has computed so far, in seconds."""
        owner.send(what)
        return float(owner.recv())

    def time_s(name: str) -> tuple[float, float]:
        """Of one pull: the time that it took, and what both processes computed."""
        before_s = ask_owner("serve" if name == "bare" else "tell") + time.process_time()
        start_s = time.perf_counter()
        if name == "bare":
            bare.pull(runs)
        else:
            pull_ours()
        took_s = time.perf_counter() - start_s
        return took_s, ask_owner("tell") + time.process_time() - before_s

    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for repeat in range(-1, load.repeats):  # the first one warms up
        for name in ("ours", "bare") if repeat % 2 else ("bare", "ours"):
            took = time_s(name)
            if repeat >= 0:
                seconds[name].append(took)
    owner.send("stop")
    answer.send(seconds)
    transport.close()
    context.close()


def _quiet() -> None:
    """UCX writes its warnings to standard output, which is for figures."""
    os.dup2(2, 1)


def _transport(case: Case, notify: Callable[[], None], context: SecureContext) -> Transport:
    match case.transport:
        case "shm":
            return ShmTransport(notify)
        case "nixl":
            return NixlTransport(notify)
        case "ucx":
            return UcxTransport(notify, context, kv_bare.ADDRESS)
        case _:
            return ZmqTransport(notify, context, kv_bare.ADDRESS)


def _owner(case: Case, source: Buffer, context: SecureContext) -> kv_bare.Owner:
    match case.transport:
        case "shm":
            return kv_bare.MemcpyOwner(source)
        case "nixl":
            return kv_bare.NixlOwner(source)
        case "ucx":
            return kv_bare.UcxOwner(source)
        case _:
            return kv_bare.ZmqOwner(source, context)


def _reader(case: Case, told: Any, target: Buffer, context: SecureContext) -> kv_bare.Reader:
    match case.transport:
        case "shm":
            return kv_bare.MemcpyReader(told, target)
        case "nixl":
            return kv_bare.NixlReader(told, target)
        case "ucx":
            return kv_bare.UcxReader(told, target)
        case _:
            return kv_bare.ZmqReader(told, context)
