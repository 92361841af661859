"""What a rank knows of the placement, and how ranks that come together make that equal.

Ranks that served together differ by one layer at most: in the exchange that was lost some decided to commit it, and the
others had promised to (`eplb.rebalance`). Who had promised has the layer staged, and commits it now if anybody did.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from ..core.errors import WorkerError
from .exchange import Exchange
from .placement import Placement


class Standing(msgspec.Struct, frozen=True):
    """One rank's view."""

    attempt: int
    """The last rebalance."""
    generations: list[int]
    """Of each layer: how often it was overwritten."""
    rows: list[list[int]]
    """Of each layer: the expert in each slot."""
    num_logical: int
    promised: int | None = None
    """The layer that this rank had promised to commit in an exchange that was lost."""
    promised_row: list[int] = []
    """The expert in each of its slots, if it is committed."""

    @classmethod
    def first(cls, placement: Placement) -> Standing:
        """Before any rebalance."""
        rows = placement.physical_to_logical.tolist()
        return cls(0, [0] * len(rows), rows, placement.num_logical)

    @property
    def placement(self) -> Placement:
        """Where the experts are, without what was promised.

        Raises:
            PlacementError: they cannot be so.
        """
        return Placement.from_physical(np.array(self.rows, np.int32), self.num_logical)


def reconcile(exchange: Exchange, standing: Standing | None) -> Standing | None:
    """What holds for all ranks from now on. All ranks call this together; blocks.

    Args:
        exchange: between the ranks that go on, and those that are new.
        standing: this rank's, or None if it is new and holds no experts yet.

    Returns:
        the agreed standing, or None if all ranks are new.

    Raises:
        WorkerError: a rank did not take part, or the ranks did not serve together.
    """
    frames = exchange.gather(msgspec.msgpack.encode(standing))
    return agree([msgspec.msgpack.decode(frame, type=Standing | None) for frame in frames])


def agree(standings: Sequence[Standing | None]) -> Standing | None:
    """What follows from all ranks' standings: see `reconcile`. Pure.

    Raises:
        WorkerError: the ranks did not serve together.
    """
    known = [standing for standing in standings if standing is not None]
    if not known:
        return None
    num_layers = len(known[0].rows)
    newest = max(known, key=lambda standing: sum(standing.generations))
    for rank, other in enumerate(standings):
        if other is None:
            continue
        if len(other.rows) != num_layers or other.num_logical != newest.num_logical:
            raise _strangers(rank, "has other layers or experts")
        for layer in range(num_layers):
            mine = other.generations[layer], other.rows[layer]
            if other.promised == layer and mine[0] + 1 == newest.generations[layer]:
                mine = mine[0] + 1, other.promised_row
            if mine != (newest.generations[layer], newest.rows[layer]):
                raise _strangers(rank, f"has layer {layer} in a version that it cannot bring to the others'")
    attempt = max(standing.attempt for standing in known)
    return Standing(attempt, newest.generations, newest.rows, newest.num_logical)


def _strangers(rank: int, why: str) -> WorkerError:
    return WorkerError(
        f"rank {rank} {why}: these ranks did not serve together",
        fix="start all ranks of the group anew, from the model",
    )
