"""The dense feed-forward part of a layer."""

from __future__ import annotations

from torch import Tensor

from ...kernels.oracle import Ops
from .parameters import Parameters


class Mlp:
    """Dense weights: gate and up [2 · inner, hidden], down [hidden, inner], and biases or None.

    A rank of several has a part of the inner size. Its output is a part of the sum over ranks, to which the first adds
    the last bias.
    """

    def __init__(self, hidden: int, inner: int, make: Parameters, bias: bool, rank: int, prefix: str) -> None:
        self.gate_up = make.matrix(prefix, ("gate_proj", "up_proj"), [inner] * 2, hidden)
        self.down = make.matrix(prefix, ("down_proj",), [hidden], inner, cut_columns=True)
        self.gate_up_bias = make(2 * inner) if bias else None
        self.down_bias = make(hidden) if bias else None
        self._added_bias = self.down_bias if rank == 0 else None

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.multiply(ops.gated_unit(x, self.gate_up, self.gate_up_bias), self.down, self._added_bias)
