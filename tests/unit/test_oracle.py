"""Which kernels serve which model on which device, and the reasons, without any of those devices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tandem.cluster.cli.app import app
from tandem.core.config import Config, load_config
from tandem.core.errors import ConfigError
from tandem.engine.models.spec import parse_spec
from tandem.kernels import device, moe_few, small_linear
from tandem.kernels.device import PRESETS, Device, describe
from tandem.kernels.moe_oracle import ExpertsSpec
from tandem.kernels.oracle import (
    BACKENDS,
    FUSED,
    NATIVE,
    REFERENCE,
    Needs,
    Ops,
    assemble,
    backends,
    choose,
    recordable,
    select,
)
from typer.testing import CliRunner

H100, A100, CPU = PRESETS["h100"], PRESETS["a100"], PRESETS["cpu"]
T4 = Device("cuda", "Tesla T4", (7, 5), 40)
FLOAT = Needs(torch.float32, torch.float32)
HALF = Needs(torch.bfloat16, torch.bfloat16)


def reasons(needs: Needs, where: Device, op: str) -> dict[str, str]:
    return dict(choose(needs, where)[op].rejected)


@pytest.mark.parametrize(
    ("needs", "where", "table"),
    [
        (HALF, H100, FUSED),
        (FLOAT, A100, FUSED),
        (FLOAT, CPU, NATIVE),
        (HALF, CPU, REFERENCE),
        (FLOAT, replace(CPU, numba=False), REFERENCE),
        (HALF, replace(H100, triton=False), REFERENCE),
        (Needs(torch.float16, torch.float16), T4, REFERENCE),
    ],
)
def test_whole_tables(needs: Needs, where: Device, table: Ops) -> None:
    """The engine compares by identity."""
    assert assemble(choose(needs, where)) is table
    assert recordable(table) is (table is FUSED)


def test_this_machine() -> None:
    cpu = torch.device("cpu")
    assert select(cpu, torch.float32) is NATIVE
    assert select(cpu, torch.bfloat16) is REFERENCE
    assert select(cpu, torch.float32, wanted={"moe": "torch"}).moe is REFERENCE.moe


def test_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    describe.cache_clear()
    with pytest.raises(ConfigError, match="no CUDA device"):
        describe(torch.device("cuda"))


def test_reasons() -> None:
    assert reasons(FLOAT, CPU, "moe") == {"triton": "Triton's kernels need a CUDA device"}
    assert reasons(HALF, replace(H100, triton=False), "linear") == {
        "triton": "Triton is not installed",
        "numba": "compiled kernels run on CPUs",
    }
    assert reasons(HALF, CPU, "linear")["numba"] == "compiled kernels compute in float32, not in bfloat16"
    assert reasons(FLOAT, replace(CPU, numba=False), "linear")["numba"] == "Numba is not installed"
    assert reasons(FLOAT, T4, "moe")["triton"] == "Triton needs compute capability 8.0, Tesla T4 has 7.5"
    assert (
        reasons(FLOAT._replace(kv_dtype=torch.float16), CPU, "rotary")["numba"]
        == "compiled kernels read float32 KV, not float16"
    )
    assert "numba" not in reasons(FLOAT._replace(kv_dtype=torch.float16), CPU, "linear")
    sinks = FLOAT._replace(sinks=True)
    assert reasons(sinks, CPU, "decode_layers")["numba"] == "whole layers take no attention sinks"
    assert choose(sinks, CPU)["decode_attention"].backend == "numba"
    assert "cuDNN" in choose(HALF, H100)["prefill_attention"].serves
    assert choose(HALF._replace(sinks=True), H100)["prefill_attention"].serves == "Triton"


def test_a_type_that_a_gpu_lacks() -> None:
    with pytest.raises(ConfigError, match=r"bfloat16 needs compute capability 8\.0, Tesla T4 has 7\.5") as caught:
        choose(HALF, T4)
    assert "model.dtype" in caught.value.fix
    eight = HALF._replace(kv_dtype=torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=r"nothing serves rotary on NVIDIA A100: .*float8_e4m3fn needs .* 8\.9"):
        choose(eight, A100)
    assert choose(eight, H100)["rotary"].backend == "triton"


def test_what_serves_in_parts() -> None:
    experts = ExpertsSpec(torch.bfloat16, num_experts=128, top_k=8)
    mixture = HALF._replace(experts=experts)
    rows, tokens = small_linear.most_tokens(torch.bfloat16), moe_few.most_tokens(128, 8)
    assert choose(mixture, H100)["linear"].serves == f"up to {rows} rows: Triton; more: cuBLAS"
    assert choose(mixture, H100)["moe"].serves.startswith(f"up to {tokens} tokens: Triton, pair by pair")
    assert choose(HALF._replace(experts=experts._replace(num_experts=512)), H100)["moe"].serves.startswith("no token")
    assert choose(FLOAT, H100)["linear"].serves.startswith("up to 2 rows:")
    assert moe_few.serves(tokens, 128, 8)
    assert not moe_few.serves(tokens + 1, 128, 8)


def test_every_operation_ends_with_torch() -> None:
    """So that there is always a way; and no backend claims a function that is another's."""
    for op in Ops._fields:
        if op == "moe":  # see test_moe_oracle.py
            continue
        found = backends(op)
        assert found[-1].name == "torch"
        assert len({getattr(backend.ops, op) for backend in found}) == len(found)
    assert [backend.name for backend in BACKENDS] == ["triton", "numba", "torch"]


