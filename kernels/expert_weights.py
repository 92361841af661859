"""The weights of a layer's experts, as the kernels take them: every tensor has an expert for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Expert(NamedTuple):
    """One expert's weights, to multiply with."""

    gate_up: Tensor
    """[2 · inner, hidden], gate first."""
    down: Tensor
    """[hidden, inner]"""
    gate_up_bias: Tensor | None
    """[2 · inner]"""
    down_bias: Tensor | None
    """[hidden]"""


@dataclass(frozen=True)
class ExpertWeights:
    """Unquantised weights. A quantised scheme has a class of its own with the same two methods.

    Attributes:
        gate_up: [experts, 2 · inner, hidden], gate first.
        down: [experts, hidden, inner].
        gate_up_bias: [experts, 2 · inner], or None.
        down_bias: [experts, hidden], or None.
        activation: a key of `activation.GATED`.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"

    def tensors(self) -> dict[str, Tensor]:
        """All that an expert is made of, by name, each with the experts along its first dimension: who moves an expert
        moves its row of every one."""
        named = {
            "gate_up": self.gate_up,
            "down": self.down,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def expert(self, index: int) -> Expert:
        """One expert: views here, numbers made for the purpose where weights are quantised."""
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[index]
        down_bias = None if self.down_bias is None else self.down_bias[index]
        return Expert(self.gate_up[index], self.down[index], gate_up_bias, down_bias)
