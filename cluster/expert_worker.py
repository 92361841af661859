"""What workers that share experts leave to each other, and prepare before they serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..core.config import Config
from ..engine.expert_parallel import ExpertGroup
from ..eplb.placement import plan


class Legacy(NamedTuple):
    """What groups of workers that share experts leave to those that take their place."""

    learned: Callable[[], bytes] = lambda: b""
    """What was kept last (`eplb.learned`), the same for all workers of a group; empty: nothing. Blocks."""
    keep: Callable[[bytes], object] = lambda learned: None
    """Have the next group know this. Does not wait."""


def prepare(group: ExpertGroup, config: Config) -> None:
    """Compile what plans placements, on the rank that will. Blocks for some seconds, if it was never done here."""
    if group.movable and group.rank == 0:
        placement = group.maps.placement
        load = np.random.default_rng(0).random((placement.num_layers, placement.num_logical))
        plan(load, group.topology, placement, config.experts.balance.policy)
