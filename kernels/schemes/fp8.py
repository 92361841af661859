"""FP8 weights (e4m3, Micikevicius et al. 2022, arXiv:2209.05433) with a scale for each tensor, row, or block.

Published by DeepSeek-V3 and Qwen3-FP8 as ``weight`` and ``weight_scale_inv`` (which multiplies too, for all its name),
by others, compressed-tensors among them, as ``weight`` and ``weight_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .destination import Destination
from .packed import Cut, Make, Packed, check_multiple, constant, finite, scale_groups

E4M3 = torch.float8_e4m3fn
MAX_E4M3 = 448.0

Activation = Literal["none", "token", "group", "static"]
"""How a product in FP8 rounds its inputs: not at all; with a scale for each token; for each token and block of columns;
or with the checkpoint's one scale."""


@dataclass(frozen=True, eq=False)
class Fp8Weight(Packed):
    """codes [rows, columns] e4m3; scales [⌈rows / row_block⌉, ⌈columns / column_block⌉] float32.

    Where matrices with a scale each lie below each other, every row has one: ``row_block`` divides each one's rows.
    """

    input_scales: Tensor | None
    """[matrices] float32, of static activations: the largest holds for all, as all have the same input."""
    row_block: int
    column_block: int
    activation: Activation

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Exact products, rounded once to float32 and once to ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scales = self.scales.to(wide).repeat_interleave(self.row_block, -2)[..., : self.rows, :]
        return scale_groups(self.codes.to(wide), scales, self.column_block).to(dtype)


@dataclass(frozen=True)
class Fp8:
    """How a checkpoint carries FP8 weights.

    Args:
        granularity: what shares a scale.
        block: rows and columns of a block.
        activation: how inputs are rounded where FP8 is multiplied.
        scale_name: "weight_scale_inv" or "weight_scale".
    """

    granularity: Literal["tensor", "channel", "block"]
    block: tuple[int, int] = (128, 128)
    activation: Activation = "token"
    scale_name: str = "weight_scale"

    @property
    def name(self) -> str:
        """For people."""
        kind = {"tensor": "a scale a tensor", "channel": "a scale a row"}.get(self.granularity)
        return f"FP8, {kind or 'blocks of {} × {}'.format(*self.block)}"

    @property
    def only_experts(self) -> bool:
        """Linears too."""
        return False

    def allocate(self, make: Make, parts: Sequence[int], columns: int, whole_columns: int) -> Fp8Weight:
        """See `Scheme`. Blocks may end beyond a published matrix, not beyond a rank's part of one."""
        rows = sum(parts)
        row_block, column_block = 1, columns
        if self.granularity == "block":
            ends = [sum(parts[: i + 1]) for i in range(len(parts) - 1)]
            row_block, column_block = math.gcd(self.block[0], *ends), self.block[1]
        shape = -(-rows // row_block), -(-columns // column_block)
        static = self.activation == "static"
        return Fp8Weight(
            tuple(parts), columns, make((rows, columns), E4M3), make(shape, torch.float32),
            make((len(parts),), torch.float32) if static else None, row_block, column_block, self.activation,
        )  # fmt: skip

    def destinations(self, weight: Packed, part: int, cut: Cut) -> dict[str, Destination]:
        """See `Scheme`."""
        assert isinstance(weight, Fp8Weight)
        dim, start = (1, cut.first_column) if cut.along_columns else (0, cut.first_row)
        row = weight.start_of(part)
        codes = weight.codes[row : row + cut.num_rows]
        found = {
            "weight": Destination(codes, (cut.rows, cut.columns), dim, start, dtypes=(E4M3,), dummy=_dummy_codes),
            self.scale_name: self._scale(weight, row, cut),
        }
        if weight.input_scales is not None:
            place = weight.input_scales[part : part + 1]
            found["input_scale"] = Destination(place, (), convert=_scalar, dummy=constant(0.1, torch.float32))
        return found

    def _scale(self, weight: Fp8Weight, row: int, cut: Cut) -> Destination:
        dummy = constant(0.02, torch.float32)
        if self.granularity == "tensor":
            return Destination(weight.scales[row : row + cut.num_rows], (), convert=_scalar, dummy=dummy)
        if self.granularity == "channel":
            place = weight.scales[row : row + cut.num_rows]
            return Destination(place, (cut.rows, 1), 0, cut.first_row, cut.num_rows, convert=finite, dummy=dummy)
        height, width = self.block
        for what, first, size, whole, unit in (
            ("the first row of a rank's part", cut.first_row, cut.num_rows, cut.rows, height),
            ("the first column of a rank's part", cut.first_column, cut.num_columns, cut.columns, width),
        ):
            check_multiple(what, first, unit)
            if first + size < whole:
                check_multiple(what.replace("first", "last") + ", plus one", first + size, unit)
        repeats = height // weight.row_block
        last = -(-cut.num_rows // weight.row_block)
        place = weight.scales[row // weight.row_block :][:last]
        shape = -(-cut.rows // height), -(-cut.columns // width)
        dim, start, size = 0, cut.first_row // height, -(-cut.num_rows // height)
        if cut.along_columns:
            dim, start, size = 1, cut.first_column // width, -(-cut.num_columns // width)
        return Destination(
            place, shape, dim, start, size, dummy=dummy,
            convert=lambda scales: finite(scales).float().repeat_interleave(repeats, 0)[:last],
        )  # fmt: skip


def to_fp8(x: Tensor, kind: Activation, block: int = 128, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inputs as a product in FP8 takes them.

    Args:
        x: [tokens, columns].
        kind: what shares a scale; not "none".
        block: columns of a group.
        scale: the checkpoint's, if static, of which the largest counts; what is beyond 448 times it is cut off.

    Returns:
        (codes [tokens, columns] e4m3, scales [tokens, groups] float32; one group but for "group").
    """
    tokens, columns = x.shape
    x = x.float()
    if kind == "static":
        assert scale is not None
        scales = scale.float().max().expand(tokens, 1).contiguous()
    elif kind == "group":
        padded = torch.nn.functional.pad(x, (0, -columns % block)).view(tokens, -1, block)
        scales = padded.abs().amax(2) / MAX_E4M3
    else:
        scales = x.abs().amax(1, keepdim=True) / MAX_E4M3
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    spread = scales.repeat_interleave(block, 1)[:, :columns] if kind == "group" else scales
    return (x / spread).clamp(-MAX_E4M3, MAX_E4M3).to(E4M3), scales


def _scalar(scale: Tensor) -> Tensor:
    return finite(scale).reshape(1)


def _dummy_codes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float16).to(E4M3)
