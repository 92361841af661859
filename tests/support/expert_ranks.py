"""Ranks that serve a tiny model of experts, each a process of its own, and that rebalance while they do.

A step sends every token to a rank that has its expert, by the maps of the moment, and back. Each rank compares what came
back with what it computes from the experts' seeds: not one bit may differ, whatever moves meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tandem.core.errors import CapacityError, WorkerError
from tandem.core.wire import ClusterKeys, SecureContext, make_cluster_keys
from tandem.eplb.dispatch_map import dispatch_map
from tandem.eplb.exchange import TorchExchange
from tandem.eplb.maps import ExpertMaps
from tandem.eplb.migrate import Migrator, Outcome
from tandem.eplb.peers import MakeTransports
from tandem.eplb.placement import Placement, Topology
from tandem.eplb.standing import Standing, reconcile
from tandem.eplb.store import ExpertLayout, ExpertStore, ExpertTensor
from tandem.kv_transfer.transports.shm import ShmTransport
from tandem.kv_transfer.transports.zmq import ZmqTransport
from torch import Tensor

from .forking import forking
from .patience import stretched

CPU = torch.device("cpu")
HIDDEN = 8
NUM_LAYERS = 2
NUM_LOGICAL = 6
SLOTS = 4
"""Of a rank."""
TOKENS = 4
"""Of a rank and step."""
TENSORS = (
    ExpertTensor("weight", (HIDDEN, HIDDEN), "float32"),
    ExpertTensor("scale", (), "float32"),
    ExpertTensor("zero_points", (HIDDEN,), "int8"),
    ExpertTensor("bias", (3,), "float16"),
)


def expert(layer: int, number: int) -> dict[str, Tensor]:
    """An expert's tensors, from its seed."""
    generator = torch.Generator().manual_seed(1000 * layer + number)
    return {
        "weight": torch.randn(HIDDEN, HIDDEN, generator=generator) / 3,
        "scale": torch.rand((), generator=generator) + 0.5,
        "zero_points": torch.randint(-9, 9, (HIDDEN,), generator=generator, dtype=torch.int8),
        "bias": torch.randn(3, generator=generator).half(),
    }


