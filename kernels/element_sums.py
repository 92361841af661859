"""64-bit sums of a KV cache's elements, whichever blocks hold them.

Each row (one token, one head, one part of one layer: keys or values) is cut into words; a word is mixed with its
position among all words of its unit of tokens, and the results are added. The mixing is a step of SplitMix64 (Steele et
al. 2014, doi:10.1145/2660193.2660195): a changed bit changes half of the result's, equal changes at two places do not
cancel. It finds errors; it does not resist an adversary. As results are added modulo 2⁶⁴, the order does not count:
ranks, blocks and the programs of a GPU may each add their part.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .compiled import AVAILABLE, compiled
from .on_gpu import kernel_varying, tl

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = 0xBF58476D1CE4E5B9
_TILE_WORDS = 2048
_WARPS = 8


def reference(
    cache: np.ndarray,
    sums: np.ndarray,
    blocks: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    layers: np.ndarray,
    first_place: int,
    num_places: int,
    planes: np.ndarray,
    all_planes: int,
    block_tokens: int,
    row_bytes: int,
    unit: int,
    first_unit: int,
) -> None:
    """Add the words of some tokens to the sums of their units.

    Args:
        cache: [blocks, num_places, planes, block_tokens, row_bytes] as [bytes] uint8.
        sums: [units] uint64, added to.
        blocks: [n] int64.
        starts: [n] int64: the first token to sum of each block, as a position of the sequence.
        stops: [n] int64: where its tokens end.
        layers: [places] int64: what tells the places apart, at ``first_place`` and after.
        first_place: the first place to sum.
        num_places: of a block.
        planes: [planes] int64: of a place, its heads' keys, then their values, or rows that serve as both, by their
            numbers among all the model's.
        all_planes: how many the model has.
        block_tokens: tokens of a block.
        row_bytes: of one token in one head.
        unit: tokens of a sum.
        first_unit: number of the unit that ``sums[0]`` is for.
    """
    size = word_bytes(row_bytes)
    words = cache.reshape(-1, num_places, len(planes), block_tokens, row_bytes // size, size)
    for block, start, stop in zip(blocks.tolist(), starts.tolist(), stops.tolist(), strict=True):
        for token in range(start, stop):
            for place, layer in enumerate(layers.tolist(), first_place):
                for at_plane, plane in enumerate(planes.tolist()):
                    row = words[block, place, at_plane, token % block_tokens]
                    first = ((layer * all_planes + plane) * unit + token % unit) * len(row)
                    for i, word in enumerate(row):
                        value = int.from_bytes(word.tobytes(), "little")
                        mixed = (value ^ ((first + i + 1) * _GOLDEN)) & _MASK
                        mixed = ((mixed ^ (mixed >> 30)) * _MIX) & _MASK
                        at = token // unit - first_unit
                        sums[at] = (int(sums[at]) + (mixed ^ (mixed >> 27))) & _MASK


def native(
    cache: np.ndarray,
    sums: np.ndarray,
    blocks: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    layers: np.ndarray,
    first_place: int,
    num_places: int,
    planes: np.ndarray,
    all_planes: int,
    block_tokens: int,
    row_bytes: int,
    unit: int,
    first_unit: int,
) -> None:
    """`reference`, without the GIL."""
    sizes = first_place, num_places, planes, all_planes, block_tokens
    if not AVAILABLE:
        reference(cache, sums, blocks, starts, stops, layers, *sizes, row_bytes, unit, first_unit)
        return
    size = word_bytes(row_bytes)
    words = cache.view(f"<u{size}")
    _sum(words, sums, blocks, starts, stops, layers, *sizes, row_bytes // size, unit, first_unit)


def lay_out(
    blocks: np.ndarray, starts: np.ndarray, stops: np.ndarray, block_tokens: int, unit: int, first_unit: int
) -> np.ndarray:
    """What `fused` takes of the arguments of `reference`: parts of blocks, each of one unit. Pure.

    Returns:
        [5, parts] int64: block, first token in it, tokens, first token in its unit, number among ``sums``.
    """
    bounds = np.union1d(starts, np.concatenate([stops, _between(int(starts.min()), int(stops.max()), unit)]))
    block = np.searchsorted(starts, bounds[:-1], side="right") - 1
    inside = (block >= 0) & (bounds[:-1] < stops[block])
    first, block = bounds[:-1][inside], block[inside]
    lists = blocks[block], first % block_tokens, np.diff(bounds)[inside], first % unit, first // unit - first_unit
    return np.stack(lists).astype(np.int64)


def _between(start: int, stop: int, unit: int) -> np.ndarray:
    """Where units begin between two tokens."""
    return np.arange(start // unit + 1, -(-stop // unit), dtype=np.int64) * unit


def fused(
    cache: int,
    sums: Tensor,
    parts: Tensor,
    layers: Tensor,
    first_place: int,
    num_places: int,
    planes: Tensor,
    all_planes: int,
    block_tokens: int,
    row_bytes: int,
    unit: int,
) -> None:
    """`reference` on a GPU, on the current stream. Does not wait for it. Arguments not told are as there.

    Args:
        cache: address that the GPU can read, of a peer's memory too; a multiple of 8.
        sums: [units] int64, on the GPU: the same bits.
        parts: of `lay_out`, on the GPU.
        layers: [places] int64, on the GPU.
        planes: [planes] int64, on the GPU.
    """
    num_parts = parts.shape[1]
    if not num_parts or not len(layers):
        return
    size = word_bytes(row_bytes)
    _sum_kernel[(num_parts, len(layers))](
        cache, sums, parts, num_parts, layers, planes, len(planes), first_place, num_places, all_planes, block_tokens,
        row_bytes // size, unit, _TRITON_WORDS[size], size, _TILE_WORDS, num_warps=_WARPS,
    )  # fmt: skip


_TRITON_WORDS = {} if tl is None else {8: tl.uint64, 4: tl.uint32, 2: tl.uint16, 1: tl.uint8}


@kernel_varying(
    "cache", "sums", "parts", "num_parts", "layers", "planes", "num_planes", "first_place", "num_places", "all_planes",
    "block_tokens", "row_words", "unit",
)  # fmt: skip
def _sum_kernel(  # type: ignore[no-untyped-def]
    cache, sums, parts, num_parts, layers, planes, num_planes, first_place, num_places, all_planes, block_tokens,
    row_words, unit, WORD: tl.constexpr, WORD_BYTES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    place = tl.program_id(1)
    block = tl.load(parts + part)
    token = tl.load(parts + num_parts + part)
    count = (tl.load(parts + 2 * num_parts + part) * row_words).to(tl.int32)
    token_of_unit = tl.load(parts + 3 * num_parts + part)
    target = sums + tl.load(parts + 4 * num_parts + part)
    layer = tl.load(layers + place)
    each = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.uint64)
    # All planes' words, one plane's after the other's: a tile may end in the middle of one.
    for start in range(0, count * num_planes, TILE):
        there = start + each < count * num_planes
        plane = (start + each) // count
        word = start + each - plane * count
        row = (block * num_places + first_place + place) * num_planes + plane
        at = (row * block_tokens + token) * row_words + word
        value = tl.load((cache + at * WORD_BYTES).to(tl.pointer_type(WORD)), mask=there, other=0).to(tl.uint64)
        number = tl.load(planes + plane, mask=there, other=0)
        position = ((layer * all_planes + number) * unit + token_of_unit) * row_words + word + 1
        mixed = value ^ (position.to(tl.uint64) * 0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
        total += tl.where(there, mixed ^ (mixed >> 27), 0)
    tl.atomic_add(target, tl.sum(total, 0).to(tl.int64, bitcast=True), sem="relaxed")


def word_bytes(row_bytes: int) -> int:
    """Bytes of a word: the largest of 8, 4, 2 and 1 that rows are made of."""
    return next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)


@compiled
def _sum(
    words: np.ndarray,
    sums: np.ndarray,
    blocks: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    layers: np.ndarray,
    first_place: int,
    num_places: int,
    planes: np.ndarray,
    all_planes: int,
    block_tokens: int,
    row_words: int,
    unit: int,
    first_unit: int,
) -> None:
    golden, mix = np.uint64(_GOLDEN), np.uint64(_MIX)
    for b in range(len(blocks)):
        token = starts[b]
        while token < stops[b]:
            # Tokens of one block and one unit lie together in every head.
            stop = min(stops[b], (token // unit + 1) * unit)
            count = (stop - token) * row_words
            total = np.uint64(0)
            for p in range(len(layers)):
                for h in range(len(planes)):
                    block_row = (blocks[b] * num_places + first_place + p) * len(planes) + h
                    at = (block_row * block_tokens + token % block_tokens) * row_words
                    first = ((layers[p] * all_planes + planes[h]) * unit + token % unit) * row_words + 1
                    part = words[at : at + count]
                    for i in range(count):
                        mixed = np.uint64(part[i]) ^ (np.uint64(first + i) * golden)
                        mixed = (mixed ^ (mixed >> np.uint64(30))) * mix
                        total += mixed ^ (mixed >> np.uint64(27))
            sums[token // unit - first_unit] += total
            token = stop
