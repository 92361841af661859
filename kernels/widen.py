"""bfloat16 in compiled kernels: stored as its 16 bits, widened to float32 in a register when it is used.

Published weights are bfloat16, and a float32 holds each of them exactly: keeping the 16 bits halves what a step reads
from memory and changes no result. Numba knows no such type, so arrays of it are uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .compiled import AVAILABLE

if AVAILABLE:
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba import types
    from numba.extending import intrinsic


def bits_of(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array; bfloat16 appears as uint16. No copy."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _widen(typing_context: Any, value: Any) -> Any:
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def shift(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return (types.float32(value), shift) if value == types.uint16 else None


widen: Callable[[Any], np.float32] = cast(Any, intrinsic(_widen) if AVAILABLE else _widen)
"""The float32 of a weight: of the bits of a bfloat16, or of a float32 itself. For compiled functions."""
