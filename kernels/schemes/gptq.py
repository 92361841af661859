"""GPTQ's layout (Frantar et al. 2022, arXiv:2210.17323): four bits, packed along the columns.

Of a matrix [rows, columns]: ``qweight`` int32 [columns / 8, rows]; ``scales`` [groups, rows]; ``qzeros`` int32
[groups, rows / 8], of which the first version of the format stores one less; ``g_idx`` int32 [columns], the group of
each column, which is in order unless columns were quantised in the order of their activations (``desc_act``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .destination import FLOATS, Destination
from .int4 import (
    PER_WORD,
    SYMMETRIC_ZERO,
    Int4Weight,
    allocate,
    groups_of,
    pack_nibbles,
    to_scale_dtype,
    unpack_words,
)
from .packed import Cut, Make, Packed, check_multiple, constant, random_bits


@dataclass(frozen=True)
class Gptq:
    """How a checkpoint carries GPTQ's weights.

    Args:
        group_size: columns of a group; -1: all.
        symmetric: whether every zero is 8.
        desc_act: whether groups are made of columns in any order.
        zero_offset: what is added to a stored zero: 1 in the format's first version, 0 in the second.
        scale_dtype: in which scales are kept.
    """

    group_size: int
    symmetric: bool
    desc_act: bool
    zero_offset: int = 1
    scale_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """For people."""
        group = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        zeros = "" if self.symmetric else ", zero points"
        return f"GPTQ, 4 bits, {group}{zeros}{', in the order of activations' if self.desc_act else ''}"

    @property
    def only_experts(self) -> bool:
        """Linears too."""
        return False

    def allocate(self, make: Make, parts: Sequence[int], columns: int, whole_columns: int) -> Int4Weight:
        """See `Scheme`. In the order of activations a rank has all scales, whichever columns it has."""
        return allocate(
            make, parts, columns, whole_columns, self.group_size, self.scale_dtype,
            symmetric=self.symmetric, ordered=not self.desc_act,
        )  # fmt: skip

    def destinations(self, weight: Packed, part: int, cut: Cut) -> dict[str, Destination]:
        """See `Scheme`."""
        assert isinstance(weight, Int4Weight)
        rows = slice(weight.start_of(part), weight.start_of(part + 1))
        size = cut.columns if self.group_size == -1 else self.group_size
        num_groups = cut.columns // size
        first_group, group_count = groups_of(weight, cut, self.group_size)
        check_multiple("the first row of a rank's part", cut.first_row, PER_WORD)
        check_multiple("the first column of a rank's part", cut.first_column, PER_WORD)
        by_columns = 0, cut.first_column // PER_WORD, cut.num_columns // PER_WORD
        by_groups = 0, first_group, group_count
        return {
            "qweight": Destination(
                weight.codes[rows], (cut.columns // PER_WORD, cut.rows),
                *(by_columns if cut.along_columns else (1, cut.first_row, cut.num_rows)),
                dtypes=(torch.int32,), dummy=random_bits(torch.int32),
                convert=lambda words: pack_nibbles(unpack_words(words, 0).t()),
            ),
            "scales": Destination(
                weight.scales[rows], (num_groups, cut.rows),
                *(by_groups if cut.along_columns else (1, cut.first_row, cut.num_rows)),
                dtypes=FLOATS, dummy=constant(0.005, torch.float16),
                convert=lambda scales: to_scale_dtype(scales, self.scale_dtype).t(),
            ),
            "qzeros": self._zeros(
                weight, rows, Destination(
                    weight.scales, (num_groups, cut.rows // PER_WORD),
                    *(by_groups if cut.along_columns else (1, cut.first_row // PER_WORD, cut.num_rows // PER_WORD)),
                    dtypes=(torch.int32,), dummy=self._dummy_zeros,
                ),
            ),
            "g_idx": self._groups(weight, cut, size),
            # Some writers give zeros to modules without a bias.
            "bias": Destination(weight.codes[0, :0], (cut.rows,), 0, 0, cut.rows, convert=_check_bias, optional=True),
        }  # fmt: skip

    def _dummy_zeros(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, _word(SYMMETRIC_ZERO - self.zero_offset), dtype=torch.int32, device=generator.device)

    def _zeros(self, weight: Int4Weight, rows: slice, published: Destination) -> Destination:
        if weight.zeros is not None:
            return published._replace(tensor=weight.zeros[rows], convert=self._unpack_zeros)
        # All alike: looked at, not kept.
        nothing = weight.codes[rows.start : rows.start, :0]
        return published._replace(tensor=nothing, convert=self._check_zeros)

    def _unpack_zeros(self, words: Tensor) -> Tensor:
        return ((unpack_words(words, 1) + self.zero_offset) & 15).t()

    def _check_zeros(self, words: Tensor) -> Tensor:
        zeros = self._unpack_zeros(words)
        if not bool((zeros == SYMMETRIC_ZERO).all()):
            other = int(zeros[zeros != SYMMETRIC_ZERO][0])
            raise ValueError(f"config.json says sym, so every zero is to be {SYMMETRIC_ZERO}; found {other}")
        return words.new_empty(0, 0)

    def _groups(self, weight: Int4Weight, cut: Cut, size: int) -> Destination:
        place = weight.codes[:0, 0] if weight.groups is None else weight.groups
        return Destination(
            place, (cut.columns,), 0, cut.first_column, cut.num_columns, dtypes=(torch.int32, torch.int64),
            convert=lambda index: self._check_groups(index, weight, cut, size), optional=weight.groups is None,
            dummy=lambda shape, generator: (torch.arange(*shape, device=generator.device) // size).int(),
        )  # fmt: skip

    def _check_groups(self, index: Tensor, weight: Int4Weight, cut: Cut, size: int) -> Tensor:
        if weight.groups is None:
            columns = torch.arange(cut.first_column, cut.first_column + cut.num_columns, device=index.device)
            if not torch.equal(index.long(), columns // size):
                raise ValueError("config.json says that columns are in order (desc_act false), and they are not")
            return index[:0]
        if int(index.min()) < 0 or int(index.max()) >= cut.columns // size:
            found = f"{int(index.min())} … {int(index.max())}"
            raise ValueError(f"expected groups within 0 … {cut.columns // size - 1}, found {found}")
        # Matrices with the same inputs are quantised in the same order.
        before = weight.groups
        if int(before[0]) >= 0 and not torch.equal(before, index.to(before)):
            raise ValueError("expected the order of the matrix that is computed together with it, found another")
        return index


def _check_bias(bias: Tensor) -> Tensor:
    if bool(bias.any()):
        raise ValueError("expected none, or zeros; found others")
    return bias[:0]


def _word(number: int) -> int:
    """Eight times the same four bits, as an int32."""
    word = sum(number << 4 * place for place in range(PER_WORD))
    return word - (1 << 32) if word >= 1 << 31 else word