def test_an_explicit_choice() -> None:
    choices = choose(FLOAT, CPU, {"linear": "torch"})
    assert choices["linear"].backend == "torch"
    assert dict(choices["linear"].rejected)["numba"] == "model.kernels asks for torch"
    assert choices["rms_norm"].backend == "numba"
    # Whole layers would go past the wish.
    assert dict(choices["decode_layers"].rejected)["numba"] == "model.kernels names who serves linear"
    assert choose(FLOAT, CPU, {"sample": "torch"})["decode_layers"].backend == "numba"
    assert recordable(assemble(choose(HALF, H100, {"linear": "torch", "gated_linear": "torch"})))
    assert not recordable(assemble(choose(HALF, H100, {"moe": "torch"})))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"linear": "triton"}, "triton cannot serve linear: Triton's kernels need a CUDA device"),
        ({"linear": "cutlass"}, "linear has no backend cutlass"),
        ({"liner": "torch"}, "there is no operation liner"),
    ],
)
def test_a_choice_that_cannot_serve(wanted: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        choose(FLOAT, CPU, wanted)
    assert caught.value.fix


def test_a_choice_in_the_yaml() -> None:
    assert load_config(None, ["model.kernels.moe=torch"]).model.kernels == {"moe": "torch"}


def told(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_explain() -> None:
    text = told("--device", "h100")
    assert "NVIDIA H100 (compute capability 9.0, 132 processors)" in text
    assert "more: cuBLAS" in text
    record = json.loads(told("--device", "cpu", "--json"))
    assert record["dtype"] == "float32"
    found = {entry["operation"]: entry for entry in record["operations"]}
    assert found["moe"]["backend"] == "numba"
    assert found["moe"]["rejected"] == [{"backend": "triton", "reason": "Triton's kernels need a CUDA device"}]
    # The demo model has experts in every layer.
    assert "gated_linear" not in found
    assert "this CPU" in told() or torch.cuda.is_available()


def test_explain_refuses(tmp_path: Path) -> None:
    for arguments in (["--device", "z80"], ["--device", "cpu", "--set", "kv.dtype=float16"]):
        with pytest.raises(ConfigError):
            told(*arguments)


def test_a_dense_model_has_no_experts() -> None:
    from tandem.bench.kernels import MODELS
    from tandem.cluster.cli.explain import choices_for

    dense, mixture = (parse_spec(MODELS[name], {}, name) for name in ("qwen3-8b", "qwen3-30b-a3b"))
    assert "moe" not in choices_for(Config(), dense, H100)
    assert "gated_linear" in choices_for(Config(), dense, H100)
    assert choices_for(Config(), mixture, H100)["moe"].backend == "triton"


def test_quantised_models() -> None:
    """Each scheme's operations, with what serves them and why others do not."""
    from tandem.bench.kernels import MODELS
    from tandem.cluster.cli.explain import choices_for

    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    mixture = parse_spec(MODELS["qwen3-30b-a3b"] | {"quantization_config": fp8 | {"weight_block_size": [128, 128]}}, {})
    choices = choices_for(Config(), mixture, H100)
    assert choices["packed_linear"].serves == "FP8, blocks of 128 × 128: Triton, dequantised in registers"
    assert choices["moe"].backend == "triton_packed"
    assert choices["moe"].serves.startswith("FP8, blocks of 128 × 128: Triton, sorted by expert")
    assert "linear" in choices, "of the router and the head"
    assert "gated_linear" not in choices
    old = choices_for(Config(), mixture, A100)["moe"]
    assert old.backend == "emulation"
    rejected = dict(old.rejected)
    assert rejected["triton"] == "weights are not taken in FP8, blocks of 128 × 128"
    assert rejected["triton_packed"] == "float8_e4m3fn needs compute capability 8.9, NVIDIA A100 has 8.0"
    dense = parse_spec(MODELS["qwen3-8b"] | {"quantization_config": fp8}, {})
    assert choices_for(Config(), dense, H100)["packed_linear"].serves.startswith(
        "FP8, a scale a tensor: up to 64 rows: Triton, dequantised in registers; more: torch"
    )
    assert "moe" not in choices_for(Config(), dense, H100)
    mxfp4 = parse_spec(MODELS["qwen3-30b-a3b"] | {"quantization_config": {"quant_method": "mxfp4"}}, {})
    on_cpu = choices_for(Config(), mxfp4, CPU)
    assert on_cpu["moe"].backend == "emulation"
    assert on_cpu["linear"].backend == "numba"
    assert "packed_linear" not in on_cpu
    shared = Config.model_validate(
        {"experts": {"parallel": 2}, "pools": {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}}
    )
    together = choices_for(shared, mxfp4, H100)
    assert together["moe"].backend == "triton_packed_modular"
    assert together["moe, after all_gather"].backend == "triton_packed_batched"
    assert together["exchange"].backend == "all_to_all"
    assert together["exchange, few tokens"].backend == "peer_memory"
    assert dict(together["exchange"].rejected)["peer_memory"] == "its buffers hold a decode step's tokens"
    only = choices_for(shared, mxfp4, CPU)
    assert only["exchange"].backend == "all_to_all"
    assert "exchange, few tokens" not in only


def test_presets_are_described_in_full() -> None:
    for preset in device.PRESETS.values():
        assert (preset.capability is None) is (preset.type == "cpu")
        assert preset.num_processors >= 1
