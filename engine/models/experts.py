"""The feed-forward part of a layer that has experts: who computes which token, and the sum of what they say."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels.oracle import Ops
from .spec import ModelSpec


class Experts:
    """Router [experts, hidden], gate and up [experts, 2 · inner, hidden], down [experts, hidden, inner].

    Each rank of several routes alike, and has a part of every expert's inner size.
    """

    def __init__(self, spec: ModelSpec, make: Callable[..., Tensor]) -> None:
        assert spec.moe is not None
        moe = self.spec = spec.moe
        self.router = make(moe.num_experts, spec.hidden)
        self.gate_up = make(moe.num_experts, 2 * moe.inner, spec.hidden)
        self.down = make(moe.num_experts, spec.hidden, moe.inner)

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.moe(x, self.router, self.gate_up, self.down, self.spec.top_k, self.spec.renormalize)
