"""What balancing gains, and what it costs those who are served meanwhile: ranks that share the experts of some layers,
each with tokens of its own, routed by a power law.

`python -m tandem.bench.expert_serving` runs one process a rank on this machine's CPUs (gloo), or with ``--device cuda``
one on each of several GPUs (NCCL; experts are read through CUDA IPC), and prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from ..core.clock import SystemClock
from ..core.config_experts import BalanceConfig
from ..core.errors import CapacityError
from ..core.metrics import ExpertMetrics
from ..engine.expert_balancer import Balancer
from ..engine.expert_parallel import ExpertGroup, StepSize
from ..eplb.balance import balancedness, rank_loads
from ..eplb.maps import ExpertMaps
from ..eplb.placement import Placement, Topology, initial_placement, plan
from ..kernels.device import describe
from ..kernels.expert_exchange import Buffers
from ..kernels.expert_weights import ExpertWeights
from ..kernels.moe_oracle import KERNELS, ExpertsSpec, select
from ..kv_transfer.transports import Transport
from ..kv_transfer.transports.base import Notify
from ..kv_transfer.transports.cuda_ipc import CudaIpcTransport
from ..kv_transfer.transports.shm import ShmTransport
from . import machine

_META = torch.device("meta")
_COPY_PROGRAMS = 16
_MOST_S = 120.0


class Shape(NamedTuple):
    """What is served."""

    num_ranks: int = 2
    num_layers: int = 4
    num_experts: int = 16
    num_redundant: int = 4
    hidden: int = 512
    inner: int = 512
    top_k: int = 2
    num_tokens: int = 32
    """Of a rank and step; on GPUs they are sent in the direct form, else in the fixed one, as in decode steps."""
    exponent: float = 0.8
    """Of the power law."""
    device: str = "cpu"
    dtype: str = "float32"


GPU = Shape(2, 48, 128, 32, 2048, 768, 8, 64, 0.8, "cuda", "bfloat16")
"""Qwen3-30B-A3B's experts, on two GPUs."""


