"""AWQ's layout (Lin et al. 2023, arXiv:2306.00978), version "gemm": four bits, packed along the rows.

Of a matrix [rows, columns]: ``qweight`` int32 [columns, rows / 8], in the order `ORDER` within each word; ``qzeros``
int32 [groups, rows / 8], likewise; ``scales`` [groups, rows].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .destination import FLOATS, Destination
from .int4 import PER_WORD, Int4Weight, allocate, groups_of, pack_nibbles, to_scale_dtype, unpack_words
from .packed import Cut, Make, Packed, check_multiple, constant, random_bits

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of each four bits of a word, from the lowest: which of eight rows they belong to."""


@dataclass(frozen=True)
class Awq:
    """How a checkpoint carries AWQ's weights.

    Args:
        group_size: columns of a group; -1: all.
        scale_dtype: in which scales are kept.
    """

    group_size: int
    scale_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """For people."""
        return f"AWQ, 4 bits, {'whole rows' if self.group_size == -1 else f'groups of {self.group_size}'}, zero points"

    @property
    def only_experts(self) -> bool:
        """Linears too."""
        return False

    def allocate(self, make: Make, parts: Sequence[int], columns: int, whole_columns: int) -> Int4Weight:
        """See `Scheme`."""
        return allocate(
            make, parts, columns, whole_columns, self.group_size, self.scale_dtype, symmetric=False, ordered=True
        )

    def destinations(self, weight: Packed, part: int, cut: Cut) -> dict[str, Destination]:
        """See `Scheme`."""
        assert isinstance(weight, Int4Weight)
        assert weight.zeros is not None
        rows = slice(weight.start_of(part), weight.start_of(part + 1))
        num_groups = 1 if self.group_size == -1 else cut.columns // self.group_size
        check_multiple("the first row of a rank's part", cut.first_row, PER_WORD)
        by_columns = 0, cut.first_column, cut.num_columns
        by_groups = 0, *groups_of(weight, cut, self.group_size)
        by_words = 1, cut.first_row // PER_WORD, cut.num_rows // PER_WORD
        words, dummy = (torch.int32,), random_bits(torch.int32)
        return {
            "qweight": Destination(
                weight.codes[rows], (cut.columns, cut.rows // PER_WORD),
                *(by_columns if cut.along_columns else by_words),
                convert=lambda tensor: pack_nibbles(unpack_words(tensor, 1, ORDER).t()), dtypes=words, dummy=dummy,
            ),
            "qzeros": Destination(
                weight.zeros[rows], (num_groups, cut.rows // PER_WORD),
                *(by_groups if cut.along_columns else by_words),
                convert=lambda tensor: unpack_words(tensor, 1, ORDER).t(), dtypes=words, dummy=dummy,
            ),
            "scales": Destination(
                weight.scales[rows], (num_groups, cut.rows),
                *(by_groups if cut.along_columns else (1, cut.first_row, cut.num_rows)),
                dtypes=FLOATS, dummy=constant(0.005, torch.float16),
                convert=lambda tensor: to_scale_dtype(tensor, self.scale_dtype).t(),
            ),
        }  # fmt: skip
