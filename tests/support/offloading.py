"""Workers with tiers, single-stepped: their configurations, and tiers that a test's clock drives."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tandem.core.config import Config
from tandem.core.ids import worker_of
from tandem.engine.tiers import Tiers, memory_of, open_tiers, whole_layout
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.offload.base import HostBlocks, Spill
from tandem.kv_transfer.offload.build import Place
from tandem.kv_transfer.offload.simulated import Cost, SimulatedTier
from tandem.kv_transfer.offload.stack import Level, OffloadStack, Write

from .pair import Node, Pair
from .tiers import ready

SIZE = 8
MAX_LEN = 128
POOLS: dict[str, dict[str, Any]] = {"together": {"colocated": {}}, "apart": {"prefill": {}, "decode": {}}}


@functools.cache
def block_bytes(folder: Path) -> int:
    pair = Pair(
        Config.model_validate(
            {"model": {"path": str(folder)}, "pools": POOLS["together"], "kv": {"block_tokens": SIZE}}
        )
    )
    layout: KVLayout = pair.decode.engine.cache.layout
    pair.close()
    return layout.block_bytes


def config_of(folder: Path, num_blocks: int, pools: dict[str, Any], tiers: Sequence[dict[str, Any]] = ()) -> Config:
    """A pool of just so many blocks."""
    return Config.model_validate(
        {
            "model": {"path": str(folder), "max_model_len": MAX_LEN},
            "pools": pools,
            "kv": {"block_tokens": SIZE, "capacity": num_blocks * block_bytes(folder), "poison_freed": True},
            "routing": {"local_prefill": "never"},
            "offload": {"tiers": tiers},
        }
    )


def prompt_of(number: int, num_tokens: int = 60) -> list[int]:
    return np.random.default_rng(number).integers(1, 130, num_tokens).tolist()


def value(node: Node, name: str, **labels: str) -> float:
    return node.metrics.registry.get_sample_value(name, labels) or 0.0


class Slow:
    """Workers over one simulated tier, whose jobs end when the test's clock says so.

    Args:
        latency_s: of each job.
    """

    def __init__(
        self,
        config: Config,
        latency_s: float = 1.0,
        timeout_s: float = 1e9,
        slots: int = 64,
        write: Write = Write.THROUGH,
        overlap: bool = False,
        num_spill: int = 0,
    ) -> None:
        self.tiers: dict[str, SimulatedTier] = {}

        def tiers_of(pair: Pair, node: Node, role: str) -> Tiers:
            size, cost = whole_layout(node.engine).block_bytes, Cost(latency_s, 1e12, 1e12)
            tier = self.tiers[node.peer] = SimulatedTier("slow", slots, size, "lru", cost, pair.clock, timeout_s)
            spill = Spill(num_spill, HostBlocks(np.zeros(num_spill * size, np.uint8), size))
            return Tiers(OffloadStack([Level(tier, write)], spill), memory_of(node.engine, others_of(node)))

        self.pair = Pair(config, overlap, tiers_of=tiers_of)

    def run(self, max_turns: int = 10_000) -> None:
        """Turn until nothing is left, and move the clock on when nothing else happens."""
        for _ in range(max_turns):
            busy = self.pair.turn()
            times = [t for node in self.pair.nodes.values() if (t := node.offloader.next_event_s()) is not None]
            if not busy:
                return
            if times and min(times) > self.pair.clock.monotonic_s():
                self.pair.clock.advance(min(times) - self.pair.clock.monotonic_s())
        raise AssertionError("the workers do not come to rest")


def others_of(node: Node) -> Sequence[np.ndarray | int]:
    """The blocks of a worker's other ranks."""
    return [] if node.ranks is None else node.ranks.memory("offload.tiers")


def real(folder: Path) -> Callable[[Pair, Node, str], Tiers | None]:
    """The tiers that the configuration names; the host tier's keeper is found in a folder."""

    def tiers_of(pair: Pair, node: Node, role: str) -> Tiers | None:
        place = Place(folder, worker_of(node.peer), 1)
        return open_tiers(node.config, node.engine, place, pair.clock, pair.news.set, others_of(node))

    return tiers_of


def check(pair: Pair) -> None:
    for node in pair.nodes.values():
        assert node.offloader.num_open == 0
        node.check_idle()
        assert node.worker.drained()


def random_load(
    slow: Slow,
    rng: random.Random,
    pick: Callable[[], tuple[int, int]],
    golden: Mapping[tuple[int, int], list[int]],
) -> None:
    """Prompts that come and are called off at any time: equal tokens, and nothing leaks.

    Args:
        slow: closed at the end.
        rng: decides.
        pick: the next prompt, as `prompt_of` takes it.
        golden: each prompt's undisturbed tokens.
    """
    pair = slow.pair
    wanted: dict[int, tuple[int, int]] = {}
    aborted: set[int] = set()
    for _ in range(60):
        if rng.random() < 0.3:
            which = pick()
            wanted[pair.submit(prompt_of(*which), max_tokens=12)] = which
        if wanted and rng.random() < 0.1:
            ticket = rng.choice(list(wanted))
            aborted.add(ticket)
            pair.abort(ticket)
        pair.turn()
        if rng.random() < 0.3:
            pair.clock.advance(rng.choice((0.005, 0.05, 1.0)))
        for node in pair.nodes.values():
            node.engine.pool.check()
    slow.run()
    for ticket, which in wanted.items():
        if ticket not in aborted:
            assert pair.outputs[ticket].tokens[0] == golden[which]
    check(pair)
    pair.close()


def until_ready(pair: Pair) -> None:
    """Wait for all tiers. From then on everything is stored, however slow the machine is."""
    for node in pair.nodes.values():
        assert node.offloader._stack is not None
        for level in node.offloader._stack.levels:
            ready(level.tier)
        node.offloader._max_held = node.engine.pool.num_blocks
