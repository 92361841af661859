"""Small quantised checkpoints, by quantisers that are slow and plain and share nothing with what reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers

from .checkpoints import make_checkpoint

E4M3 = torch.float8_e4m3fn
Quantized = tuple[dict[str, torch.Tensor], torch.Tensor]
"""What follows a module's name → tensor; and what these say, in float32."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8_blocks(weight: torch.Tensor, height: int, width: int, scale: str) -> Quantized:
    rows, columns = weight.shape
    codes, scales = torch.empty(rows, columns, dtype=E4M3), torch.empty(-(-rows // height), -(-columns // width))
    said = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(E4M3)
            said[at] = codes[at].float() * scales[i, j]
    return {"weight": codes, scale: scales}, said


def fp8_rows(weight: torch.Tensor) -> Quantized:
    tensors, said = fp8_blocks(weight, 1, weight.shape[1], "weight_scale")
    return tensors, said


def fp8_static(weight: torch.Tensor) -> Quantized:
    tensors, said = fp8_blocks(weight, *weight.shape, "weight_scale")
    tensors["weight_scale"] = tensors["weight_scale"].reshape([1])
    return {**tensors, "input_scale": torch.tensor(0.01)}, said


def _words(numbers: list[int]) -> int:
    word = sum(number << 4 * place for place, number in enumerate(numbers))
    return word - (1 << 32) if word >= 1 << 31 else word


def _integers(
    weight: torch.Tensor, groups: list[int], symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [rows, columns], zeros and scales [groups, rows], and what they say."""
    rows, count = len(weight), max(groups) + 1
    codes, said = torch.empty(weight.shape, dtype=torch.int64), torch.empty(weight.shape)
    zeros, scales = torch.empty(count, rows, dtype=torch.int64), torch.empty(count, rows, dtype=torch.float16)
    for group in range(count):
        columns = [column for column, own in enumerate(groups) if own == group]
        for row in range(rows):
            part = weight[row, columns]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = torch.tensor(max(-low, high) / 7 if symmetric else (high - low) / 15).half()
            zero = 8 if symmetric else max(0, min(15, round(-low / float(scale))))
            scales[group, row], zeros[group, row] = scale, zero
            for column in columns:
                code = max(0, min(15, round(float(weight[row, column]) / float(scale)) + zero))
                codes[row, column], said[row, column] = code, (code - zero) * float(scale)
    return codes, zeros, scales, said


def gptq(weight: torch.Tensor, groups: list[int], symmetric: bool, version: int) -> Quantized:
    codes, zeros, scales, said = _integers(weight, groups, symmetric)
    rows, columns = weight.shape
    packed = [[_words(codes[r, c : c + 8].tolist()) for r in range(rows)] for c in range(0, columns, 8)]
    stored = (zeros - 1) % 16 if version == 1 else zeros
    packed_zeros = [[_words(stored[g, r : r + 8].tolist()) for r in range(0, rows, 8)] for g in range(len(zeros))]
    return {
        "qweight": torch.tensor(packed, dtype=torch.int32),
        "qzeros": torch.tensor(packed_zeros, dtype=torch.int32),
        "scales": scales,
        "g_idx": torch.tensor(groups, dtype=torch.int32),
    }, said


def awq(weight: torch.Tensor, groups: list[int]) -> Quantized:
    codes, zeros, scales, said = _integers(weight, groups, False)
    rows, columns = weight.shape

    def word(numbers: list[int]) -> int:
        return _words([numbers[i] for i in AWQ_ORDER])

    packed = [[word(codes[r : r + 8, c].tolist()) for r in range(0, rows, 8)] for c in range(columns)]
    packed_zeros = [[word(zeros[g, r : r + 8].tolist()) for r in range(0, rows, 8)] for g in range(len(zeros))]
    return {
        "qweight": torch.tensor(packed, dtype=torch.int32),
        "qzeros": torch.tensor(packed_zeros, dtype=torch.int32),
        "scales": scales,
    }, said


def mxfp4(weight: torch.Tensor) -> Quantized:
    """blocks [rows, columns / 32, 16], scales [rows, columns / 32]."""
    rows, columns = weight.shape
    numbers = torch.tensor([*FP4, *(-number for number in FP4)])
    parts = weight.view(rows, -1, 32)
    exponents = torch.floor(torch.log2(parts.abs().amax(2).clamp(min=1e-30))) - 2
    codes = (parts.unsqueeze(3) / 2 ** exponents[..., None, None] - numbers).abs().argmin(3)
    said = numbers[codes] * 2 ** exponents.unsqueeze(2)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return {"blocks": blocks.to(torch.uint8), "scales": (exponents + 127).to(torch.uint8)}, said.reshape(rows, columns)


class Layout(NamedTuple):
    """How a checkpoint is published."""

    config: dict[str, Any]
    """Its quantization_config."""
    quantize: Callable[[str, torch.Tensor], Quantized]
    """Module's name and weight → tensors and what they say."""


def _in_order(columns: int, size: int) -> list[int]:
    return [column // size for column in range(columns)]


def _any_order(module: str, columns: int, size: int) -> list[int]:
    """The same for modules with the same inputs."""
    groups = _in_order(columns, size)
    random.Random(f"{module.rpartition('.')[0]} {columns}").shuffle(groups)
    return groups


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_NOT = ["lm_head", "model.embed_tokens"]

LAYOUTS: dict[str, Layout] = {
    "fp8_blocks": Layout(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32],
         "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.self_attn.o_proj"]},
        lambda module, weight: fp8_blocks(weight, 16, 32, "weight_scale_inv"),
    ),
    "fp8_static": Layout(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        lambda module, weight: fp8_static(weight),
    ),
    "compressed_rows": Layout(
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", r"re:.*mlp\.gate$"],
         "config_groups": {"group_0": {
             "targets": ["Linear"], "weights": {**_FLOAT8, "strategy": "channel"},
             "input_activations": {**_FLOAT8, "strategy": "token", "dynamic": True}}}},
        lambda module, weight: fp8_rows(weight),
    ),
    "gptq": Layout(
        {**_GPTQ, "sym": True, "desc_act": False},
        lambda module, weight: gptq(weight, _in_order(weight.shape[1], 8), True, 1),
    ),
    "gptq_zeros": Layout(
        {**_GPTQ, "sym": False, "desc_act": False, "group_size": -1},
        lambda module, weight: gptq(weight, [0] * weight.shape[1], False, 1),
    ),
    "gptq_order": Layout(
        {**_GPTQ, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
        lambda module, weight: gptq(weight, _any_order(module, weight.shape[1], 8), False, 2),
    ),
    "awq": Layout(
        {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": ["gate"]},
        lambda module, weight: awq(weight, _in_order(weight.shape[1], 8)),
    ),
    "mxfp4": Layout(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        lambda module, weight: mxfp4(weight),
    ),
}  # fmt: skip


_SIZES: dict[str, Any] = {"intermediate_size": 88, "num_hidden_layers": 3}
_MIXTURE = _SIZES | {"moe_intermediate_size": 24}
_MIXTRAL = _SIZES | {"head_dim": 8, "intermediate_size": 40}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "fp8_blocks", {"intermediate_size": 76}),
    ("qwen3_moe", "fp8_blocks", {}),
    ("llama", "fp8_static", {"intermediate_size": 75}),
    ("qwen3_moe", "compressed_rows", {}),
    ("llama", "gptq", _SIZES),
    ("qwen3_moe", "gptq_zeros", _MIXTURE),
    ("qwen3_moe", "gptq_order", _MIXTURE),
    ("deepseek_v3", "fp8_blocks", {}),
    ("mixtral", "awq", _MIXTRAL),
    ("qwen3_moe", "mxfp4", {"hidden_size": 64, "moe_intermediate_size": 32}),
    ("gpt_oss", "mxfp4", {"hidden_size": 64, "intermediate_size": 32}),
]
"""Family, layout, sizes that its groups and words divide."""


