"""Which kernel computes the experts of which model where, and the reasons, without any of those devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tandem.core.errors import ConfigError
from tandem.kernels.device import PRESETS, Device
from tandem.kernels.moe_oracle import KERNELS, PRIORITY, ExpertsSpec, select
from tandem.kernels.schemes.fp8 import Fp8
from tandem.kernels.schemes.mxfp4 import Mxfp4

H100, A100, CPU = PRESETS["h100"], PRESETS["a100"], PRESETS["cpu"]
PLAIN = ExpertsSpec(torch.bfloat16, num_experts=128, top_k=8, hidden=2048, inner=768)
FLOAT = PLAIN._replace(dtype=torch.float32)
FP8 = Fp8("block")
DEEPSEEK = PLAIN._replace(routing="sigmoid_grouped", scaled=True, shared=True)
GPT_OSS = PLAIN._replace(routing="topk_softmax", router_bias=True, biases=True, activation="clamped_swiglu")


@pytest.mark.parametrize(
    ("spec", "where", "name"),
    [
        (PLAIN, H100, "triton"),
        (PLAIN, replace(H100, triton=False), "torch"),
        (PLAIN, CPU, "torch"),
        (FLOAT, CPU, "numba"),
        (FLOAT, replace(CPU, numba=False), "torch"),
        (DEEPSEEK, H100, "triton_modular"),
        (DEEPSEEK._replace(dtype=torch.float32), CPU, "numba_modular"),
        (GPT_OSS, H100, "torch"),
        (PLAIN._replace(expert_parallel=8), H100, "triton_modular"),
        (PLAIN._replace(expert_parallel=8, format="batched"), H100, "triton_batched"),
        (FLOAT._replace(expert_parallel=2, format="batched"), CPU, "torch_batched"),
        (PLAIN._replace(weights=Mxfp4()), A100, "triton_packed"),
        (PLAIN._replace(weights=Mxfp4(), expert_parallel=8), A100, "triton_packed_modular"),
        (PLAIN._replace(weights=Mxfp4(), format="batched"), H100, "triton_packed_batched"),
        (PLAIN._replace(weights=Mxfp4(), mixed=True), H100, "emulation"),
        (PLAIN._replace(weights=FP8), A100, "emulation"),
        (PLAIN._replace(weights=FP8, format="batched"), A100, "emulation_batched"),
        (FLOAT._replace(weights=FP8), CPU, "emulation"),
        (GPT_OSS._replace(weights=Mxfp4()), H100, "emulation"),
    ],
)
def test_what_serves(spec: ExpertsSpec, where: Device, name: str) -> None:
    choice = select(spec, where)
    assert choice.backend == name
    # Whoever comes before says why not, in the order of preference; whoever comes after is not asked.
    before = [kernel.name for kernel in PRIORITY[where.type]]
    assert [rejected for rejected, _ in choice.rejected] == before[: before.index(name)]
    assert all(reason for _, reason in choice.rejected)
    assert choice.serves


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shared": True}, "shared experts are not summed up inside"),
        ({"expert_parallel": 4}, "the routing is inside, and tokens go to other ranks after it"),
        ({"routing": "sigmoid_grouped"}, "the routing inside is softmax alone, not sigmoid_grouped"),
        ({"scaled": True}, "the routing inside is softmax alone, not scaled weights"),
        ({"router_bias": True}, "the routing inside is softmax alone, not a router's bias"),
        ({"biases": True}, "experts' biases are not added"),
        ({"activation": "clamped_swiglu"}, "the gated unit is SiLU, not clamped_swiglu"),
        ({"format": "batched"}, "each expert's tokens come in rows of its own"),
    ],
)
def test_what_a_monolithic_kernel_cannot_take(change: dict[str, object], reason: str) -> None:
    """It is refused, with the reason, before anything is allocated."""
    assert dict(select(PLAIN._replace(**change), H100).rejected)["triton"] == reason
    assert dict(select(FLOAT._replace(**change), CPU).rejected)["numba"] == reason


def test_an_explicit_choice() -> None:
    assert select(PLAIN, H100, "torch").backend == "torch"
    assert dict(select(PLAIN, H100, "triton_modular").rejected) == {"triton": "model.kernels asks for triton_modular"}
    # A family: its best form.
    assert select(DEEPSEEK, H100, "triton").backend == "triton_modular"


@pytest.mark.parametrize(
    ("spec", "where", "wanted", "said"),
    [
        (PLAIN, CPU, "triton", "triton cannot serve moe: Triton's kernels need a CUDA device"),
        (FLOAT, H100, "numba", "numba cannot serve moe: it is not for NVIDIA H100"),
        (GPT_OSS, H100, "triton", "triton cannot serve moe: .*not a router's bias; experts' biases are not added"),
        (PLAIN, H100, "cutlass", "moe has no backend cutlass"),
        (PLAIN._replace(lora=True), H100, None, "nothing serves moe on NVIDIA H100: triton: experts take no LoRA"),
        (PLAIN._replace(batch_invariant=True), H100, None, "cut by how many tokens there are"),
        (PLAIN._replace(gated=False), H100, None, "experts without a gate"),
        (PLAIN._replace(weights=FP8, activations="fp8"), CPU, None, "emulation: activations stay in bfloat16"),
        (PLAIN, Device("cuda", "Tesla T4", (7, 5)), None, "Triton needs compute capability 8.0, Tesla T4 has 7.5"),
        (PLAIN, Device("xpu", "a GPU of another make"), None, "no kernel computes experts on a GPU of another make"),
    ],
)
def test_a_choice_that_cannot_be(spec: ExpertsSpec, where: Device, wanted: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        select(spec, where, wanted)
    assert caught.value.fix


def test_names() -> None:
    """Each is unique, and says its family."""
    assert all(KERNELS[kernel.name] is kernel for kernels in PRIORITY.values() for kernel in kernels)
    assert {kernel.family for kernel in KERNELS.values()} == {"triton", "numba", "torch", "emulation"}
