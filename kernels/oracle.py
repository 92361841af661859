"""Which version of each operation serves on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import (
    activation,
    compiled,
    decode_attention,
    decode_inputs,
    decode_layers,
    gated_linear,
    linear,
    moe,
    on_gpu,
    penalties,
    prefill_attention,
    rms_norm,
    rotary,
    sampling,
)


class Ops(NamedTuple):
    """One implementation of every operation that a model's forward pass needs; see each module's `reference`."""

    linear: Callable[..., Tensor]
    gated_linear: Callable[..., Tensor]
    rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    decode_attention: Callable[..., Tensor]
    prefill_attention: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    moe: Callable[..., Tensor]
    sample: Callable[[Tensor, sampling.SamplingRows], Tensor]
    complete: Callable[..., None]
    """See `decode_inputs.reference`."""
    penalize: Callable[..., Tensor]
    count_output: Callable[[Tensor, Tensor, Tensor], None]
    decode_layers: Callable[..., tuple[Tensor, Tensor]] | None
    """All operations of a decode step at once; None where separate operations are as fast."""


REFERENCE = Ops(
    linear=linear.reference,
    gated_linear=gated_linear.reference,
    rms_norm=rms_norm.reference,
    rotary=rotary.reference,
    decode_attention=decode_attention.reference,
    prefill_attention=prefill_attention.reference,
    silu_mul=activation.reference,
    moe=moe.reference,
    sample=sampling.reference,
    complete=decode_inputs.reference,
    penalize=penalties.reference,
    count_output=penalties.reference_count,
    decode_layers=None,
)

NATIVE = Ops(
    linear=linear.native,
    gated_linear=gated_linear.native,
    rms_norm=rms_norm.native,
    rotary=rotary.native,
    decode_attention=decode_attention.native,
    prefill_attention=prefill_attention.native,
    silu_mul=activation.native,
    moe=moe.native,
    sample=sampling.native,
    complete=decode_inputs.reference,
    penalize=penalties.reference,
    count_output=penalties.reference_count,
    decode_layers=decode_layers.native,
)

FUSED = Ops(
    linear=linear.fused,
    gated_linear=gated_linear.fused,
    rms_norm=rms_norm.fused,
    rotary=rotary.fused,
    decode_attention=decode_attention.fused,
    prefill_attention=prefill_attention.fused,
    silu_mul=activation.fused,
    moe=moe.fused,
    sample=sampling.fused,
    complete=decode_inputs.fused,
    penalize=penalties.fused,
    count_output=penalties.fused_count,
    decode_layers=None,
)


def select(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest implementation for ``dtype`` on ``device``: Triton on a GPU, compiled code for float32 on a CPU, else
    torch."""
    if device.type == "cuda" and on_gpu.AVAILABLE:
        return FUSED
    return NATIVE if compiled.AVAILABLE and device.type == "cpu" and dtype == torch.float32 else REFERENCE