def serving_records(shape: Shape, num_rounds: int, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """One record.

    Args:
        shape: of the model and the group.
        num_rounds: each serves with the first placement, moves to a balanced one, serves, and moves back.
        num_steps: of each part in which nothing moves.
        seed: of routing and weights.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = json.dumps([f"file://{Path(folder) / 'rendezvous'}", shape, num_rounds, num_steps, seed])
        command = [sys.executable, "-m", f"{__package__}.expert_serving", "--rank"]
        processes = [
            subprocess.Popen(
                [*command, str(rank), "--task", task], stdout=subprocess.DEVNULL if rank else subprocess.PIPE, text=True
            )
            for rank in range(shape.num_ranks)
        ]
        try:
            printed, _ = processes[0].communicate()
            if processes[0].returncode:
                raise RuntimeError("rank 0 failed: see above")
            yield json.loads(printed)
        finally:
            for process in processes:
                process.kill()
                process.wait()


class _Rank:
    """One process."""

    def __init__(self, rank: int, rendezvous: str, shape: Shape, seed: int) -> None:
        self.rank, self.shape = rank, shape
        self.device = torch.device("cpu")
        if shape.device == "cuda":
            self.device = torch.device("cuda", rank)
            torch.cuda.set_device(self.device)
        dtype = getattr(torch, shape.dtype)
        rng = np.random.default_rng(seed)
        weights = np.arange(1, shape.num_experts + 1) ** -shape.exponent
        self.load = np.stack([rng.permutation(weights) for _ in range(shape.num_layers)])
        self.topology = Topology(shape.num_experts + shape.num_redundant, shape.num_ranks)
        self.first = initial_placement(shape.num_layers, shape.num_experts, self.topology)
        self.even = plan(self.load, self.topology, self.first, "global")
        spec = ExpertsSpec(
            dtype, num_experts=shape.num_experts, top_k=shape.top_k, hidden=shape.hidden, inner=shape.inner,
            expert_parallel=shape.num_ranks,
        )  # fmt: skip
        here = describe(self.device)
        self.kernel = KERNELS[select(spec, here).backend]
        batched = KERNELS[select(spec._replace(format="batched"), here).backend]
        maps = ExpertMaps(self.first, self.topology, rank, self.device)
        rows = shape.num_tokens if shape.device == "cuda" else 0
        buffers = Buffers(shape.num_ranks, rows, shape.hidden, shape.top_k, maps.num_local, dtype) if rows else None
        self.group = ExpertGroup(
            rank, self.topology, maps, movable=True, fixed_rows=rows, batched=batched, buffers=buffers
        )
        shapes = (maps.num_local, 2 * shape.inner, shape.hidden), (maps.num_local, shape.hidden, shape.inner)
        gate_up, down = (torch.empty(size, dtype=dtype, device=_META) for size in shapes)
        empty = ExpertWeights(gate_up, down)
        self.layers = self.group.house([empty] * shape.num_layers)
        for layer in self.layers:
            for tensor in layer.tensors().values():
                tensor.normal_(std=0.05)
        self.group.join(rendezvous, self.device)
        self.group.serve()
        assert self.group.store is not None
        settings = BalanceConfig(when="manual", window_steps=128)
        self.balancer = Balancer(
            self.group.loads, self.group.store, maps, self.topology, (self.group.exchange(), self.group.exchange()),
            self._transports, settings, "made up", ExpertMetrics(CollectorRegistry()), SystemClock(),
        )  # fmt: skip
        self.group.boundary = self.balancer.boundary
        self.maps = maps
        generator = torch.Generator(self.device).manual_seed(1000 * seed + rank)
        self.x = torch.randn(shape.num_tokens, shape.hidden, generator=generator, device=self.device).to(dtype)
        # Of each layer some routings, which take turns, drawn in advance: drawing is no part of serving.
        log_load = torch.from_numpy(np.log(self.load)).to(self.device, torch.float32)
        self.routings = [
            [self._routing(one, generator) for _ in range(16)] for one in log_load
        ]  # fmt: skip
        self.num_steps = 0

    def _routing(self, log_load: Tensor, generator: torch.Generator) -> Tensor:
        """[tokens, top_k] different experts, likelier with more load (Gumbel's trick)."""
        shape = self.shape.num_tokens, self.shape.num_experts
        noise = -torch.log(-torch.log(torch.rand(shape, generator=generator, device=self.device).clamp(1e-9, 1 - 1e-6)))
        return (log_load + noise).topk(self.shape.top_k).indices

    def _transports(self, notify: Notify) -> Mapping[str, Transport]:
        if self.device.type == "cuda":
            return {"cuda_ipc": CudaIpcTransport(notify, self.device.index, _COPY_PROGRAMS)}
        return {"shm": ShmTransport(notify)}

    def step(self) -> float:
        """Seconds from one step's tokens to the next one's."""
        begin_s = time.perf_counter()
        group, top_k = self.group, self.shape.top_k
        group.agree(group.work_of(len(self.x)), len(self.x))
        x = self.x
        for number, layer in enumerate(self.layers):
            ids = self.routings[number][self.num_steps % 16]
            weights = torch.full(ids.shape, 1 / top_k, dtype=torch.float32, device=self.device)
            if group.fixed and group.direct is not None:
                arrived, slots = group.dispatch_direct(group.direct, number, x, weights, ids)
                compute = self.kernel.each or self.kernel.compute
                rows = (len(arrived.x) // group.size,) if self.kernel.each else ()
                out = compute(arrived.x, arrived.weights, arrived.ids, layer, *rows)
                out = group.combine_direct(group.direct, number, out, slots)
            elif group.fixed:
                placed = group.dispatch_fixed(number, x, weights, ids)
                assert group.batched is not None
                out = group.combine_fixed(group.batched.compute(placed.x, placed.counts, layer), placed)
            else:
                sent = group.dispatch(number, x, weights, ids)
                out = group.combine(self.kernel.compute(sent.x, sent.weights, sent.ids, layer), sent)
            x = out / (1 + out.abs().amax())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            group.check()
        self.num_steps += 1
        return time.perf_counter() - begin_s

    def steady(self, num_steps: int) -> list[float]:
        """So many steps, in which nothing moves."""
        return [self.step() for _ in range(num_steps)]

    def move(self, target: Placement, at_least: int) -> list[float]:
        """Steps until experts are there, and at least so many."""
        if self.rank == 0:
            self._propose(target)
        wanted = target.physical_to_logical
        taken: list[float] = []
        # All ranks see the last layer change before the same step.
        while len(taken) < at_least or not np.array_equal(self.maps.placement.physical_to_logical, wanted):
            taken.append(self.step())
            if sum(taken) > _MOST_S:
                raise RuntimeError(f"experts have not moved within {_MOST_S:g} s: see the log")
        return taken

    def _propose(self, target: Placement) -> None:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                return self.balancer.propose(target)
            except CapacityError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.001)


def _serve(rank: int, rendezvous: str, shape: Shape, num_rounds: int, num_steps: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    served = _Rank(rank, rendezvous, shape, seed)
    served.steady(20)
    before: list[float] = []
    after: list[float] = []
    moving: list[float] = []
    rates: list[tuple[float, float]] = []
    for _ in range(num_rounds):
        first = served.steady(num_steps)
        moving += served.move(served.even, 1)
        served.steady(8)  # until the last attempt is put away
        second = served.steady(num_steps)
        moving += served.move(served.first, 1)
        served.steady(8)
        before += first
        after += second
        rates.append((num_steps / sum(first), num_steps / sum(second)))
    tokens = shape.num_tokens * shape.num_ranks
    loads = [rank_loads(served.load, one, served.topology) for one in (served.first, served.even)]
    computed = float(loads[0].max(-1).sum() / loads[1].max(-1).sum()) - 1
    gained = float(np.median([second / first for first, second in rates])) - 1
    steady = _percentiles(before + after)
    disturbed = _percentiles(moving)
    record = {
        "kind": "serving", **shape._asdict(),
        "exchange": "peer memory" if served.group.direct else "collectives",
        "rounds": num_rounds, "steps": num_steps, "seed": seed,
        "moving_steps": len(moving),
        "balancedness": [round(balancedness(load), 4) for load in loads],
        "tokens_per_s": [round(tokens * float(np.median([rate[side] for rate in rates])), 1) for side in (0, 1)],
        "throughput_gain": round(gained, 4), "computed_gain": round(computed, 4),
        "gained_share": round(gained / computed, 4) if computed else None, "gained_share_must": 0.8,
        "steady_itl_ms": steady, "moving_itl_ms": disturbed,
        "itl_p99_ratio": round(disturbed["p99"] / steady["p99"], 4), "itl_p99_ratio_must": 1.1,
        "machine": machine.describe(),
    }  # fmt: skip
    # Rank 0 does not leave while others still step.
    served.group.agree(StepSize.NOTHING)
    served.balancer.close()
    served.group.close()
    return record


def _percentiles(seconds: list[float]) -> dict[str, float]:
    found = np.percentile(np.array(seconds) * 1000, [50, 99, 100])
    return dict(zip(("p50", "p99", "max"), np.round(found, 3).tolist(), strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="of a rank and step")
    parser.add_argument("--exponent", type=float, default=Shape().exponent)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="of each part in which nothing moves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.task is not None:
        rendezvous, shape, *numbers = json.loads(chosen.task)
        record = _serve(chosen.rank, rendezvous, Shape(*shape), *numbers)
        if chosen.rank == 0:
            print(json.dumps(record))
        return
    shape = shape_of(chosen.device, chosen.ranks)._replace(exponent=chosen.exponent)
    shape = shape._replace(num_tokens=chosen.tokens or shape.num_tokens)
    for record in serving_records(shape, chosen.rounds, chosen.steps, chosen.seed):
        print(json.dumps(record), flush=True)


def shape_of(device: str, num_ranks: int) -> Shape:
    """What is measured by default, with slots that divide among the ranks."""
    shape = GPU if device == "cuda" else Shape()
    slots = -(-(shape.num_experts + shape.num_redundant) // num_ranks) * num_ranks
    return shape._replace(num_ranks=num_ranks, num_redundant=slots - shape.num_experts)


if __name__ == "__main__":
    main()
