"""Which replica of an expert the tokens of a rank go to.

To one on the rank itself, else to those on its node, else to those that got the least so far; where several remain,
tokens take turns. In one node this gives each replica an equal share of its expert's load, as planning assumes: each
gets what its own rank has, and all together what other ranks have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PlacementError
from .packing import Floats
from .placement import Placement, Topology, check_fits

_SAME = 1e-9


class DispatchMap(NamedTuple):
    """Where the tokens of one rank may go."""

    choices: NDArray[np.int32]
    """[layers, logical, max_replicas] int32: slots in ascending order, and then −1."""
    num_choices: NDArray[np.int32]
    """[layers, logical] int32: how many those are, at least one."""

    def pick(self, layer: int, experts: NDArray[np.integer], tokens: NDArray[np.integer]) -> NDArray[np.int32]:
        """The slots of the experts that tokens were routed to.

        Args:
            layer: the layer.
            experts: [tokens, k] logical experts.
            tokens: [tokens] a counter: those that follow each other take different replicas.

        Returns:
            [tokens, k] int32.
        """
        turn = tokens[:, None] % self.num_choices[layer, experts]
        slots: NDArray[np.int32] = self.choices[layer, experts, turn]
        return slots

    def shares(self, num_physical: int) -> Floats:
        """[layers, physical]: the part of its expert's tokens that each slot gets of this rank's."""
        shares = np.zeros((len(self.num_choices), num_physical))
        layer, expert, nth = np.nonzero(self.choices >= 0)
        np.add.at(shares, (layer, self.choices[layer, expert, nth]), 1.0 / self.num_choices[layer, expert])
        return shares


def dispatch_map(placement: Placement, topology: Topology, rank: int) -> DispatchMap:
    """The map of a rank. Pure: whoever computes it gets the same.

    Args:
        placement: what each slot holds.
        topology: whose slots those are.
        rank: of 0 … ranks − 1.

    Raises:
        PlacementError: they do not fit each other, or there is no such rank.
    """
    check_fits(placement, topology, placement.num_layers, placement.num_logical)
    if not 0 <= rank < topology.num_ranks:
        raise PlacementError(f"there is no rank {rank}, expected one of 0 … {topology.num_ranks - 1}")
    slots = placement.logical_to_physical[..., : placement.replica_count.max()]
    there = slots >= 0
    owner = np.where(there, slots // topology.slots_per_rank, -1)
    node = np.where(there, owner // topology.ranks_per_node, -1)
    my_node = rank // topology.ranks_per_node
    local, near = owner == rank, node == my_node
    usable = np.where(local.any(-1, keepdims=True), local, near)
    far = ~near.any(-1, keepdims=True)
    if far.any():
        usable |= far & _least(node, there, topology.num_nodes, my_node)
    # Usable ones to the front, in their order.
    order = np.argsort(~usable, axis=-1, kind="stable")
    choices = np.full(placement.logical_to_physical.shape, -1, dtype=np.int32)
    choices[..., : slots.shape[-1]] = np.take_along_axis(np.where(usable, slots, -1), order, -1)
    return DispatchMap(choices, usable.sum(-1, dtype=np.int32))


def _least(node: NDArray[np.integer], there: NDArray[np.bool_], num_nodes: int, my_node: int) -> NDArray[np.bool_]:
    """[layers, logical, replicas] those that a node without one sends to: nodes choose in turn, in units of a node."""
    near = [node == number for number in range(num_nodes)]
    got = np.zeros(node.shape)
    for here in near:
        got += here / np.maximum(here.sum(-1, keepdims=True), 1)
    least = there
    for here in near[: my_node + 1]:
        open_to = np.where(there, got, np.inf)
        least = there & (open_to <= open_to.min(-1, keepdims=True) + _SAME)
        far = ~here.any(-1, keepdims=True)
        got += far * (least / least.sum(-1, keepdims=True))
    return least
