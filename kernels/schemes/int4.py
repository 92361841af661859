"""Integers of four bits with a scale for each group of columns: what GPTQ's and AWQ's layouts become in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import Cut, Make, Packed, check_multiple, finite, scale_groups

PER_WORD = 8
"""Numbers of four bits in an int32."""

SYMMETRIC_ZERO = 8


@dataclass(frozen=True, eq=False)
class Int4Weight(Packed):
    """codes [rows, columns / 2] uint8, an even column in the low bits; scales [rows, groups]; (code - zero) · scale.

    Attributes:
        zeros: [rows, groups] uint8; None: 8 everywhere.
        groups: [columns] int32, the group of each column, where they are in another order than the columns; else None.
        group_size: columns of a group.
    """

    zeros: Tensor | None
    groups: Tensor | None
    group_size: int

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Exact in float32, as scales have half its bits or `finite` ones of its own; then rounded to ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        levels = unpack_nibbles(self.codes).to(wide)
        levels -= SYMMETRIC_ZERO if self.zeros is None else self._by_column(self.zeros)
        if self.groups is None:
            return scale_groups(levels, self.scales.to(wide), self.group_size).to(dtype)
        return levels.mul_(self._by_column(self.scales)).to(dtype)

    def _by_column(self, values: Tensor) -> Tensor:
        """From one a group to one a column."""
        if self.groups is None:
            return values.repeat_interleave(self.group_size, -1)
        index = self.groups.long().unsqueeze(-2).expand(*values.shape[:-1], self.columns)
        return values.gather(-1, index)


def allocate(
    make: Make,
    parts: Sequence[int],
    columns: int,
    whole_columns: int,
    group_size: int,
    scale_dtype: torch.dtype,
    *,
    symmetric: bool,
    ordered: bool,
) -> Int4Weight:
    """Memory for matrices of four bits; see `Scheme.allocate`.

    Args:
        make: called with shapes of one expert's tensors.
        parts: rows of each.
        columns: that a rank has.
        whole_columns: of the published matrices.
        group_size: columns of a group; -1: all.
        scale_dtype: of the scales.
        symmetric: whether all zeros are 8.
        ordered: whether groups consist of neighbours.

    Raises:
        ValueError: groups, or the words in which numbers are published, do not divide a size.
    """
    group_size = whole_columns if group_size == -1 else group_size
    check_multiple(f"columns, in groups of {group_size},", whole_columns, group_size)
    check_multiple("columns", columns, PER_WORD)
    for rows in parts:
        check_multiple("rows", rows, PER_WORD)
    if ordered and columns < whole_columns and group_size < whole_columns:
        check_multiple(f"columns of a rank, in groups of {group_size},", columns, group_size)
    num_groups = -(-columns // group_size) if ordered else whole_columns // group_size
    rows = sum(parts)
    groups = None
    if not ordered:
        groups = make((columns,), torch.int32)
        if groups.device.type != "meta":
            groups.fill_(-1)
    return Int4Weight(
        tuple(parts), columns, make((rows, columns // 2), torch.uint8), make((rows, num_groups), scale_dtype),
        None if symmetric else make((rows, num_groups), torch.uint8), groups, min(group_size, columns),
    )  # fmt: skip


def groups_of(weight: Int4Weight, cut: Cut, group_size: int) -> tuple[int, int]:
    """Published groups that a part needs: the first, and how many.

    Where columns are in another order than groups, every part needs all.
    """
    size = cut.columns if group_size == -1 else group_size
    if weight.groups is not None or not cut.along_columns:
        return 0, cut.columns // size
    return cut.first_column // size, weight.scales.shape[-1]


def to_scale_dtype(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the type in which they are kept.

    Raises:
        ValueError: one is not finite, or would be another number.
    """
    kept = finite(scales).to(dtype)
    if not torch.equal(kept.to(scales.dtype), scales):
        raise ValueError(f"expected scales that {dtype} holds, found {scales.dtype}")
    return kept


def unpack_nibbles(codes: Tensor) -> Tensor:
    """[…, n] uint8 → […, 2 · n] uint8, the low four bits first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """The inverse of `unpack_nibbles`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_words(words: Tensor, dim: int, order: Sequence[int] = range(PER_WORD)) -> Tensor:
    """Numbers of four bits from int32.

    Args:
        words: [m, n] int32.
        dim: along which each word becomes eight numbers.
        order: of each four bits of a word, from the lowest: which of the eight numbers they are.

    Returns:
        uint8, eight times as long along ``dim``.
    """
    places = [order.index(number) for number in range(PER_WORD)]
    shifts = torch.tensor(places, dtype=torch.int32, device=words.device) * 4
    shape = (-1, 1) if dim == 0 else (-1,)
    numbers = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & 15
    return numbers.to(torch.uint8).flatten(dim, dim + 1)
