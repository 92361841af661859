"""How moving experts disturbs those who serve: ranks over gloo on this machine's CPUs, and what a step takes meanwhile.

`python -m tandem.bench.expert_moves` prints JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..core.errors import CapacityError
from ..eplb.exchange import TorchExchange
from ..eplb.maps import ExpertMaps
from ..eplb.migrate import Migrator, Outcome
from ..eplb.placement import Placement, Topology
from ..eplb.rebalance import Reason
from ..eplb.standing import Standing
from ..eplb.store import ExpertLayout, ExpertStore, ExpertTensor
from ..kv_transfer.transports.shm import ShmTransport
from . import machine

_TIMEOUT_S = 120.0


class Shape(NamedTuple):
    """What is served."""

    num_ranks: int = 2
    num_layers: int = 4
    num_logical: int = 16
    num_slots: int = 10
    """Of a rank and layer."""
    hidden: int = 512
    inner: int = 256
    num_tokens: int = 64
    """Of a rank and step."""
    every: int = 4
    """Steps between two exchanges."""


def migration_records(shape: Shape, num_rebalances: int, num_steps: int) -> Iterator[dict[str, Any]]:
    """One record: steps without and with rebalancing, and what the rebalances took.

    Args:
        shape: of the model, and the group.
        num_rebalances: each to a random placement, one right after the other.
        num_steps: without rebalancing, to compare with.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        task = json.dumps([rendezvous, shape, num_rebalances, num_steps])
        command = [sys.executable, "-m", f"{__package__}.expert_moves", "--rank"]
        processes = [
            subprocess.Popen([*command, str(rank), "--task", task], stdout=subprocess.PIPE, text=True)
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


def _placement(seed: int, shape: Shape) -> Placement:
    generator = np.random.default_rng(seed)
    rest = shape.num_ranks * shape.num_slots - shape.num_logical
    rows = [
        generator.permutation([*range(shape.num_logical), *generator.integers(0, shape.num_logical, rest)])
        for _ in range(shape.num_layers)
    ]
    return Placement.from_physical(np.array(rows, np.int32), shape.num_logical)


def _serve(rank: int, rendezvous: str, shape: Shape, num_rebalances: int, num_steps: int) -> dict[str, Any] | None:
    """One rank; the first returns the record."""
    torch.set_num_threads(1)
    deadline = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=shape.num_ranks, timeout=deadline)
    group = dist.new_group(backend="gloo", timeout=deadline)
    assert group is not None
    tensors = (
        ExpertTensor("gate_up", (2 * shape.inner, shape.hidden), "float32"),
        ExpertTensor("down", (shape.hidden, shape.inner), "float32"),
    )
    cpu = torch.device("cpu")
    store = ExpertStore(ExpertLayout(tensors, shape.num_layers, shape.num_slots), cpu)
    for layer in store.live:
        for tensor in layer.values():
            tensor.normal_(std=0.05)
    first = Standing.first(_placement(0, shape))
    maps = ExpertMaps(first.placement, Topology(shape.num_ranks * shape.num_slots, shape.num_ranks), rank, cpu)
    outcomes: list[Outcome] = []
    migrator = Migrator(
        TorchExchange(group, _TIMEOUT_S),
        lambda notify: {"shm": ShmTransport(notify)},
        store,
        maps,
        Topology(shape.num_ranks * shape.num_slots, shape.num_ranks),
        first,
        timeout_s=_TIMEOUT_S,
        every=shape.every,
        tell=outcomes.append,
    )
    x = torch.randn(shape.num_tokens, shape.hidden)

    def step(stop: bool) -> tuple[float, float, bool]:
        """Its seconds, those of its boundary, and whether rank 0 says that it is the last."""
        begin_s = time.perf_counter()
        for layer in store.live:
            part = x.chunk(shape.num_slots)
            for tokens, gate_up, down in zip(part, layer["gate_up"], layer["down"], strict=True):
                gate, up = (tokens @ gate_up.T).chunk(2, dim=1)
                out = (torch.nn.functional.silu(gate) * up) @ down.T
            dist.all_reduce(out)
        last = torch.tensor([float(stop)])
        dist.all_reduce(last)
        boundary_s = time.perf_counter()
        migrator.step_boundary()
        end_s = time.perf_counter()
        return end_s - begin_s, end_s - boundary_s, bool(last)

    for _ in range(20):
        step(False)
    steady = [step(False) for _ in range(num_steps)]
    moving, proposed, last = [], 0, False
    while not last:
        if rank == 0 and proposed == len(outcomes) < num_rebalances:
            with contextlib.suppress(CapacityError):  # the last one is still being put away
                migrator.propose(_placement(proposed + 1, shape))
                proposed += 1
        moving.append(step(rank == 0 and len(outcomes) == num_rebalances))
        last = moving[-1][2]
    dist.barrier()
    migrator.close()
    dist.destroy_process_group()
    if rank:
        return None
    done = [outcome for outcome in outcomes if outcome.reason is Reason.DONE]
    seconds = sum(outcome.duration_s for outcome in done)
    return {
        "name": "expert_migration",
        **shape._asdict(),
        "transport": "shm",
        "expert_bytes": store.layout.expert_bytes,
        "rebalances": len(outcomes),
        "done": len(done),
        "experts_moved": sum(outcome.num_experts for outcome in done),
        "bytes_read": sum(outcome.num_bytes for outcome in done),
        "rebalance_s": round(seconds / max(1, len(done)), 4),
        "layer_s": round(seconds / max(1, sum(outcome.num_layers for outcome in done)), 4),
        "steady_step_ms": _percentiles([one[0] for one in steady]),
        "moving_step_ms": _percentiles([one[0] for one in moving]),
        "steady_boundary_ms": _percentiles([one[1] for one in steady]),
        "moving_boundary_ms": _percentiles([one[1] for one in moving]),
        "machine": machine.describe(),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    found = np.percentile(np.array(seconds) * 1000, [50, 99, 100])
    return dict(zip(("p50", "p99", "max"), np.round(found, 3).tolist(), strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=Shape().num_ranks)
    parser.add_argument("--rebalances", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="without rebalancing, to compare with")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.task is not None:
        rendezvous, shape, num_rebalances, num_steps = json.loads(chosen.task)
        record = _serve(chosen.rank, rendezvous, Shape(*shape), num_rebalances, num_steps)
        if record is not None:
            print(json.dumps(record))
        return
    for record in migration_records(Shape(num_ranks=chosen.ranks), chosen.rebalances, chosen.steps):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
