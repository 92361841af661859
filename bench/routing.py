"""Routing by KV: what a decision takes, what it finds, what it is good for. Prints JSON lines.

Usage:
    python -m tandem.bench.routing decision [--workers 64] [--blocks 1000000] [--trace FILE]
    python -m tandem.bench.routing trace FILE [--workers 8] [--tokens-per-s 10000] …
    python -m tandem.bench.routing cluster [--workers 4] [--tenants 16] [--set KEY=VALUE …] …
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ..cluster.kv_view import KVView
from ..cluster.prefix_index import PrefixIndex
from ..cluster.router import Router
from ..core.hashing import block_hashes, root_hash, split_hashes
from ..core.kv_messages import MAX_KV_HASHES, KVEvents, KVSnapshot
from ..core.messages import Member, Membership, Report
from ..kernels.block_hashes import chain
from ..kv_transfer.offload.trace import Trace
from ..kv_transfer.offload.trace import read_trace as load_trace
from .machine import describe
from .routing_cluster import Tenants
from .routing_cluster import measure as measure_cluster
from .routing_trace import Cluster, compare
from .summary import spread
from .workload import read_trace

_BLOCK_TOKENS = 16
_PROMPT_BLOCKS = 100
_NUM_PROMPTS = 2000


def _p50_us(run: Callable[[int], object]) -> float:
    times = []
    for number in range(_NUM_PROMPTS):
        began = time.perf_counter_ns()
        run(number)
        times.append(time.perf_counter_ns() - began)
    return round(statistics.median(times) / 1e3, 1)


def _prompts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(100_000) for _ in range(_PROMPT_BLOCKS * _BLOCK_TOKENS + 1)] for _ in range(_NUM_PROMPTS)]


def measure(num_workers: int, num_blocks: int) -> dict[str, object]:
    """Medians in microseconds; each worker has prompts of its own, among other blocks."""
    rng = random.Random(0)
    index = PrefixIndex()
    view = KVView(lambda peer, message: None, index)
    router = Router("kv_aware", view)
    peers = [f"colocated-{number}#1" for number in range(num_workers)]
    members = Membership(1, [Member(peer, "colocated", "n", "tcp://127.0.0.1:1") for peer in peers])
    view.follow(members)
    router.follow(members)
    prompts, strange = _prompts(rng), _prompts(rng)
    hashes = [block_hashes(prompt, _BLOCK_TOKENS, root_hash("f")) for prompt in prompts]
    before = psutil.Process().memory_info().rss
    for number, peer in enumerate(peers):
        router.report(peer, Report(0, 0, 0, 10, 10))
        own = [key for keys in hashes[number::num_workers] for key in keys]
        own += [rng.randbytes(16) for _ in range(num_blocks // num_workers - len(own))]
        for start in range(0, len(own), MAX_KV_HASHES):
            part = b"".join(own[start : start + MAX_KV_HASHES])
            view.receive(peer, KVSnapshot(start == 0, 0, "f", _BLOCK_TOKENS, "", False, part))
    bytes_per_block = (psutil.Process().memory_info().rss - before) / len(index)
    return {
        "bench": "routing decisions",
        "workers": num_workers,
        "blocks": len(index),
        "prompt_blocks": _PROMPT_BLOCKS,
        "bytes_per_block": round(bytes_per_block),
        "hash_us": _p50_us(lambda n: chain(prompts[n], _BLOCK_TOKENS, root_hash("f"))),
        "match_us": _p50_us(lambda n: index.match(hashes[n])),
        "place_known_us": _p50_us(lambda n: router.place(prompts[n])),
        "place_unknown_us": _p50_us(lambda n: router.place(strange[n])),
        "must_us": 50,
        "load_average": round(os.getloadavg()[0], 2),
        "machine": describe(),
    }


def measure_trace(path: Path, num_workers: int, num_blocks: int, num_requests: int) -> dict[str, object]:
    """Decisions about a trace's requests, one after the other: what has been sent to a worker, it has from then on.

    Hashing grows with a prompt, and is told apart: ``hash_us`` is of the whole prompt, ``place_us`` of the decision
    with as much hashing as it needs, ``match_us`` and ``pick_us`` of what is left without any.
    """
    rng = random.Random(0)
    index = PrefixIndex()
    view = KVView(lambda peer, message: None, index)
    router = Router("kv_aware", view)
    peers = [f"colocated-{number}#1" for number in range(num_workers)]
    members = Membership(1, [Member(peer, "colocated", "n", "tcp://127.0.0.1:1") for peer in peers])
    view.follow(members)
    router.follow(members)
    for peer in peers:
        router.report(peer, Report(0, 0, 0, 10, 10))
        other = b"".join(rng.randbytes(16) for _ in range(num_blocks // num_workers))
        view.receive(peer, KVSnapshot(True, 0, "f", _BLOCK_TOKENS, "", False, other))
    times: dict[str, list[float]] = {"hash_us": [], "match_us": [], "place_us": [], "pick_us": []}
    lengths, next_number = [], dict.fromkeys(peers, 0)
    for job in read_trace(path, num_requests, 1.0, 100_000, 1 << 20):
        root, size = root_hash("f"), _BLOCK_TOKENS
        began = time.perf_counter_ns()
        placement = router.place(job.prompt)
        placed = time.perf_counter_ns()
        keys = split_hashes(chain(job.prompt, size, root))
        hashed = time.perf_counter_ns()
        index.match(keys)
        matched = time.perf_counter_ns()
        router.place(())
        picked = time.perf_counter_ns()
        spent = (hashed - placed, matched - hashed, placed - began, picked - matched)
        for name, nanoseconds in zip(times, spent, strict=True):
            times[name].append(nanoseconds / 1e3)
        assert placement is not None
        lengths.append(len(job.prompt))
        for start in range(0, len(keys), MAX_KV_HASHES):
            part = b"".join(keys[start : start + MAX_KV_HASHES])
            events = KVEvents(next_number[placement.decode], "", False, False, part, b"")
            next_number[placement.decode] = events.next_number
            view.receive(placement.decode, events)
    return {
        "bench": "routing decisions of a trace", "workers": num_workers, "blocks": len(index),
        "requests": len(lengths), "prompt_tokens": spread([float(length) for length in lengths]),
        **{name: spread(values) for name, values in times.items()},
        "load_average": round(os.getloadavg()[0], 2), "machine": describe(),
    }  # fmt: skip


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.routing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    decision = commands.add_parser("decision", help="what a decision takes")
    decision.add_argument("--workers", type=int, default=64)
    decision.add_argument("--blocks", type=int, default=1_000_000)
    decision.add_argument("--trace", type=Path, help="requests of a trace, too")
    decision.add_argument("--requests", type=int, default=1000, help="of the trace")
    trace = commands.add_parser("trace", help="what policies find of a trace's prompts, against an oracle")
    trace.add_argument("file", type=Path)
    trace.add_argument("--requests", type=int, default=0, help="from the start; 0: all")
    trace.add_argument("--workers", type=int, default=8)
    trace.add_argument("--gateways", type=int, default=1)
    trace.add_argument("--tokens-per-s", type=float, default=10_000.0, help="prompt tokens that a worker computes")
    trace.add_argument("--capacity", type=int, default=0, help="tokens of a worker's prefix cache; 0: without limit")
    trace.add_argument("--urgent", type=float, default=0.0, help="share of requests with a high priority")
    trace.add_argument("--blind", action="store_true", help="routers do not look at priorities")
    trace.add_argument("--policies", nargs="*", default=["kv_aware", "prefix_hash", "least_loaded", "round_robin"])
    cluster = commands.add_parser("cluster", help="time to the first token, of a real cluster on this machine")
    cluster.add_argument("--workers", type=int, default=4)
    cluster.add_argument("--tenants", type=int, default=16)
    cluster.add_argument("--requests", type=int, default=96, help="of a run")
    cluster.add_argument("--rate", type=float, help="requests a second; without it, a closed loop")
    cluster.add_argument("--concurrency", type=int, default=2, help="of the closed loop")
    cluster.add_argument("--repeats", type=int, default=5)
    cluster.add_argument("--policies", nargs="*", default=["kv_aware", "round_robin"])
    cluster.add_argument("--set", action="append", default=["kv.capacity=24MiB"], dest="settings")
    given = parser.parse_args()
    if given.command == "decision":
        print(json.dumps(measure(given.workers, given.blocks)), flush=True)
        if given.trace:
            print(json.dumps(measure_trace(given.trace, given.workers, given.blocks, given.requests)))
        return
    if given.command == "trace":
        whole = load_trace(given.file)
        part = Trace(whole.requests[: given.requests or None], whole.block_tokens)
        machines = Cluster(
            given.workers,
            given.tokens_per_s,
            capacity_tokens=given.capacity,
            num_gateways=given.gateways,
            urgent_share=given.urgent,
            blind=given.blind,
        )
        figures = compare(part, machines, given.policies)
    else:
        tenants = Tenants(given.tenants, num_requests=given.requests, rate=given.rate, concurrency=given.concurrency)
        figures = measure_cluster(tenants, given.policies, given.workers, given.settings, given.repeats)
    load = round(os.getloadavg()[0], 2)
    print(json.dumps({"bench": f"routing {given.command}", **figures, "load_average": load, "machine": describe()}))


if __name__ == "__main__":
    main()
