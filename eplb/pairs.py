"""What the fullest of ranks with two slots each cannot be below: compiled.

If no rank has more than a limit, a replica whose share is above limit − t has one below t beside it; for any t up to
half the limit, and each has its own. So there are at least as many replicas up to t as above limit − t. How many there
are depends on the numbers of replicas, and for one t the best numbers are found exactly, expert by expert.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.compiled import compiled
from .packing import Floats

_HALVINGS = 16
_MOST_PARTS = 128
"""Different t for a limit."""
_ROUNDING = 1 + 1e-12
_NONE = 1 << 40


def raise_for_pairs(load: Floats, num_slots: int, least: Floats) -> Floats:
    """[layers] a limit that some rank is above or at, however slots are given to replicas and these are paired.

    Args:
        load: [layers, logical].
        num_slots: two for each rank.
        least: [layers] such a limit that is known.
    """
    raised = least.copy()
    for layer, weights in enumerate(load):
        if not weights.any():
            continue
        low, high = least[layer], 2 * least[layer]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _exceed(weights, num_slots, middle, _parts(weights, middle)):
                low = middle
            else:
                high = middle
        raised[layer] = low
    return raised


def _parts(weights: Floats, limit: float) -> Floats:
    """The t of `limit` that can make a difference, or a selection: where a share is t, or the limit without it."""
    shares = np.unique(weights[:, None] / np.arange(1, 4))
    parts = np.unique(np.concatenate([shares, limit - shares, [limit / 2]]))
    parts = parts[(parts >= 0) & (parts <= limit / 2)]
    return np.ascontiguousarray(parts[:: -(-len(parts) // _MOST_PARTS)])


@compiled
def _exceed(weights: Floats, num_slots: int, limit: float, parts: Floats) -> bool:
    """Whether for some t there are more replicas above limit − t than up to t, whatever the numbers of replicas."""
    needed = np.empty(len(weights), dtype=np.int64)
    for expert in range(len(weights)):
        needed[expert] = max(1, int(np.ceil(weights[expert] / limit / _ROUNDING)))
    spare = num_slots - needed.sum()
    if spare < 0:
        return True
    fewest = np.empty(spare + 1, dtype=np.int64)
    most = 0
    for part in parts:
        most = max(most, _fewest_without_partner(weights, needed, limit, part, fewest))
        if most > 0:
            break
    return most > 0


@compiled
def _fewest_without_partner(
    weights: Floats, needed: NDArray[np.int64], limit: float, part: float, fewest: NDArray[np.int64]
) -> int:
    """The least, over all numbers of replicas that use up the slots, of those above limit − t less those up to t.

    Args:
        weights: [experts].
        needed: [experts] replicas that each has at least.
        limit: see the module.
        part: t.
        fewest: [spare slots + 1], overwritten: of the experts so far, with so many slots beyond what they need.
    """
    spare = len(fewest) - 1
    heavy, light = (limit - part) * _ROUNDING, part * _ROUNDING
    fewest[:] = _NONE
    fewest[0] = 0
    for expert in range(len(weights)):
        for used in range(spare, -1, -1):
            least = _NONE
            for more in range(used + 1):
                count = needed[expert] + more
                share = weights[expert] / count
                value = fewest[used - more]
                if share > heavy:
                    value += count
                elif share <= light:
                    value -= count
                least = min(least, value)
            fewest[used] = least
    return int(fewest[spare])
