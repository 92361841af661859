"""Products in FP8 units, by torch: for FP8 weights with a scale for each row, and many rows of inputs.

The inputs are rounded too, as the checkpoint's quantisation was made for (``activation_scheme``); units for FP8
multiply twice as fast as those for bfloat16. With few rows, where only bytes count, `packed_linear` rounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schemes.fp8 import Fp8Weight, to_fp8
from .schemes.packed import Packed

LEAST_TOKENS = 65
"""Below, a step waits for the weights to arrive."""

CAPABILITY = (9, 0)
"""From which on torch takes a scale for each row."""

_UNIT = 16
"""Torch's products take multiples of this."""


def serves(x: Tensor, weight: Packed) -> bool:
    """Whether `multiply` can serve a product, and is meant to."""
    rounded = isinstance(weight, Fp8Weight) and weight.activation in ("token", "static")
    whole = isinstance(weight, Fp8Weight) and weight.column_block == weight.columns and weight.row_block == 1
    even = weight.rows % _UNIT == 0 and weight.columns % _UNIT == 0
    if not (rounded and whole and even and x.dtype == torch.bfloat16 and len(x) >= LEAST_TOKENS):
        return False
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= CAPABILITY


def multiply(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with inputs rounded to e4m3.

    Args:
        x: [tokens, inputs] bfloat16.
        weight: [outputs, inputs], with a scale for each row; both sizes multiples of 16.
        bias: [outputs] bfloat16, or None.

    Returns:
        [tokens, outputs] bfloat16.
    """
    codes, scales = to_fp8(x, weight.activation, scale=weight.input_scales)
    out: Tensor = torch._scaled_mm(
        codes, weight.codes.t(), scale_a=scales, scale_b=weight.scales.t(), out_dtype=torch.bfloat16
    )
    return out if bias is None else out + bias
