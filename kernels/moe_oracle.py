"""Which kernel computes a layer's experts on a device, and why the others do not.

A kernel has one of three forms, and its `compute` takes what the form says:

- monolithic: (x, router, gate_up, down, top_k, renormalize), as `moe.reference`: the routing is inside;
- modular: (x, weights, ids, experts), as `moe.reference_experts`: the routing, and whatever lies between it and the
  experts, is the caller's;
- batched: (x, counts, experts), as `moe.reference_batched`: each expert's tokens lie in rows of its own, as many for
  one as for another, so that shapes do not depend on the routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigError
from . import moe, moe_few, moe_packed, moe_sorted
from .device import Device, dtype_refused, version
from .schemes.fp8 import Fp8
from .schemes.packed import Scheme

_BLAS = "torch's BLAS"

Form = Literal["monolithic", "modular", "batched"]


class ExpertsSpec(NamedTuple):
    """What a model asks of its experts' kernel."""

    dtype: torch.dtype
    """Of activations between operations."""
    weights: Scheme | None = None
    """How the experts' weights are quantised."""
    mixed: bool = False
    """Whether those of some layers, or some matrices, are not."""
    activations: str = "none"
    """How what is multiplied with them is quantised."""
    activation: str = "silu"
    """The gated unit: a key of `activation.GATED`."""
    gated: bool = True
    """Whether an expert has a gate at all."""
    biases: bool = False
    """Whether an expert adds biases."""
    routing: str = "softmax"
    """A key of `routing.METHODS`."""
    scaled: bool = False
    """Whether the routing's weights are multiplied with a constant."""
    router_bias: bool = False
    """Whether the router adds a bias."""
    shared: bool = False
    """Whether experts that all tokens go to are summed up with the routed ones."""
    num_experts: int = 0
    """Of the model; 0: not known."""
    top_k: int = 0
    hidden: int = 0
    inner: int = 0
    """Of one rank's part of an expert."""
    tensor_parallel: int = 1
    """Ranks that share every expert."""
    expert_parallel: int = 1
    """Ranks that have different experts."""
    format: Literal["standard", "batched"] = "standard"
    """How tokens come to the experts: in their own order, or each expert's in rows of its own."""
    lora: bool = False
    batch_invariant: bool = False
    """Whether a token's bits may not depend on the tokens beside it."""


class Kernel(NamedTuple):
    """One way of computing experts. `refuses` tells why it cannot; None: it can."""

    name: str
    form: Form
    compute: Callable[..., Tensor]
    serves: Callable[[ExpertsSpec, Device], str]
    refuses: Callable[[ExpertsSpec, Device], str | None]
    recordable: bool
    """Whether a CUDA graph may contain it, and the routing before it."""
    each: Callable[..., Tensor] | None = None
    """Of a modular one that can leave summing up to others, see `moe.fused_each`."""

    @property
    def family(self) -> str:
        """By whose means: what comes before the form in the name."""
        return self.name.partition("_")[0]


class Choice(NamedTuple):
    """Which kernel computes the experts."""

    backend: str
    serves: str
    """By what, and where in parts."""
    rejected: tuple[tuple[str, str], ...]
    """Kernels that come before, each with the reason why it does not."""


def _bare(spec: ExpertsSpec, form: Form) -> str | None:
    """What every kernel asks first, and those of a form."""
    if (form == "batched") != (spec.format == "batched"):
        return "each expert's tokens come in rows of its own" if form != "batched" else "tokens come in their own order"
    if spec.lora:
        return "experts take no LoRA"
    if spec.batch_invariant:
        return "a token's sums are cut by how many tokens there are"
    if not spec.gated:
        return "experts without a gate"
    if form != "monolithic":
        return None
    if spec.expert_parallel > 1:
        return "the routing is inside, and tokens go to other ranks after it"
    if spec.routing != "softmax" or spec.scaled or spec.router_bias:
        special = "a router's bias" if spec.router_bias else "scaled weights" if spec.scaled else spec.routing
        return f"the routing inside is softmax alone, not {special}"
    return "shared experts are not summed up inside" if spec.shared else None


def _plain(spec: ExpertsSpec, *, any_unit: bool) -> str | None:
    """What compiled kernels and Triton's for unquantised weights take."""
    if spec.weights is not None:
        return f"weights are not taken in {spec.weights.name}"
    return _arithmetic(spec, any_unit=any_unit)


