"""``x @ weight.T + bias`` with a quantised weight, which stays packed in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .schemes.packed import Packed


def reference(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The product with the dequantised weight, by torch. Inputs are not rounded, even where the scheme would let FP8
    units round them: this is closer.

    Args:
        x: [tokens, inputs], any floating dtype.
        weight: [outputs, inputs].
        bias: [outputs] or None.

    Returns:
        [tokens, outputs], dtype of ``x``.
    """
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)
