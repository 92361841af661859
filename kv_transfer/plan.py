"""Which byte ranges move KV between two caches that may differ in block size, heads, dtype and block numbers. Pure.

Both ends lay a block out as `layout` says; what differs is how finely a copy is cut. Where blocks and heads are equal
at both ends, a block's range of layers is one run. Where an end holds other heads, each layer's keys and its values are
one run. Where blocks begin at other tokens, each head's are.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .layout import DTYPE_BYTES, KVLayout, Runs, coalesce


class Side(NamedTuple):
    """Where one end of a copy holds a sequence's tokens."""

    layout: KVLayout
    """Of the rank's cache: `num_kv_heads` are the rank's own."""
    first_head: int
    """Of the model: the rank's first."""
    first_token: int
    """Of the sequence: the first block's first. A multiple of `layout.block_tokens`."""
    blocks: np.ndarray
    """[n] int64, block numbers of consecutive tokens; negative: no block."""


def plan_copies(source: Side, target: Side, heads: range, places: range, tokens: range) -> Runs:
    """Ranges that copy every element of (places, parts, heads, tokens) from one cache to another, and no other.

    Runs are counted in the source's bytes; where dtypes differ, the target's are that many elements of its own.
    Neighbouring ranges are joined where they touch on both sides.

    Args:
        source: where the tokens are.
        target: where they go; its blocks are all different.
        heads: of the model; both ends have them.
        places: in a block; both ends have them.
        tokens: of the sequence; both ends have blocks for them.

    Raises:
        ValueError: an end lacks a head, a place or a block.
    """
    for side in (source, target):
        last_head = side.first_head + side.layout.num_kv_heads
        if len(places) and places.stop > side.layout.num_layers:
            raise ValueError(f"{places} are not all among {side.layout.num_layers} places")
        if len(heads) and not side.first_head <= heads.start <= heads.stop <= last_head:
            raise ValueError(f"heads {heads} are not all among {side.first_head} … {last_head - 1}")
    if not (len(heads) and len(places) and len(tokens)):
        return merge([])
    ours, theirs = source.layout.block_tokens, target.layout.block_tokens
    starts = _cuts(tokens, ours, theirs)
    lengths = np.diff(starts, append=tokens.stop)
    from_, to = _token_offsets(source, starts), _token_offsets(target, starts)
    if ours != theirs:
        return _join(source, target, heads, places, _Detail.HEAD, from_, to, lengths)
    whole = lengths == ours
    all_heads = len(heads) == source.layout.num_kv_heads == target.layout.num_kv_heads
    detail = _Detail.BLOCK if all_heads else _Detail.PLANE
    runs = _join(source, target, heads, places, detail, from_[whole], to[whole], lengths[whole])
    if whole.all():
        return runs
    cut = ~whole
    rest = _join(source, target, heads, places, _Detail.HEAD, from_[cut], to[cut], lengths[cut])
    return merge([runs, rest], _scale(source, target))


def merge(parts: Sequence[Runs], scale: tuple[int, int] = (1, 1)) -> Runs:
    """One list of several; the ranges at the target do not overlap.

    Args:
        parts: any number.
        scale: bytes of an element at source and target.
    """
    if len(parts) == 1:
        return parts[0]
    nothing = np.empty(0, np.int64)
    source, target, sizes = (np.concatenate([nothing, *(part[column] for part in parts)]) for column in range(3))
    return coalesce(source, target, sizes, scale)


def cover_heads(wanted: range, offered: Sequence[range], first: int = 0) -> list[tuple[int, range]]:
    """Which rank of a peer each head is read from: every wanted head from exactly one, as few ranks as there can be.

    With fewer heads than ranks several ranks hold the same head: readers spread over them.

    Args:
        wanted: heads of the model.
        offered: for each of the peer's ranks, its heads.
        first: of ranks that hold the same heads, the one to ask: its number modulo how many there are.

    Returns:
        (rank, heads) in ascending order of heads.

    Raises:
        ValueError: no rank has some head.
    """
    cover = []
    head = wanted.start
    while head < wanted.stop:
        reach = max((heads.stop for heads in offered if heads.start <= head < heads.stop), default=head)
        if reach == head:
            raise ValueError(f"no rank holds head {head}")
        ranks = [rank for rank, heads in enumerate(offered) if heads.start <= head and heads.stop == reach]
        stop = min(reach, wanted.stop)
        cover.append((ranks[first % len(ranks)], range(head, stop)))
        head = stop
    return cover


class _Detail(enum.Enum):
    """What of a block is one range at both ends: all of it, the keys or values of a layer, or those of one head."""

    BLOCK = 0
    PLANE = 1
    HEAD = 2