def _packed(spec: ExpertsSpec, device: Device, *, any_unit: bool) -> str | None:
    """What Triton's kernels for quantised weights take."""
    if spec.weights is None:
        return "nothing is quantised"
    if spec.mixed:
        return f"weights are in {spec.weights.name} in some places and plain in others"
    if isinstance(spec.weights, Fp8):
        # Torch has its own conversion for GPUs that have none.
        refused = dtype_refused(torch.float8_e4m3fn, device)
        if refused is not None:
            return refused
    return _arithmetic(spec, any_unit=any_unit)


def _arithmetic(spec: ExpertsSpec, *, any_unit: bool) -> str | None:
    """What an expert computes; ``any_unit``: with biases too, and all of `activation.GATED`."""
    if spec.activations != "none":
        return f"activations are not taken in {spec.activations}"
    if any_unit:
        return None
    if spec.biases:
        return "experts' biases are not added"
    return None if spec.activation == "silu" else f"the gated unit is SiLU, not {spec.activation}"


def _triton(form: Form, *, packed: bool = False) -> Callable[[ExpertsSpec, Device], str | None]:
    def refuses(spec: ExpertsSpec, device: Device) -> str | None:
        if device.type != "cuda":
            return "Triton's kernels need a CUDA device"
        if not device.triton:
            return "Triton is not installed"
        if device.capability is not None and device.capability < (8, 0):
            return f"Triton needs compute capability 8.0, {device.name} has {version(device.capability)}"
        refused = dtype_refused(spec.dtype, device) or _bare(spec, form)
        any_unit = form != "monolithic"
        return refused or (_packed(spec, device, any_unit=any_unit) if packed else _plain(spec, any_unit=any_unit))

    return refuses


def _numba(form: Form) -> Callable[[ExpertsSpec, Device], str | None]:
    def refuses(spec: ExpertsSpec, device: Device) -> str | None:
        if device.type != "cpu":
            return "compiled kernels run on CPUs"
        if not device.numba:
            return "Numba is not installed"
        if spec.dtype != torch.float32:
            return f"compiled kernels compute in float32, not in {str(spec.dtype).removeprefix('torch.')}"
        return _bare(spec, form) or _plain(spec, any_unit=False)

    return refuses


def _torch(form: Form) -> Callable[[ExpertsSpec, Device], str | None]:
    def refuses(spec: ExpertsSpec, device: Device) -> str | None:
        if spec.weights is not None:
            return f"torch multiplies no weights in {spec.weights.name}; emulation does"
        return _torch_takes(spec, device, form)

    return refuses


def _emulation(form: Form) -> Callable[[ExpertsSpec, Device], str | None]:
    def refuses(spec: ExpertsSpec, device: Device) -> str | None:
        return "nothing is quantised" if spec.weights is None else _torch_takes(spec, device, form)

    return refuses


def _torch_takes(spec: ExpertsSpec, device: Device, form: Form) -> str | None:
    if spec.activations != "none":
        return f"activations stay in {str(spec.dtype).removeprefix('torch.')}"
    return dtype_refused(spec.dtype, device) or _bare(spec, form)


def _serves_triton(spec: ExpertsSpec, device: Device) -> str:
    if spec.biases or spec.activation != "silu":
        return "Triton, sorted by expert"
    most = moe_few.most_tokens(spec.num_experts, spec.top_k)
    few = f"up to {most} token{'s' * (most > 1)}" if most else "no token"
    return f"{few}: Triton, pair by pair; more: Triton, sorted by expert"


def _serves_torch(spec: ExpertsSpec, device: Device) -> str:
    return f"{'cuBLAS' if device.type == 'cuda' else _BLAS}, an expert at a time"


def _serves_numba(spec: ExpertsSpec, device: Device) -> str:
    return f"experts of up to {moe.MAX_COMPILED_EXPERT:,} weights: Numba; larger: oneDNN"


def _serves_packed(spec: ExpertsSpec, device: Device) -> str:
    assert spec.weights is not None
    how = "expert by expert" if spec.format == "batched" else "sorted by expert"
    return f"{spec.weights.name}: Triton, {how}, dequantised in registers"


def _serves_emulation(spec: ExpertsSpec, device: Device) -> str:
    assert spec.weights is not None
    return (
        f"{spec.weights.name}: an expert at a time is dequantised, then {'cuBLAS' if device.type == 'cuda' else _BLAS}"
    )