def make_quantized(family: str, layout: str, folder: Path, **overrides: Any) -> transformers.PreTrainedModel:
    """Write a quantised checkpoint of a family; returns, in float32, the model that it says."""
    plain = folder / "dequantised"
    make_checkpoint(family, plain, **overrides)
    config, quantize = LAYOUTS[layout]
    skipped = [name for name in config.get("modules_to_not_convert", ()) if name.endswith("o_proj")]
    tensors = safetensors.torch.load_file(plain / "model.safetensors")
    written, said = dict(tensors), dict(tensors)
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, weight in tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            # All experts in one tensor: [experts, inputs, outputs], and quantised [experts, outputs, inputs].
            each = [quantize(name, expert.T.contiguous()) for expert in weight]
            said[name] = torch.stack([what.T for _, what in each])
            del written[name]
            written |= {f"{name}_{kind}": torch.stack([parts[kind] for parts, _ in each]) for kind in each[0][0]}
            continue
        module = name.removesuffix(".weight")
        expert = ".experts." in module
        if (
            (not module.endswith(("_proj", "_with_mqa")) and not expert)
            or module in skipped
            or not name.endswith(".weight")
        ):
            continue
        if layout == "mxfp4":
            if not expert:
                continue
            prefix, _, rest = module.partition(".experts.")
            number, _, part = rest.partition(".")
            parts, said[name] = quantize(module, weight)
            del written[name]
            for kind, tensor in parts.items():
                experts.setdefault(f"{prefix}.experts", {}).setdefault(int(number), {})[f"{part}_{kind}"] = tensor
            continue
        parts, said[name] = quantize(module, weight)
        del written[name]
        written |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    for prefix, by_number in experts.items():
        for kind in ("blocks", "scales"):
            ordered = [by_number[number] for number in sorted(by_number)]
            both = [torch.stack((one[f"gate_proj_{kind}"], one[f"up_proj_{kind}"]), 1).flatten(0, 1) for one in ordered]
            written[f"{prefix}.gate_up_proj_{kind}"] = torch.stack(both)
            written[f"{prefix}.down_proj_{kind}"] = torch.stack([one[f"down_proj_{kind}"] for one in ordered])
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in written.items()}, folder / "model.safetensors"
    )
    safetensors.torch.save_file(said, plain / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | {"quantization_config": config}))
    kind = getattr(transformers, text["architectures"][0])
    model = kind.from_pretrained(plain, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model