def _cuts(tokens: range, *block_tokens: int) -> np.ndarray:
    """First token of each part of ``tokens`` that lies in one block at either end: [parts] int64."""
    cuts = [np.array([tokens.start], np.int64)]
    for size in set(block_tokens):
        cuts.append(np.arange(tokens.start // size + 1, -(-tokens.stop // size), dtype=np.int64) * size)
    return np.unique(np.concatenate(cuts))


def _token_offsets(side: Side, starts: np.ndarray) -> np.ndarray:
    """Byte offset of some tokens' first head in the first place of their blocks: [n] int64."""
    layout = side.layout
    index = (starts - side.first_token) // layout.block_tokens
    if index[0] < 0 or index[-1] >= len(side.blocks):
        raise ValueError(f"there are {len(side.blocks)} blocks from token {side.first_token} on; {starts[-1]} is asked")
    blocks = side.blocks[index]
    if (blocks < 0).any():
        raise ValueError(f"there is no block for token {int(starts[(blocks < 0).argmax()])}")
    offsets: np.ndarray = blocks * layout.block_bytes + starts % layout.block_tokens * _row_bytes(layout)
    return offsets


def _row_bytes(layout: KVLayout) -> int:
    """Bytes of one token in one head."""
    return layout.head_dim * DTYPE_BYTES[layout.dtype]


def _scale(source: Side, target: Side) -> tuple[int, int]:
    return DTYPE_BYTES[source.layout.dtype], DTYPE_BYTES[target.layout.dtype]


def _places(side: Side, heads: range, places: range, detail: _Detail) -> np.ndarray:
    """Offsets from a token's first head in place 0 to all the ranges that a copy of it needs: [n] int64."""
    layout = side.layout
    head_bytes = layout.block_tokens * _row_bytes(layout)
    first = places.start * layout.layer_bytes + (heads.start - side.first_head) * head_bytes
    if detail is _Detail.BLOCK:
        return np.array([first], np.int64)
    planes = first + np.arange(layout.num_parts * len(places), dtype=np.int64) * layout.plane_bytes
    if detail is _Detail.PLANE:
        return planes
    return np.add.outer(planes, np.arange(len(heads), dtype=np.int64) * head_bytes).ravel()


def _join(
    source: Side,
    target: Side,
    heads: range,
    places: range,
    detail: _Detail,
    from_: np.ndarray,
    to: np.ndarray,
    lengths: np.ndarray,
) -> Runs:
    """Runs of some parts, each of ``lengths`` tokens, cut as ``detail`` says."""
    if not len(to):
        return merge([])
    order = np.argsort(to, kind="stable")
    from_, to, lengths = from_[order], to[order], lengths[order]
    ours, theirs = _places(target, heads, places, detail), _places(source, heads, places, detail)
    num_planes = source.layout.num_parts * len(places)
    rows = {_Detail.BLOCK: num_planes * len(heads), _Detail.PLANE: len(heads), _Detail.HEAD: 1}[detail]
    sizes = lengths * rows * _row_bytes(source.layout)
    # Ascending as they are made, range by range of a block, which its parts share: so many are not sorted in passing.
    stretches = _same_counts(to // target.layout.block_bytes)
    if (sizes == sizes[0]).all():
        all_sizes = np.full(len(sizes) * len(ours), sizes[0])
    else:
        all_sizes = _spread(sizes, 0 * ours, stretches)
    return coalesce(
        _spread(from_, theirs, stretches), _spread(to, ours, stretches), all_sizes, _scale(source, target)
    )  # fmt: skip


def _same_counts(blocks: np.ndarray) -> list[tuple[slice, int]]:
    """Stretches of parts, [parts] int64 in order of their blocks, whose blocks have equally many, and how many."""
    firsts = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
    counts = np.diff(firsts, append=len(blocks))
    edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    bounds = np.append(firsts, len(blocks))
    return [
        (slice(int(bounds[start]), int(bounds[stop])), int(counts[start])) for start, stop in itertools.pairwise(edges)
    ]


def _spread(parts: np.ndarray, ranges: np.ndarray, stretches: Sequence[tuple[slice, int]]) -> np.ndarray:
    """All parts' values plus all ranges', in order of blocks, then ranges, then a block's parts: [n] int64."""
    found = np.empty(len(parts) * len(ranges), np.int64)
    for some, count in stretches:
        stretch = found[some.start * len(ranges) : some.stop * len(ranges)].reshape(-1, len(ranges), count)
        for part in range(count):  # numpy is slow where its innermost loop has few turns
            np.add.outer(parts[some][part::count], ranges, out=stretch[:, :, part])
    return found
