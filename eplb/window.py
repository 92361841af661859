"""The load of the last steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PlacementError
from .placement import Placement


def to_logical(load: NDArray[np.integer], placement: Placement) -> NDArray[np.int64]:
    """[layers, logical] int64: tokens of the experts, from those of their slots.

    Args:
        load: [layers, physical] or [steps, layers, physical]; steps are added up.
        placement: what the slots held meanwhile.

    Raises:
        PlacementError: the shapes do not fit.
    """
    expected = (placement.num_layers, placement.num_physical)
    if load.ndim not in (2, 3) or load.shape[-2:] != expected:
        raise PlacementError(f"tokens of slots have the shape {load.shape}, expected [layers, slots] = {expected}")
    tokens = load.reshape(-1, *expected).sum(0, dtype=np.int64)
    logical = np.zeros((placement.num_layers, placement.num_logical), dtype=np.int64)
    rows = np.broadcast_to(np.arange(placement.num_layers)[:, None], expected)
    np.add.at(logical, (rows, placement.physical_to_logical), tokens)
    return logical


class LoadWindow:
    """Tokens of each expert in the last steps. Survives changes of the placement, because it counts experts.

    Args:
        num_steps: entries that it remembers, at least one.
        num_layers: layers.
        num_logical: experts of a layer.

    Raises:
        PlacementError: a number is below one.
    """

    def __init__(self, num_steps: int, num_layers: int, num_logical: int) -> None:
        if min(num_steps, num_layers, num_logical) < 1:
            raise PlacementError(f"a window of {num_steps} steps, {num_layers} layers, {num_logical} experts is none")
        self._entries = np.zeros((num_steps, num_layers, num_logical), dtype=np.int64)
        self._sum = np.zeros((num_layers, num_logical), dtype=np.int64)
        self._added = 0

    def add(self, load: NDArray[np.integer], placement: Placement) -> None:
        """Take in a step, or several as one entry; the oldest entry goes.

        Args:
            load: [layers, physical] or [steps, layers, physical] tokens, over all ranks.
            placement: what the slots held meanwhile.

        Raises:
            PlacementError: the shapes do not fit.
        """
        self.add_tokens(to_logical(load, placement))

    def add_tokens(self, tokens: NDArray[np.integer]) -> None:
        """`add` of [layers, logical] tokens of experts.

        Raises:
            PlacementError: the shape does not fit.
        """
        if tokens.shape != self._sum.shape:
            raise PlacementError(f"the load is of [layers, experts] = {tokens.shape}, expected {self._sum.shape}")
        entry = self._entries[self._added % len(self._entries)]
        self._sum += tokens - entry
        entry[:] = tokens
        self._added += 1

    @property
    def num_entries(self) -> int:
        """Entries that it holds."""
        return min(self._added, len(self._entries))

    @property
    def full(self) -> bool:
        """Whether it has seen as many as it remembers."""
        return self._added >= len(self._entries)

    def load(self) -> NDArray[np.float64]:
        """[layers, logical] float64: the sum, as `plan` takes it."""
        return self._sum.astype(np.float64)

    def clear(self) -> None:
        """Forget all."""
        self._entries[:] = 0
        self._sum[:] = 0
        self._added = 0
