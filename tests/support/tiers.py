"""What tests of tiers share: blocks whose bytes say whose they are, and a wait for a job's end."""

from __future__ import annotations

import subprocess
import threading
import time

import numpy as np
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.offload.base import HostBlocks, JobResult, LoadJob, Spill, StoreJob, Tier
from tandem.kv_transfer.offload.keys import KeySpace, TierKey, key_space

from .patience import stretched

BLOCK_BYTES = 5000
"""Neither a power of two nor a page."""

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_tokens=16, dtype="float32")


def keys_of(*numbers: int, space: KeySpace | None = None) -> list[TierKey]:
    """Keys that look like hashes, the same for the same numbers."""
    hashes = [np.random.default_rng(number).bytes(16) for number in numbers]
    return (space or key_space("", LAYOUT)).of(hashes)


def content_of(key: TierKey) -> np.ndarray:
    """The only right bytes for a key: [BLOCK_BYTES] uint8."""
    seed = int.from_bytes(key, "little")
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


class Engine:
    """Somebody with blocks who uses a tier."""

    def __init__(self, tier: Tier, news: threading.Event, num_blocks: int = 64) -> None:
        self.tier = tier
        self.news = news
        self.memory = HostBlocks(np.zeros(num_blocks * BLOCK_BYTES, np.uint8), BLOCK_BYTES)

    def wait(self, *numbers: int, timeout_s: float = 20.0) -> dict[int, JobResult]:
        """Poll, as told by notify, until these jobs have ended."""
        results: dict[int, JobResult] = {}
        deadline_s = time.monotonic() + stretched(timeout_s)
        while not set(numbers) <= results.keys():
            results |= {result.number: result for result in self.tier.poll()}
            assert time.monotonic() < deadline_s, f"{set(numbers) - results.keys()} did not end"
            if not set(numbers) <= results.keys():
                self.news.wait(0.005)
                self.news.clear()
        return results

    def submit_store(self, keys: list[TierKey], priority: int = 0, spill: Spill | None = None, first: int = 0) -> int:
        """Start to store the right bytes."""
        blocks = list(range(first, first + len(keys)))
        for key, block in zip(keys, blocks, strict=True):
            self.memory.array[block] = content_of(key)
        return self.tier.submit_store(StoreJob(keys, self.memory, blocks, priority, spill))

    def store(self, keys: list[TierKey], priority: int = 0, spill: Spill | None = None) -> JobResult:
        """Store the right bytes, and wait."""
        number = self.submit_store(keys, priority, spill)
        return self.wait(number)[number]

    def load(self, keys: list[TierKey]) -> JobResult:
        """Load, and check that what is said to be good is."""
        self.memory.array[:] = 0xEE
        number = self.tier.submit_load(LoadJob(keys, self.memory, list(range(len(keys)))))
        result = self.wait(number)[number]
        for block, (key, good) in enumerate(zip(keys, result.good, strict=True)):
            if good:
                np.testing.assert_array_equal(self.memory.array[block], content_of(key))
        assert (self.memory.array[len(keys) :] == 0xEE).all(), "a block that is not the job's was written"
        return result


def end(keeper: subprocess.Popen[bytes]) -> None:
    """Close a keeper's standard input, and wait for its end."""
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait(10)


def ready(tier: Tier, timeout_s: float = 20.0) -> None:
    """Wait until a tier takes part."""
    deadline_s = time.monotonic() + timeout_s
    while tier.stats().away:
        tier.poll()
        assert time.monotonic() < deadline_s, f"the tier does not come: {tier.stats().away}"
        time.sleep(0.002)
