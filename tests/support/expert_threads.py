"""Ranks that move experts in one process and one thread, apart from the threads that stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from tandem.core.clock import Clock, SystemClock
from tandem.core.errors import WorkerError
from tandem.core.metrics import ExpertMetrics
from tandem.eplb.dispatch_map import dispatch_map
from tandem.eplb.maps import ExpertMaps
from tandem.eplb.migrate import Migrator, Outcome
from tandem.eplb.placement import Placement, Topology
from tandem.eplb.standing import Standing
from tandem.eplb.store import ExpertLayout, ExpertStore, ExpertTensor
from tandem.kv_transfer.transports import Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.inproc import InprocTransport
from torch import Tensor

CPU = torch.device("cpu")
NUM_LAYERS, NUM_LOGICAL, SLOTS = 2, 3, 2
TENSORS = (
    ExpertTensor("weight", (16, 8), "bfloat16"),
    ExpertTensor("packed", (5,), "uint8"),
    ExpertTensor("scale", (), "float32"),
)

Make = Callable[[Notify], Mapping[str, Transport]]


class LocalExchange:
    """See `eplb.exchange.Exchange`. Only `gather` waits: for threads."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank = rank
        self.size = size
        self._shared = shared
        self._number = 0

    def start(self, data: bytes) -> None:
        self._number += 1
        self._shared.setdefault(self._number, {})[self.rank] = data

    def finish(self) -> list[bytes]:
        found = self._shared[self._number]
        if len(found) < self.size:
            raise WorkerError(f"only ranks {sorted(found)} came")
        return [found[rank] for rank in range(self.size)]

    def gather(self, data: bytes) -> list[bytes]:
        parts = self._shared["parts"]
        parts[self.rank] = data
        self._shared["barrier"].wait(30)
        found = list(parts)
        self._shared["barrier"].wait(30)
        return found


def fill(tensors: dict[str, Tensor], slot: int, layer: int, expert: int) -> None:
    """Make a slot an expert's."""
    value = 10 * layer + expert + 1
    for name, tensor in tensors.items():
        tensor[slot] = value / 4 if name == "scale" else value


def make_inproc(notify: Notify) -> Mapping[str, Transport]:
    """What ranks of one process read each other's host memory by."""
    return {"inproc": InprocTransport(notify)}


class Ranks:
    """All ranks of a group.

    Args:
        size: how many.
        device: where their experts are.
        make: their transports.
        layouts: for ranks with other experts than the rest.
        options: of `Migrator`.
    """

    def __init__(
        self,
        size: int = 2,
        device: torch.device = CPU,
        make: Make = make_inproc,
        layouts: Mapping[int, ExpertLayout] = {},
        clock: Clock = SystemClock(),
        **options: Any,
    ) -> None:
        self.size = size
        self.topology = Topology(size * SLOTS, size)
        self.outcomes: list[list[Outcome]] = [[] for _ in range(size)]
        self.metrics = [ExpertMetrics(CollectorRegistry()) for _ in range(size)]
        shared: dict[str, Any] = {"parts": [b""] * size, "barrier": threading.Barrier(size)}
        first = Standing.first(self.placement(0))
        self.stores = []
        for rank in range(size):
            store = ExpertStore(layouts.get(rank, ExpertLayout(TENSORS, NUM_LAYERS, SLOTS)), device)
            for layer, tensors in enumerate(store.live):
                for slot in range(SLOTS):
                    fill(tensors, slot, layer, first.rows[layer][rank * SLOTS + slot])
            self.stores.append(store)
        self.maps = [ExpertMaps(first.placement, self.topology, rank, device) for rank in range(size)]

        def start(rank: int) -> Migrator:
            return Migrator(
                LocalExchange(rank, size, shared), make, self.stores[rank], self.maps[rank], self.topology, first,
                metrics=self.metrics[rank], tell=self.outcomes[rank].append, clock=clock, every=1, **options,
            )  # fmt: skip

        with ThreadPoolExecutor(size) as pool:
            self.migrators = list(pool.map(start, range(size)))

    def placement(self, seed: int) -> Placement:
        """Random, but for each seed the same."""
        generator = np.random.default_rng(seed)
        rest = self.topology.num_physical - NUM_LOGICAL
        rows = [
            generator.permutation([*range(NUM_LOGICAL), *generator.integers(0, NUM_LOGICAL, rest)])
            for _ in range(NUM_LAYERS)
        ]
        return Placement.from_physical(np.array(rows, np.int32), NUM_LOGICAL)

    def step(self) -> None:
        """One on each rank."""
        for migrator in self.migrators:
            migrator.step_boundary()

    def until_ended(self, count: int) -> list[Outcome]:
        """Steps until so many attempts have ended; what the ranks say of the last."""
        deadline_s = time.monotonic() + 30
        while min(map(len, self.outcomes)) < count:
            assert time.monotonic() < deadline_s, f"no attempt ended: {self.outcomes}"
            self.step()
            time.sleep(0)
        self.check()
        return [outcomes[count - 1] for outcomes in self.outcomes]

    def rebalance(self, seed: int) -> list[Outcome]:
        """Propose a placement, as soon as one may, and see it end."""
        self.propose(seed)
        return self.until_ended(len(self.outcomes[0]) + 1)

    def propose(self, seed: int) -> None:
        """Propose a placement, as soon as the last attempt is put away."""
        deadline_s = time.monotonic() + 30
        while self.migrators[0]._machine.phase:
            assert time.monotonic() < deadline_s
            self.step()
        self.migrators[0].propose(self.placement(seed))

    def check(self) -> None:
        """Every slot holds what the maps say, to the bit."""
        for rank, (store, maps) in enumerate(zip(self.stores, self.maps, strict=True)):
            right = ExpertStore(store.layout, CPU)
            rows = maps.placement.physical_to_logical
            assert (
                maps.physical_to_logical.tolist()
                == rows.tolist()
                == self.maps[0].placement.physical_to_logical.tolist()
            )
            there = dispatch_map(maps.placement, self.topology, rank)
            assert maps.choices.tolist() == there.choices.tolist()
            assert maps.num_choices.tolist() == there.num_choices.tolist()
            for layer, tensors in enumerate(store.live):
                for slot in range(SLOTS):
                    fill(right.live[layer], slot, layer, int(rows[layer, rank * SLOTS + slot]))
                for name, tensor in tensors.items():
                    assert torch.equal(tensor.cpu(), right.live[layer][name]), f"rank {rank}, layer {layer}: {name}"
            right.close()

    def close(self) -> None:
        """End all."""
        for migrator, store in zip(self.migrators, self.stores, strict=True):
            migrator.close()
            assert not migrator._thread.is_alive()
            store.close()
