"""`tandem experts`: recorded loads of experts, and what placing them better would make of those."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...bench.eplb import made_up
from ...bench.plot_experts import plot_experts
from ...bench.plot_tuning import require_matplotlib
from ...core.errors import ConfigError, PlacementError
from ...eplb.balance import balancedness, rank_loads
from ...eplb.load_file import RecordedLoad, read_load, write_load
from ...eplb.placement import Topology, initial_placement, plan


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