def _says(text: str) -> Callable[[ExpertsSpec, Device], str]:
    return lambda spec, device: text


TRITON = Kernel("triton", "monolithic", moe.fused, _serves_triton, _triton("monolithic"), True)
TRITON_MODULAR = Kernel(
    "triton_modular", "modular", moe.fused_experts, _serves_triton, _triton("modular"), True, moe.fused_each
)
TRITON_BATCHED = Kernel(
    "triton_batched", "batched", moe_sorted.fused_batched, _says("Triton, expert by expert"), _triton("batched"), True
)
NUMBA = Kernel("numba", "monolithic", moe.native, _serves_numba, _numba("monolithic"), False)
NUMBA_MODULAR = Kernel("numba_modular", "modular", moe.native_experts, _serves_numba, _numba("modular"), False)
TORCH = Kernel("torch", "modular", moe.reference_experts, _serves_torch, _torch("modular"), False)
TORCH_BATCHED = Kernel("torch_batched", "batched", moe.reference_batched, _serves_torch, _torch("batched"), False)
TRITON_PACKED = Kernel(
    "triton_packed", "monolithic", moe_packed.fused, _serves_packed, _triton("monolithic", packed=True), True
)
TRITON_PACKED_MODULAR = Kernel(
    "triton_packed_modular", "modular", moe_packed.fused_experts, _serves_packed, _triton("modular", packed=True), True,
    moe_packed.fused_each,
)  # fmt: skip
TRITON_PACKED_BATCHED = Kernel(
    "triton_packed_batched", "batched", moe_packed.fused_batched, _serves_packed, _triton("batched", packed=True), True
)
EMULATION = Kernel("emulation", "modular", moe.reference_experts, _serves_emulation, _emulation("modular"), False)
EMULATION_BATCHED = Kernel(
    "emulation_batched", "batched", moe.reference_batched, _serves_emulation, _emulation("batched"), False
)

_ON_GPUS = (
    TRITON, TRITON_MODULAR, TRITON_BATCHED, TRITON_PACKED, TRITON_PACKED_MODULAR, TRITON_PACKED_BATCHED,
)  # fmt: skip
_EVERYWHERE = (TORCH, TORCH_BATCHED, EMULATION, EMULATION_BATCHED)
PRIORITY = {
    "cuda": (*_ON_GPUS, *_EVERYWHERE),
    "cpu": (TRITON, NUMBA, NUMBA_MODULAR, *_EVERYWHERE),
}
"""Device type → kernels, the first of which that can serve does."""

KERNELS = {kernel.name: kernel for kernels in PRIORITY.values() for kernel in kernels}


def select(spec: ExpertsSpec, device: Device, wanted: str | None = None) -> Choice:
    """A kernel for a model's experts; depends on nothing but the arguments.

    Args:
        spec: what the model asks.
        device: where.
        wanted: a kernel, or a family of them ("triton"), that must serve.

    Raises:
        ConfigError: what is wanted, or all there is, cannot serve; says why of each. Or the name is unknown.
    """
    if device.type not in PRIORITY:
        raise ConfigError(f"no kernel computes experts on {device.name}", fix=f"there are some for {_names(PRIORITY)}")
    if wanted is not None and not any(wanted in (kernel.name, kernel.family) for kernel in KERNELS.values()):
        raise ConfigError(f"model.kernels: moe has no backend {wanted}", fix=f"it has {_names(KERNELS)}")
    rejected: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for kernel in PRIORITY[device.type]:
        if wanted not in (None, kernel.name, kernel.family):
            rejected.append((kernel.name, f"model.kernels asks for {wanted}"))
            continue
        reason = kernel.refuses(spec, device)
        if reason is None:
            return Choice(kernel.name, kernel.serves(spec, device), tuple(rejected))
        rejected.append((kernel.name, reason))
        refused.append((kernel.name, reason))
    if wanted is not None:
        reasons = list(dict.fromkeys(reason for _, reason in refused)) or [f"it is not for {device.name}"]
        raise ConfigError(
            f"model.kernels: {wanted} cannot serve moe: {'; '.join(reasons)}", fix="leave out model.kernels.moe"
        )
    raise ConfigError(
        f"nothing serves moe on {device.name}: {'; '.join(f'{name}: {reason}' for name, reason in rejected)}",
        fix="choose another model.dtype",
    )


def _names(several: Iterable[str]) -> str:
    return ", ".join(several)
