"""Where the bytes of a KV block lie, and lists of byte ranges.

Block-major across layers, ``[block, place, part, kv_head, token, head_dim]``: a block is one contiguous run, and a
range of its layers is one run inside it. A layer's place is its index in its KV group. The parts are keys and values;
latent attention caches one row a token, from which it makes both, and so has one part and one head.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1}
_MAX_GROUPS = 8


class Runs(NamedTuple):
    """Byte ranges to copy, in ascending order of target offset. Each [runs] int64."""

    source_offsets: np.ndarray
    target_offsets: np.ndarray
    sizes: np.ndarray
    """At the source; at the target too, unless elements are converted on the way."""

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


class KVLayout(msgspec.Struct, frozen=True):
    """The layout of a rank's blocks, each of which holds the layers of one KV group."""

    num_layers: int
    """Places for layers: as many as the largest group has."""
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    num_parts: int = 2
    """Keys and values, or 1: rows that serve as both."""

    @property
    def num_planes(self) -> int:
        """Parts of all places."""
        return self.num_parts * self.num_layers

    @property
    def plane_bytes(self) -> int:
        """Bytes of one block in one part of one layer."""
        return self.num_kv_heads * self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.num_parts * self.plane_bytes

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
        return (num_blocks, self.num_layers, self.num_parts, self.num_kv_heads, self.block_tokens, self.head_dim)


class KVGroup(NamedTuple):
    """Layers whose KV of one token range shares a block: a sequence has one block table for each group."""

    layers: tuple[int, ...]
    """Of the model, in the order in which they lie in a block."""
    window: int
    """Tokens that their attention sees; 0: all. Blocks before the window may be given back."""

    def places(self, layers: range) -> range:
        """The places of those of the group's layers that are among some consecutive ones of the model."""
        return range(bisect.bisect_left(self.layers, layers.start), bisect.bisect_left(self.layers, layers.stop))

    def first_needed(self, num_tokens: int) -> int:
        """The first token whose KV the token after ``num_tokens`` sees; at most the last of them, for somebody has to
        hold the block that it goes to."""
        return max(0, min(num_tokens - self.window + 1, num_tokens - 1)) if self.window else 0

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


def coalesce(
    source_offsets: np.ndarray, target_offsets: np.ndarray, sizes: np.ndarray, scale: tuple[int, int] = (1, 1)
) -> Runs:
    """Sort ranges by target, and join those that continue each other at both ends. Pure.

    Args:
        source_offsets: [n] int64.
        target_offsets: [n] int64; the ranges at the target do not overlap.
        sizes: [n] int64, > 0, at the source.
        scale: bytes of an element at source and target: ``size`` bytes become ``size * scale[1] // scale[0]``.
    """
    if len(sizes) == 0:
        empty = np.empty(0, np.int64)
        return Runs(empty, empty, empty)
    source, target, size = source_offsets, target_offsets, sizes
    steps = np.diff(target)
    if steps.min(initial=1) <= 0:
        order = np.argsort(target, kind="stable")
        source, target, size = source[order], target[order], size[order]
        steps = np.diff(target)
    # There may be a million, so every pass over all of them counts.
    written = size if scale[0] == scale[1] else size // scale[0] * scale[1]
    joined = steps == written[:-1]
    if joined.any():
        joined &= np.diff(source) == size[:-1]
    if not joined.any():
        return Runs(source, target, size)
    starts = np.flatnonzero(np.concatenate([[True], ~joined]))
    return Runs(source[starts], target[starts], np.add.reduceat(size, starts))


def layer_groups(num_layers: int, num_groups: int) -> list[int]:
    """First layer of each of ``num_groups`` groups of nearly equal size (fewer if there are fewer layers)."""
    groups = min(num_groups, num_layers)
    return [num_layers * group // groups for group in range(groups)]
