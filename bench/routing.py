"""What a routing decision by KV takes: 64 workers, a million blocks, prompts of 100 blocks. One JSON line.

Usage: python -m tandem.bench.routing [WORKERS] [BLOCKS]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import psutil

from ..cluster.kv_view import KVView
from ..cluster.prefix_index import PrefixIndex
from ..cluster.router import Router
from ..core.hashing import block_hashes, root_hash
from ..core.kv_messages import MAX_KV_HASHES, KVSnapshot
from ..core.messages import Member, Membership, Report
from .machine import describe

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
        "workers": num_workers,
        "blocks": len(index),
        "bytes_per_block": round(bytes_per_block),
        "hash_us": _p50_us(lambda n: block_hashes(prompts[n], _BLOCK_TOKENS, root_hash("f"))),
        "match_us": _p50_us(lambda n: index.match(hashes[n])),
        "place_known_us": _p50_us(lambda n: router.place(prompts[n])),
        "place_unknown_us": _p50_us(lambda n: router.place(strange[n])),
        "machine": describe(),
    }


def main() -> None:
    """Print the figures."""
    sizes = [int(text) for text in sys.argv[1:]]
    print(json.dumps(measure(*(sizes + [64, 1_000_000][len(sizes) :]))))


if __name__ == "__main__":
    main()
