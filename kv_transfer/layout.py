"""Where the bytes of a KV block lie, and which ranges to copy to move blocks between two caches.

Block-major across layers, ``[block, layer, K|V, kv_head, token, head_dim]``: a block is one contiguous run, and a range
of its layers is one run inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ..core.messages import GroupSpec

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1}
_MAX_GROUPS = 8


class Runs(NamedTuple):
    """Byte ranges to copy, in ascending order of target offset. Each [runs] int64."""

    source_offsets: np.ndarray
    target_offsets: np.ndarray
    sizes: np.ndarray

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


class KVLayout(msgspec.Struct, frozen=True):
    """The layout of a block, which holds the layers of one KV group."""

    num_layers: int
    """Places for layers: as many as the largest group has."""
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str

    @property
    def layer_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return 2 * self.num_kv_heads * self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.block_bytes // self.block_tokens

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of a cache of ``num_blocks``, in elements."""
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)

    def spec(self) -> GroupSpec:
        """What a handshake tells of this layout."""
        return GroupSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_tokens=self.block_tokens,
            dtype=self.dtype,
        )


class KVGroup(NamedTuple):
    """Layers whose KV of one token range shares a block: a sequence has one block table for each group."""

    layers: tuple[int, ...]
    """Of the model, in the order in which they lie in a block."""
    window: int
    """Tokens that their attention sees; 0: all. Blocks before the window may be given back."""

    def first_block(self, token: int, block_tokens: int) -> int:
        """The first block that the token at position ``token``, or a later one, sees; those before it are dead."""
        return max(0, token - self.window + 1) // block_tokens if self.window else 0


def group_layers(windows: Sequence[int]) -> tuple[KVGroup, ...]:
    """Split a model's layers into groups that can share one pool of equal blocks. Pure.

    All layers of a group see equally far. All blocks have room for the layers of the largest group; a smaller one
    leaves a part of its blocks unused. Every group costs a table of its own in every step, so there are few of them;
    padding costs memory, for every token of a sequence where all is seen, for those of a window else. Of at most
    `_MAX_GROUPS` groups: the least padding where all is seen, then in windows, then the fewest groups. So 52 layers
    with a window beside 10 without become 7 groups of at most 10, and one with a window beside 27, 4 of at most 9.

    Args:
        windows: for each layer, the tokens that its attention sees; 0: all.

    Returns:
        groups in the order of their first layers.
    """
    kinds: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)

    def cost(size: int) -> tuple[bool, int, int, int]:
        padding = {window: -len(layers) % size for window, layers in kinds.items()}
        count = sum(-(-len(layers) // size) for layers in kinds.values())
        return count > max(_MAX_GROUPS, len(kinds)), padding.get(0, 0), sum(padding.values()), count

    size = min(range(1, max(map(len, kinds.values())) + 1), key=cost)
    groups = [
        KVGroup(tuple(layers[start : start + size]), window)
        for window, layers in kinds.items()
        for start in range(0, len(layers), size)
    ]
    return tuple(sorted(groups))


def plan_copies(
    layout: KVLayout, first_layer: int, num_layers: int, source_blocks: np.ndarray, target_blocks: np.ndarray
) -> Runs:
    """Ranges that copy a range of layers of some blocks between two caches of the same layout. Pure.

    Neighbouring ranges are joined where they touch on both sides.

    Args:
        layout: of both caches.
        first_layer: first layer to copy.
        num_layers: layers to copy.
        source_blocks: [n] int64, block numbers at the source.
        target_blocks: [n] int64, all different.
    """
    offset = first_layer * layout.layer_bytes
    return coalesce(
        source_blocks * layout.block_bytes + offset,
        target_blocks * layout.block_bytes + offset,
        np.full(len(source_blocks), num_layers * layout.layer_bytes, np.int64),
    )


def coalesce(source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray) -> Runs:
    """Sort ranges by target, and join those that continue each other at both ends. Pure.

    Args:
        source_offsets: [n] int64.
        target_offsets: [n] int64; the ranges at the target do not overlap.
        sizes: [n] int64, > 0.
    """
    if len(sizes) == 0:
        empty = np.empty(0, np.int64)
        return Runs(empty, empty, empty)
    order = np.argsort(target_offsets, kind="stable")
    source, target, size = source_offsets[order], target_offsets[order], sizes[order]
    fresh = np.empty(len(size), bool)
    fresh[0] = True
    fresh[1:] = (source[1:] != source[:-1] + size[:-1]) | (target[1:] != target[:-1] + size[:-1])
    starts = np.flatnonzero(fresh)
    return Runs(source[starts], target[starts], np.add.reduceat(size, starts))


def layer_groups(num_layers: int, num_groups: int) -> list[int]:
    """First layer of each of ``num_groups`` groups of nearly equal size (fewer if there are fewer layers)."""
    groups = min(num_groups, num_layers)
    return [num_layers * group // groups for group in range(groups)]
