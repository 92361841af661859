"""64-bit sums of a KV cache's elements, whichever blocks hold them.

Each row (one token, one head, one part of one layer: keys or values) is cut into words; a word is mixed with its
position among all words of its unit of tokens, and the results are added. The mixing is a step of SplitMix64 (Steele et
al. 2014, doi:10.1145/2660193.2660195): a changed bit changes half of the result's, equal changes at two places do not
cancel. It finds errors; it does not resist an adversary.
"""

from __future__ import annotations

import numpy as np

from .compiled import AVAILABLE, compiled

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = 0xBF58476D1CE4E5B9


def reference(
    cache: np.ndarray,
    sums: np.ndarray,
    blocks: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    layers: np.ndarray,
    first_place: int,
    num_places: int,
    num_planes: int,
    block_tokens: int,
    row_bytes: int,
    unit: int,
    first_unit: int,
) -> None:
    """Add the words of some tokens to the sums of their units.

    Args:
        cache: [blocks, num_places, num_planes, block_tokens, row_bytes] as [bytes] uint8.
        sums: [units] uint64, added to.
        blocks: [n] int64.
        starts: [n] int64: the first token to sum of each block, as a position of the sequence.
        stops: [n] int64: where its tokens end.
        layers: [places] int64: what tells the places apart, at ``first_place`` and after.
        first_place: the first place to sum.
        num_places: of a block.
        num_planes: of a place: its heads' keys, then their values; or rows that serve as both.
        block_tokens: tokens of a block.
        row_bytes: of one token in one head.
        unit: tokens of a sum.
        first_unit: number of the unit that ``sums[0]`` is for.
    """
    size = word_bytes(row_bytes)
    words = cache.reshape(-1, num_places, num_planes, block_tokens, row_bytes // size, size)
    for block, start, stop in zip(blocks.tolist(), starts.tolist(), stops.tolist(), strict=True):
        for token in range(start, stop):
            for place, layer in enumerate(layers.tolist(), first_place):
                for plane in range(num_planes):
                    row = words[block, place, plane, token % block_tokens]
                    first = ((layer * num_planes + plane) * unit + token % unit) * len(row)
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
    num_planes: int,
    block_tokens: int,
    row_bytes: int,
    unit: int,
    first_unit: int,
) -> None:
    """`reference`, without the GIL."""
    sizes = first_place, num_places, num_planes, block_tokens
    if not AVAILABLE:
        reference(cache, sums, blocks, starts, stops, layers, *sizes, row_bytes, unit, first_unit)
        return
    size = word_bytes(row_bytes)
    words = cache.view(f"<u{size}")
    _sum(words, sums, blocks, starts, stops, layers, *sizes, row_bytes // size, unit, first_unit)


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
    num_planes: int,
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
                for plane in range(num_planes):
                    block_row = (blocks[b] * num_places + first_place + p) * num_planes + plane
                    at = (block_row * block_tokens + token % block_tokens) * row_words
                    first = ((layers[p] * num_planes + plane) * unit + token % unit) * row_words + 1
                    part = words[at : at + count]
                    for i in range(count):
                        mixed = np.uint64(part[i]) ^ (np.uint64(first + i) * golden)
                        mixed = (mixed ^ (mixed >> np.uint64(30))) * mix
                        total += mixed ^ (mixed >> np.uint64(27))
            sums[token // unit - first_unit] += total
            token = stop
