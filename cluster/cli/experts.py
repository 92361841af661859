"""`tandem experts`, `rebalance` and `trace experts`: recorded loads of experts, and where experts are for them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from ...bench.eplb import made_up
from ...bench.plot_experts import plot_experts
from ...bench.plot_tuning import require_matplotlib
from ...core.errors import ConfigError, PlacementError
from ...eplb.balance import balancedness, rank_loads
from ...eplb.load_file import RecordedLoad, read_load, write_load
from ...eplb.placement import Topology, initial_placement, plan
from ..control.client import ControlClient
from .control import credentials_of

_POLL_S = 0.5


class Layout(NamedTuple):
    """What the load is placed on, see the command's help."""

    ranks: int
    slots: int | None
    nodes: int
    groups: int


def plot(path: Path, layout: Layout, output: Path) -> None:
    """Draw the load of ranks before and after placing, and print what that changes.

    Raises:
        ConfigError: the file, the layout or the output is wrong.
    """
    require_matplotlib()
    recorded = read_load(path)
    load = recorded.load()
    num_layers, num_logical = load.shape
    slots = layout.slots or -(-num_logical // layout.ranks) * layout.ranks
    try:
        topology = Topology(slots, layout.ranks, layout.nodes, layout.groups)
        current = initial_placement(num_layers, num_logical, topology)
        new = plan(load, topology)
        before, after = (rank_loads(load, placement, topology) for placement in (current, new))
    except PlacementError as error:
        raise ConfigError(error.message, fix="see --ranks, --slots, --nodes and --groups") from None
    name = (
        f"{recorded.model or path.name}: {num_layers} layers, {num_logical} experts in {slots} slots of {layout.ranks}"
    )
    try:
        plot_experts(before, after, f"{name} ranks, {int(recorded.steps.sum())} steps", output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{output}: cannot be written: {error}") from None
    sys.stdout.write(
        f"{output}: balancedness {balancedness(before):.4f} before, {balancedness(after):.4f} after, fullest ranks "
        f"{1 - after.max(-1).sum() / max(before.max(-1).sum(), 1e-300):.1%} less full\n"
    )


def synthesize(path: Path, num_layers: int, num_logical: int, num_windows: int, exponent: float, seed: int) -> None:
    """Write a made-up load, skewed by a power law that stays and noise that does not.

    Raises:
        ConfigError: the file cannot be written.
    """
    rng = np.random.default_rng(seed)
    base = made_up(rng, "zipf", num_layers, num_logical, exponent)
    tokens = rng.poisson(base, (num_windows, num_layers, num_logical))
    write_load(path, RecordedLoad(f"zipf {exponent:g}", np.full(num_windows, 1000), tokens))
    sys.stdout.write(f"{path}: {num_windows} windows, {num_layers} layers, {num_logical} experts\n")


def rebalance(pool: str, timeout_s: float, file: Path | None) -> bool:
    """Have experts placed anew, and print what became of each group; whether none failed."""
    console = Console(highlight=False, soft_wrap=True)
    with ControlClient(credentials_of(file)) as client:
        groups = client.rebalance(pool, timeout_s)
    for group in groups:
        console.print(f"{group.worker}: {group.outcome}", markup=False)
    return all(group.outcome.startswith(("done", "declined")) for group in groups)


def record(output: Path, duration_s: float | None, worker: str, file: Path | None) -> None:
    """Follow the load of a group's experts, and write it. Blocks, until Ctrl-C at the latest.

    Raises:
        ConfigError: the file cannot be written, or nothing was computed meanwhile.
        WorkerError: the cluster refuses.
    """
    try:
        output.touch()
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from None
    end_s = None if duration_s is None else time.monotonic() + duration_s
    steps: list[int] = []
    tokens: list[np.ndarray] = []
    with ControlClient(credentials_of(file)) as client:
        got = client.expert_load(worker, 0)
        last = got.last
        try:
            while True:
                over = end_s is not None and time.monotonic() >= end_s
                got = client.expert_load(worker, last)
                for entry in got.entries:
                    if entry.number != last + 1:
                        sys.stderr.write(f"entries {last + 1} to {entry.number - 1} were missed\n")
                    steps.append(entry.steps)
                    tokens.append(np.frombuffer(entry.tokens, "<i8").reshape(got.num_layers, got.num_experts))
                    last = entry.number
                if over and not got.entries:
                    break
                if not got.entries:
                    time.sleep(_POLL_S if end_s is None else max(0.0, min(_POLL_S, end_s - time.monotonic())))
        except KeyboardInterrupt:
            sys.stdout.write("\n")
    if not tokens:
        raise ConfigError(f"{output}: experts computed nothing meanwhile, or are not balanced", fix="experts.balance")
    write_load(output, RecordedLoad(got.model, np.array(steps, np.int64), np.stack(tokens)))
    sys.stdout.write(
        f"{output}: {sum(steps)} steps in {len(steps)} windows; "
        f"look: tandem experts plot {output} --ranks N; start with it: experts.balance.load_file\n"
    )
