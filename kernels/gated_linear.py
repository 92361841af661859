"""A gated unit's two products and its SiLU at once (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor

from . import activation, linear, small_linear


def reference(x: Tensor, gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(x @ gate.T) · (x @ up.T), with biases.

    Args:
        x: [tokens, inputs].
        gate_up: [2 · inner, inputs], the gate's rows first; dtype of ``x``.
        bias: [2 · inner] or None.

    Returns:
        [tokens, inner], dtype of ``x``.
    """
    return activation.reference(linear.reference(x, gate_up, bias))


def native(x: Tensor, gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference` for float32 on a CPU, contiguous arguments. A small ``gate_up`` may be bfloat16."""
    return activation.native(linear.native(x, gate_up, bias))


def fused(x: Tensor, gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference` on a GPU: for few rows one kernel, whose products never reach memory."""
    plan = small_linear.plan_for(x, gate_up) if len(x) else None
    if plan is None:
        return activation.fused(linear.reference(x, gate_up, bias))
    return small_linear.multiply(x, gate_up, bias, plan, gated=True)
