"""The weights of a layer's experts, as the kernels take them: every tensor has an expert for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from .schemes.packed import Packed, Weight


class Expert(NamedTuple):
    """One expert's weights, to multiply with."""

    gate_up: Weight
    """[2 · inner, hidden], gate first."""
    down: Weight
    """[hidden, inner]"""
    gate_up_bias: Tensor | None
    """[2 · inner]"""
    down_bias: Tensor | None
    """[hidden]"""


@dataclass(frozen=True)
class ExpertWeights:
    """Weights, quantised or not.

    Attributes:
        gate_up: [experts, 2 · inner, hidden], gate first.
        down: [experts, hidden, inner].
        gate_up_bias: [experts, 2 · inner], or None.
        down_bias: [experts, hidden], or None.
        activation: a key of `activation.GATED`.
    """

    gate_up: Weight
    down: Weight
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"

    def __len__(self) -> int:
        """Experts."""
        return len(self.gate_up)

    def tensors(self) -> dict[str, Tensor]:
        """All that an expert is made of, by name, each with the experts along its first dimension: who moves an expert
        moves its row of every one."""
        named: dict[str, Tensor] = {}
        for name, weight in (("gate_up", self.gate_up), ("down", self.down)):
            if isinstance(weight, Packed):
                named |= {f"{name}.{part}": tensor for part, tensor in weight.tensors().items()}
            else:
                named[name] = weight
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return named | {name: bias for name, bias in biases.items() if bias is not None}

    def over(self, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        """The same, in other memory: ``tensors`` has the names of `tensors`."""

        def part(name: str, weight: Weight) -> Weight:
            if not isinstance(weight, Packed):
                return tensors[name]
            own: dict[str, Any] = {key: tensors[f"{name}.{key}"] for key in weight.tensors()}
            return replace(weight, **own)

        return ExpertWeights(
            part("gate_up", self.gate_up),
            part("down", self.down),
            tensors.get("gate_up_bias"),
            tensors.get("down_bias"),
            self.activation,
        )

    @property
    def ordinary(self) -> bool:
        """Whether the gated unit is SiLU's, and nothing is added."""
        return self.activation == "silu" and self.gate_up_bias is None and self.down_bias is None

    def expert(self, index: int) -> Expert:
        """One expert: views."""
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[index]
        down_bias = None if self.down_bias is None else self.down_bias[index]
        return Expert(self.gate_up[index], self.down[index], gate_up_bias, down_bias)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Gate and up, and down, for a kernel that refuses quantised ones."""
        assert isinstance(self.gate_up, Tensor)
        assert isinstance(self.down, Tensor)
        return self.gate_up, self.down

    def packed(self) -> tuple[Packed, Packed]:
        """Gate and up, and down, for a kernel that refuses any but quantised ones."""
        assert isinstance(self.gate_up, Packed)
        assert isinstance(self.down, Packed)
        return self.gate_up, self.down
