"""Which version of each operation serves a model on a device, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigError
from . import (
    activation,
    decode_attention,
    decode_inputs,
    decode_layers,
    fp8_linear,
    gated_linear,
    latent_attention,
    latent_prefill,
    linear,
    moe_oracle,
    packed_linear,
    penalties,
    prefill_attention,
    rms_norm,
    rotary,
    sampling,
    small_linear,
)
from .device import Device, describe, dtype_refused, version
from .moe_oracle import Choice, ExpertsSpec
from .schemes.fp8 import Fp8
from .schemes.packed import Packed, Scheme, Weight


class Ops(NamedTuple):
    """One implementation of every operation that a model's forward pass needs; see each module's `reference`."""

    linear: Callable[..., Tensor]
    packed_linear: Callable[..., Tensor]
    """Of quantised weights."""
    gated_linear: Callable[..., Tensor]
    rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    decode_attention: Callable[..., Tensor]
    prefill_attention: Callable[..., Tensor]
    latent_write: Callable[..., Tensor]
    """See `latent_attention.reference_write`."""
    latent_decode: Callable[..., Tensor]
    latent_prefill: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    moe: moe_oracle.Kernel
    """Of a layer's experts; `moe_oracle` chooses it."""
    sample: Callable[[Tensor, sampling.SamplingRows], Tensor]
    complete: Callable[..., None]
    """See `decode_inputs.reference`."""
    penalize: Callable[..., Tensor]
    count_output: Callable[[Tensor, Tensor, Tensor], None]
    decode_layers: Callable[..., tuple[Tensor, Tensor]] | None
    """All operations of a decode step at once; None where separate operations are as fast."""

    def multiply(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """`linear`, or `packed_linear` of a quantised weight."""
        return (self.packed_linear if isinstance(weight, Packed) else self.linear)(x, weight, bias)

    def gated_unit(self, x: Tensor, gate_up: Weight, bias: Tensor | None = None) -> Tensor:
        """`gated_linear`, or `packed_linear` of a quantised weight and `silu_mul`."""
        if isinstance(gate_up, Packed):
            return self.silu_mul(self.packed_linear(x, gate_up, bias))
        return self.gated_linear(x, gate_up, bias)


REFERENCE = Ops(
    linear=linear.reference,
    packed_linear=packed_linear.reference,
    gated_linear=gated_linear.reference,
    rms_norm=rms_norm.reference,
    rotary=rotary.reference,
    decode_attention=decode_attention.reference,
    prefill_attention=prefill_attention.reference,
    latent_write=latent_attention.reference_write,
    latent_decode=latent_attention.reference_decode,
    latent_prefill=latent_attention.reference_prefill,
    silu_mul=activation.reference,
    moe=moe_oracle.TORCH,
    sample=sampling.reference,
    complete=decode_inputs.reference,
    penalize=penalties.reference,
    count_output=penalties.reference_count,
    decode_layers=None,
)

NATIVE = Ops(
    linear=linear.native,
    packed_linear=packed_linear.reference,
    gated_linear=gated_linear.native,
    rms_norm=rms_norm.native,
    rotary=rotary.native,
    decode_attention=decode_attention.native,
    prefill_attention=prefill_attention.native,
    latent_write=latent_attention.reference_write,
    latent_decode=latent_attention.reference_decode,
    latent_prefill=latent_attention.reference_prefill,
    silu_mul=activation.native,
    moe=moe_oracle.NUMBA,
    sample=sampling.native,
    complete=decode_inputs.reference,
    penalize=penalties.reference,
    count_output=penalties.reference_count,
    decode_layers=decode_layers.native,
)

FUSED = Ops(
    linear=linear.fused,
    packed_linear=packed_linear.fused,
    gated_linear=gated_linear.fused,
    rms_norm=rms_norm.fused,
    rotary=rotary.fused,
    decode_attention=decode_attention.fused,
    prefill_attention=prefill_attention.fused,
    latent_write=latent_attention.fused_write,
    latent_decode=latent_attention.fused_decode,
    latent_prefill=latent_prefill.fused,
    silu_mul=activation.fused,
    moe=moe_oracle.TRITON,
    sample=sampling.fused,
    complete=decode_inputs.fused,
    penalize=penalties.fused,
    count_output=penalties.fused_count,
    decode_layers=None,
)


class Needs(NamedTuple):
    """What a model asks of its kernels."""

    dtype: torch.dtype
    """Of weights and activations."""
    kv_dtype: torch.dtype
    """Of the cache."""
    experts: ExpertsSpec | None = None
    """None: plain ones, of a number that is not known."""
    scheme: Scheme | None = None
    """Of its quantised weights, if it has any."""
    sinks: bool = False
    """Whether its attention has sinks."""


class _Backend(NamedTuple):
    name: str
    ops: Ops
    refuses: Callable[[str, Needs, Device], str | None]
    """Why a device cannot run an operation in this way; None: it can."""


def _torch_refuses(op: str, needs: Needs, device: Device) -> str | None:
    return dtype_refused(needs.dtype, device) or (dtype_refused(needs.kv_dtype, device) if op in _ON_KV else None)


def _triton_refuses(op: str, needs: Needs, device: Device) -> str | None:
    if device.type != "cuda":
        return "Triton's kernels need a CUDA device"
    if not device.triton:
        return "Triton is not installed"
    if device.capability is not None and device.capability < _TRITON_CAPABILITY:
        least = version(_TRITON_CAPABILITY)
        return f"Triton needs compute capability {least}, {device.name} has {version(device.capability)}"
    if op == "packed_linear" and isinstance(needs.scheme, Fp8):
        # Torch has its own conversion for GPUs that have none.
        refused = dtype_refused(torch.float8_e4m3fn, device)
        if refused is not None:
            return refused
    return _torch_refuses(op, needs, device)


def _numba_refuses(op: str, needs: Needs, device: Device) -> str | None:
    if device.type != "cpu":
        return "compiled kernels run on CPUs"
    if not device.numba:
        return "Numba is not installed"
    if needs.dtype != torch.float32:
        return f"compiled kernels compute in float32, not in {_name(needs.dtype)}"
    if op in _ON_KV and needs.kv_dtype != torch.float32:
        return f"compiled kernels read float32 KV, not {_name(needs.kv_dtype)}"
    return "whole layers take no attention sinks" if op == "decode_layers" and needs.sinks else None


_TRITON_CAPABILITY = (8, 0)
GROUPED = frozenset({"rotary", "decode_attention", "prefill_attention"})
LATENT = frozenset({"latent_write", "latent_decode", "latent_prefill"})
"""Operations of grouped-query and of latent attention: a model has one or the other."""

_ON_KV = {"decode_layers", *GROUPED, *LATENT}
_OUTSIDE_LAYERS = {"sample", "complete", "penalize", "count_output", "prefill_attention", "decode_layers", *LATENT}
"""What `decode_layers` does not replace."""

_RECORDABLE = {
    "linear",
    "packed_linear",
    "gated_linear",
    "rms_norm",
    "silu_mul",
    *(_OUTSIDE_LAYERS - {"sample", "complete", "latent_write", "latent_decode"}),
}
"""Operations of which every version can be recorded, or which a recording does without."""

BACKENDS = (
    _Backend("triton", FUSED, _triton_refuses),
    _Backend("numba", NATIVE, _numba_refuses),
    _Backend("torch", REFERENCE, _torch_refuses),
)
"""The first that can serve an operation does. Where one uses a later one's function, it leaves the operation to it."""


def backends(op: str) -> list[_Backend]:
    """Those that have a version of their own of an operation, the fastest first."""
    functions = [getattr(backend.ops, op) for backend in BACKENDS]
    return [backend for i, backend in enumerate(BACKENDS) if functions[i] not in functions[i + 1 :]]


def choose(needs: Needs, device: Device, wanted: Mapping[str, str] | None = None) -> dict[str, Choice]:
    """A backend for each operation; depends on nothing but the arguments.

    Args:
        needs: the model's.
        device: where.
        wanted: operation → backend that must serve it.

    Raises:
        ConfigError: a wanted backend, or all of them, cannot serve an operation; or a name is unknown.
    """
    wanted = wanted or {}
    for op in wanted:
        if op not in Ops._fields:
            raise ConfigError(f"model.kernels: there is no operation {op}", fix=f"there are {', '.join(Ops._fields)}")
    return {op: _choose(op, needs, device, wanted) for op in Ops._fields}


def _choose(op: str, needs: Needs, device: Device, wanted: Mapping[str, str]) -> Choice:
    asked = wanted.get(op)
    if op == "moe":
        return moe_oracle.select(needs.experts or ExpertsSpec(needs.dtype), device, asked)
    names = [backend.name for backend in backends(op)]
    if asked is not None and asked not in names:
        raise ConfigError(f"model.kernels: {op} has no backend {asked}", fix=f"it has {', '.join(names)}")
    rejected = []
    for backend in backends(op):
        if asked not in (None, backend.name):
            rejected.append((backend.name, f"model.kernels asks for {asked}"))
            continue
        reason = backend.refuses(op, needs, device)
        others = sorted(wanted.keys() - _OUTSIDE_LAYERS)
        if reason is None and op == "decode_layers" and getattr(backend.ops, op) and others:
            reason = f"model.kernels names who serves {', '.join(others)}"
        if reason is None:
            return Choice(backend.name, _serves(op, backend.name, needs, device), tuple(rejected))
        if asked is not None:
            raise ConfigError(
                f"model.kernels: {backend.name} cannot serve {op}: {reason}", fix=f"leave out model.kernels.{op}"
            )
        rejected.append((backend.name, reason))
    raise ConfigError(
        f"nothing serves {op} on {device.name}: {'; '.join(f'{name}: {reason}' for name, reason in rejected)}",
        fix="choose another model.dtype or kv.dtype",
    )


def _serves(op: str, backend: str, needs: Needs, device: Device) -> str:
    """What computes an operation, and from where on something else does."""
    cuda = device.type == "cuda"
    library = "cuBLAS" if cuda else "torch's BLAS"
    rows = _up_to(small_linear.most_tokens(needs.dtype), "row")
    known = {
        ("linear", "triton"): f"{rows}: Triton; more: cuBLAS",
        ("gated_linear", "triton"): f"{rows}: Triton, one kernel; more: cuBLAS, then silu_mul",
        ("prefill_attention", "triton"): (
            f"prompts of {prefill_attention.DIRECT_LEAST:,} tokens and more, while whole: cuDNN through torch; "
            "others, and later chunks: Triton"
            if needs.dtype == needs.kv_dtype != torch.float32 and not needs.sinks
            else "Triton"
        ),
        ("linear", "numba"): f"weights of up to {linear.MAX_COMPILED_WEIGHTS:,} elements: Numba; larger: oneDNN",
        ("decode_layers", "numba"): "Numba, a layer at a time",
        ("linear", "torch"): library,
        ("gated_linear", "torch"): f"{library}, then torch",
        ("packed_linear", "triton"): f"{_scheme(needs)}: {_packed_linear(needs, device)}",
        ("packed_linear", "torch"): f"{_scheme(needs)}: dequantised at every use, then {library}",
        ("prefill_attention", "torch"): "torch: cuDNN, or its own kernels" if cuda else "torch",
        ("decode_layers", "torch"): "each operation by itself",
    }
    return known.get((op, backend), {"triton": "Triton", "numba": "Numba", "torch": "torch"}[backend])


def _scheme(needs: Needs) -> str:
    return "no quantised weights" if needs.scheme is None else needs.scheme.name


def _packed_linear(needs: Needs, device: Device) -> str:
    registers = "Triton, dequantised in registers"
    scheme = needs.scheme
    rounds = isinstance(scheme, Fp8) and scheme.granularity != "block" and scheme.activation != "none"
    capable = device.capability is not None and device.capability >= fp8_linear.CAPABILITY
    if not (rounds and capable and needs.dtype == torch.bfloat16):
        return registers
    few = _up_to(fp8_linear.LEAST_TOKENS - 1, "row")
    return f"{few}: {registers}; more: torch, inputs rounded to FP8"


def _up_to(count: int, noun: str) -> str:
    return f"no {noun}" if not count else f"up to {count} {noun}{'s' * (count > 1)}"


def assemble(choices: Mapping[str, Choice]) -> Ops:
    """The chosen functions; `REFERENCE`, `NATIVE` or `FUSED` itself where they are just these."""
    tables = {backend.name: backend.ops for backend in BACKENDS}
    kernel = moe_oracle.KERNELS[choices["moe"].backend]
    ops = Ops(moe=kernel, **{op: getattr(tables[c.backend], op) for op, c in choices.items() if op != "moe"})
    return next((table for table in tables.values() if table == ops), ops)


def select(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    wanted: Mapping[str, str] | None = None,
    experts: ExpertsSpec | None = None,
    scheme: Scheme | None = None,
    *,
    sinks: bool = False,
) -> Ops:
    """The fastest implementation of each operation for ``dtype``, on a device of this machine.

    Raises:
        ConfigError: as `choose`, or the device is not here.
    """
    return assemble(choose(Needs(dtype, kv_dtype or dtype, experts, scheme, sinks), describe(device), wanted))


def compiled(ops: Ops) -> bool:
    """Whether all operations of a layer are `NATIVE`, the experts' in any form."""
    return ops.moe.family == NATIVE.moe.family and ops._replace(moe=NATIVE.moe) == NATIVE


def recordable(ops: Ops) -> bool:
    """Whether a decode step can be a CUDA graph: what torch does instead of Triton waits for nothing on the device, and
    leaves rows without a slot alone."""
    fixed = [op for op in Ops._fields if op not in _RECORDABLE and op != "moe"]
    return ops.moe.recordable and all(getattr(ops, op) is getattr(FUSED, op) for op in fixed)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
