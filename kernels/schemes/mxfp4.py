"""MXFP4 (OCP Microscaling Formats 1.0, 2023): four bits, e2m1, and for each 32 columns a power of two, e8m0.

Published by gpt-oss for the experts of a layer together: ``gate_up_proj_blocks`` uint8 [experts, 2 · inner,
hidden / 32, 16], two numbers a byte, the first in the low bits; ``gate_up_proj_scales`` uint8 [experts, 2 · inner,
hidden / 32]; ``down_proj_…`` likewise. Rows of gate and up alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .destination import Destination
from .int4 import unpack_nibbles
from .packed import Cut, Make, Packed, check_multiple, constant, random_bits, scale_groups

BLOCK = 32
"""Columns of a scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Numbers of the three low bits; the fourth is the sign."""

_BIAS = 127
_NAN = 255


@dataclass(frozen=True, eq=False)
class Mxfp4Weight(Packed):
    """codes [rows, columns / 2] uint8, an even column in the low bits; scales [rows, columns / 32] uint8, of 2^(s-127)
    the s."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Exact, but for what ``dtype`` does not reach."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.tensor((*E2M1, *(-number for number in E2M1)), dtype=wide, device=self.codes.device)
        numbers = table[unpack_nibbles(self.codes).int()]
        powers = torch.ldexp(torch.ones_like(self.scales, dtype=wide), self.scales.int() - _BIAS)
        return scale_groups(numbers, powers, BLOCK).to(dtype)


@dataclass(frozen=True)
class Mxfp4:
    """How a checkpoint carries MXFP4."""

    @property
    def name(self) -> str:
        """For people."""
        return "MXFP4"

    @property
    def only_experts(self) -> bool:
        """All of a layer's in one tensor."""
        return True

    def allocate(self, make: Make, parts: Sequence[int], columns: int, whole_columns: int) -> Mxfp4Weight:
        """See `Scheme`."""
        check_multiple("columns, in blocks of 32,", columns, BLOCK)
        rows = sum(parts)
        return Mxfp4Weight(
            tuple(parts), columns, make((rows, columns // 2), torch.uint8), make((rows, columns // BLOCK), torch.uint8)
        )

    def destinations(self, weight: Packed, part: int, cut: Cut) -> dict[str, Destination]:
        """See `Scheme`: of all parts and all experts, so that ``part`` is 0, and ``cut`` is of the rows of both."""
        assert isinstance(weight, Mxfp4Weight)
        assert part == 0
        experts, num_parts = len(weight), len(weight.parts)
        blocks = weight.codes.view(*weight.codes.shape[:2], -1, BLOCK // 2)
        dim, start, size = 1, cut.first_row, cut.num_rows
        if cut.along_columns:
            dim, start, size = 2, cut.first_column // BLOCK, cut.num_columns // BLOCK

        def sort(tensor: Tensor) -> Tensor:
            """Rows that alternate between the parts, one part after the other."""
            return torch.cat([tensor[:, i::num_parts] for i in range(num_parts)], 1)

        def sort_scales(tensor: Tensor) -> Tensor:
            wrong = int((tensor == _NAN).sum())
            if wrong:
                raise ValueError(f"expected finite scales, found {wrong} of {tensor.numel()} that are NaN")
            return sort(tensor)

        shape = experts, cut.rows, cut.columns // BLOCK
        return {
            "blocks": Destination(
                blocks, (*shape, BLOCK // 2), dim, start, size, (torch.uint8,), sort, random_bits(torch.uint8)
            ),
            "scales": Destination(
                weight.scales, shape, dim, start, size, (torch.uint8,), sort_scales, constant(120, torch.uint8)
            ),
        }