def apply(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """One token through one expert, alone, so that the bits depend on nothing else."""
    y = (tensors["weight"] - tensors["zero_points"].float()[:, None] / 16) @ x
    return torch.tanh(y * tensors["scale"] + tensors["bias"].float().sum())


def random_placement(seed: int, num_ranks: int) -> Placement:
    """Every expert somewhere, the other slots anything."""
    generator = np.random.default_rng(seed)
    num_physical = num_ranks * SLOTS
    rows = [
        generator.permutation(
            np.concatenate([np.arange(NUM_LOGICAL), generator.integers(0, NUM_LOGICAL, num_physical - NUM_LOGICAL)])
        )
        for _ in range(NUM_LAYERS)
    ]
    return Placement.from_physical(np.array(rows, np.int32), NUM_LOGICAL)


class ServingRank:
    """One process."""

    def __init__(self) -> None:
        self.store = ExpertStore(ExpertLayout(TENSORS, NUM_LAYERS, SLOTS), CPU)
        self.maps: ExpertMaps | None = None
        self.migrator: Migrator | None = None
        self.outcomes: list[Outcome] = []
        self.step = self.rank = self.size = 0
        self._experts = [[expert(layer, number) for number in range(NUM_LOGICAL)] for layer in range(NUM_LAYERS)]

    def meet(
        self, rank: int, size: int, rendezvous: str, timeout_s: float, stage_timeout_s: float, every: int, keys: Any
    ) -> None:
        """Form a group with those that are there, bring the placement up to date, and fill a new rank's slots."""
        if size != self.size:  # another cluster
            self.maps = self.migrator = None
        self.rank, self.size, self.step = rank, size, 0
        deadline = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=deadline)
        group = dist.new_group(backend="gloo", timeout=deadline)
        assert group is not None
        exchange = TorchExchange(group, timeout_s)
        agreed = reconcile(exchange, self.migrator.standing() if self.migrator else None)
        if self.migrator is not None and agreed is not None:
            self.migrator.settle(agreed)
        agreed = agreed or Standing.first(random_placement(0, size))
        if self.maps is None:
            self.maps = ExpertMaps(agreed.placement, Topology(SLOTS * size, size), rank, CPU)
            for layer, tensors in enumerate(self.store.live):
                for slot in range(SLOTS):
                    number = int(agreed.placement.physical_to_logical[layer, rank * SLOTS + slot])
                    for name, tensor in self._experts[layer][number].items():
                        tensors[name][slot] = tensor
        assert self.maps.placement.physical_to_logical.tolist() == agreed.rows
        self.migrator = Migrator(
            exchange,
            self._make(keys),
            self.store,
            self.maps,
            Topology(SLOTS * size, size),
            agreed,
            timeout_s=stage_timeout_s,
            every=every,
            checksums=True,
            tell=self.outcomes.append,
        )
        self.outcomes.clear()
        self.check_weights()

    def _make(self, keys: ClusterKeys | None) -> MakeTransports:
        if keys is None:
            return lambda notify: {"shm": ShmTransport(notify)}
        context = SecureContext(keys)
        return lambda notify: {"zmq": ZmqTransport(notify, context, "127.0.0.1")}

    def serve(self, seed: int, num_rebalances: int, delays: bool, fault: tuple[str, str] | None) -> dict[str, Any]:
        """Serve until so many rebalances have ended, well or badly, and two steps beyond."""
        assert self.migrator is not None
        assert self.maps is not None
        chance = random.Random(seed + self.rank)
        restore = arm(self, fault) if fault else None
        if delays:
            stage = self.migrator._stager.stage

            def slowly(*arguments: Any) -> Any:
                time.sleep(chance.choice([0, 0, 0.001, 0.004]))
                return stage(*arguments)

            self.migrator._stager.stage = slowly  # type: ignore[method-assign]
        proposed, first = 0, len(self.outcomes)
        longest_s = 0.0
        while True:
            ended = len(self.outcomes) - first
            if self.rank == 0 and proposed == ended and proposed < num_rebalances:
                with contextlib.suppress(CapacityError):
                    self.migrator.propose(random_placement(seed + proposed + 1, self.size))
                    proposed += 1
            done = self.forward(stop=self.rank == 0 and ended == num_rebalances)
            if delays and chance.random() < 0.2:
                time.sleep(0.002)
            begin_s = time.monotonic()
            self.migrator.step_boundary()
            longest_s = max(longest_s, time.monotonic() - begin_s)
            if len(self.outcomes) - first != ended:
                self.check_weights()
            if done and not self.migrator.active:
                break
        if restore:
            restore()
        self.check_weights()
        return {
            "steps": self.step,
            "outcomes": [(o.reason.name, o.rank, o.layer, o.num_layers) for o in self.outcomes[first:]],
            "details": [o.detail for o in self.outcomes[first:]],
            "rows": self.maps.placement.physical_to_logical.tolist(),
            "longest_s": longest_s,
        }

    def forward(self, stop: bool) -> bool:
        """A step; whether the first rank says that it is the last."""
        assert self.maps is not None
        self.step += 1
        generator = torch.Generator().manual_seed(self.step * 64 + self.rank)
        x = torch.randn(TOKENS, HIDDEN, generator=generator)
        last = False
        for layer, tensors in enumerate(self.store.live):
            wanted = torch.randint(0, NUM_LOGICAL, (TOKENS,), generator=generator).clamp_max(NUM_LOGICAL - 1)
            count = self.maps.num_choices[layer, wanted]
            replica = (torch.arange(TOKENS) + self.step) % count
            slot = self.maps.choices[layer, wanted, replica].long()
            order = torch.argsort(slot // SLOTS, stable=True)
            sizes = torch.bincount(slot // SLOTS, minlength=self.size)
            told = torch.stack([sizes, torch.full_like(sizes, int(stop))], dim=1)
            theirs = torch.empty_like(told)
            dist.all_to_all_single(theirs, told)
            last = bool(theirs[0, 1])
            mine, others = sizes.tolist(), theirs[:, 0].tolist()
            got = torch.empty(sum(others), HIDDEN + 1)
            sent = torch.cat([x[order], slot[order, None].float()], dim=1)
            dist.all_to_all_single(got, sent, others, mine)
            y = torch.empty(len(got), HIDDEN)
            for row, place in enumerate(got[:, HIDDEN].long().tolist()):
                assert place // SLOTS == self.rank
                y[row] = apply(got[row, :HIDDEN], {name: t[place % SLOTS] for name, t in tensors.items()})
            back = torch.empty_like(x)
            dist.all_to_all_single(back, y, mine, others)
            out = torch.empty_like(x)
            out[order] = back
            for token in range(TOKENS):
                right = apply(x[token], self._experts[layer][int(wanted[token])])
                assert torch.equal(out[token], right), f"step {self.step}, layer {layer}: a token differs"
            x = out
        return last

    def check_weights(self) -> None:
        """Every slot of this rank holds what the maps say, and all maps say the same."""
        assert self.maps is not None
        placement = self.maps.placement
        there = dispatch_map(placement, Topology(SLOTS * self.size, self.size), self.rank)
        for tensor, array in (
            (self.maps.physical_to_logical, placement.physical_to_logical),
            (self.maps.choices, there.choices),
            (self.maps.num_choices, there.num_choices),
        ):
            np.testing.assert_array_equal(tensor.numpy(), array)
        for layer, tensors in enumerate(self.store.live):
            for slot in range(SLOTS):
                number = int(placement.physical_to_logical[layer, self.rank * SLOTS + slot])
                for name, tensor in self._experts[layer][number].items():
                    assert torch.equal(tensors[name][slot], tensor), f"layer {layer}, slot {slot}: {name} of {number}"

    def part(self) -> None:
        """Leave the group, as after an error."""
        if self.migrator is not None:
            self.migrator.close()
            assert not self.migrator._thread.is_alive()
        if dist.is_initialized():
            dist.destroy_process_group()


def arm(rank: ServingRank, fault: tuple[str, str]) -> Callable[[], None]:
    """Let something go wrong once: what, and where. Returns what disarms it."""
    what, where = fault
    migrator = rank.migrator
    assert migrator is not None
    owner, name = {
        "staging": (migrator._stager, "_verify"),
        "handing over": (migrator._machine, "ready"),
        "committing": (rank.store, "swap_in"),
        "committed": (migrator._machine, "say"),
    }[where]
    original = getattr(owner, name)
    calls = 0

    def struck(*arguments: Any) -> Any:
        nonlocal calls
        if where == "handing over" and arguments[1] == 0:
            return original(*arguments)  # of the plan
        if where == "committed" and migrator._committed[0] == 0:
            return original(*arguments)
        calls += 1
        if calls == 2 or where in ("staging", "committed"):
            setattr(owner, name, original)
            if what == "raise":
                raise RuntimeError("as told")
            if what == "corrupt":
                for tensor in rank.store.staged.values():
                    tensor.flatten().view(torch.uint8)[:] ^= 1
            else:
                if where == "committing":  # in the middle of it
                    original(arguments[0], arguments[1][:1])
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
                time.sleep(0.2)  # it strikes another thread first
        return original(*arguments)

    setattr(owner, name, struck)
    return lambda: setattr(owner, name, original)


def run(connection: multiprocessing.connection.Connection) -> None:
    """A rank's process: orders in, answers out."""
    torch.set_num_threads(1)
    rank = ServingRank()
    connection.send(("", None))
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        try:
            connection.send(("", getattr(rank, name)(*arguments)))
        except (WorkerError, RuntimeError) as error:
            connection.send(("lost", f"{type(error).__name__}: {error}"))
        except BaseException:  # noqa: BLE001
            connection.send(("failed", traceback.format_exc()))


class Cluster:
    """Processes, and orders to all of them.

    Args:
        size: how many.
        folder: of the rendezvous.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._folder = folder
        self._meetings = 0
        self._starting: set[int] = set()
        self.size = size
        self.processes: list[Any] = [None] * size
        self._connections: list[Any] = [None] * size
        for rank in range(size):
            self.start(rank)

    def start(self, rank: int) -> None:
        """A new process."""
        ours, theirs = forking.Pipe()
        process = forking.Process(target=run, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.processes[rank], self._connections[rank] = process, ours
        self._starting.add(rank)

    def meet(
        self, timeout_s: float = 30, stage_timeout_s: float = 20, every: int = 1, size: int = 0, over_zmq: bool = False
    ) -> None:
        """Let all, or the first ``size``, form a group. Of another size it begins anew."""
        while self._starting:
            assert self.answer(self._starting.pop(), 120) == ("", None)
        keys = make_cluster_keys() if over_zmq else None
        self._meetings += 1
        self.size = size or len(self.processes)
        place = f"file://{self._folder / f'rendezvous-{self._meetings}'}"
        self.tell("meet", lambda rank: (rank, self.size, place, timeout_s, stage_timeout_s, every, keys))
        for rank in range(self.size):
            assert self.answer(rank) == ("", None)

    def tell(self, name: str, arguments: Callable[[int], tuple[Any, ...]] = lambda rank: ()) -> None:
        """Order all to do something."""
        for rank, connection in enumerate(self._connections[: self.size]):
            with contextlib.suppress(BrokenPipeError):
                connection.send((name, arguments(rank)))

    def answer(self, rank: int, timeout_s: float = 60) -> tuple[str, Any]:
        """What a rank answers: "" and its result, "lost" and why, or "dead"."""
        connection = self._connections[rank]
        assert connection.poll(stretched(timeout_s)), f"rank {rank} did not answer within {timeout_s} s"
        try:
            kind, answer = connection.recv()
        except (EOFError, ConnectionResetError):
            return "dead", None
        assert kind != "failed", f"rank {rank}:\n{answer}"
        return kind, answer

    def serve(
        self, seed: int, num_rebalances: int, delays: bool = False, fault: tuple[str, str] | None = None, at: int = -1
    ) -> None:
        """Order all to serve; ``fault`` strikes rank ``at``."""
        self.tell("serve", lambda rank: (seed, num_rebalances, delays, fault if rank == at else None))

    def served(self, timeout_s: float = 60) -> list[dict[str, Any]]:
        """What `serve` has given, on all ranks."""
        answers = [self.answer(rank, timeout_s) for rank in range(self.size)]
        assert [kind for kind, _ in answers] == [""] * self.size, answers
        results = [result for _, result in answers]
        for key in ("steps", "outcomes", "rows"):
            if key == "outcomes":
                assert len({str([(o[0], o[2:]) for o in result[key]]) for result in results}) == 1, results
            else:
                assert len({str(result[key]) for result in results}) == 1, results
        return results

    def close(self) -> None:
        """End all processes."""
        for process, connection in zip(self.processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
