"""Quantised weights: what they say, in float64; what ranks hold of them; what is refused, and when; their bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import quantized
from support.quantized import LAYOUTS, make_quantized
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.engine.build import build_engine
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import Experts
from tandem.engine.models.names import destinations
from tandem.engine.models.quantization import parse_quantization
from tandem.engine.models.spec import read_spec
from tandem.engine.tensor_parallel import Alone
from tandem.engine.weights import check_weights, fill_dummy, load_weights, num_bytes
from tandem.kernels import fp8_linear
from tandem.kernels.oracle import REFERENCE
from tandem.kernels.schemes.fp8 import Fp8Weight, to_fp8
from tandem.kernels.schemes.packed import Cut, Packed

CPU = torch.device("cpu")
META = torch.device("meta")
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4, "hidden_size": 64,
    "intermediate_size": 64,
}  # fmt: skip
MIXTURE = SIZES | {"moe_intermediate_size": 64}


def packed(layout: str, parts: dict[str, torch.Tensor]) -> tuple[Packed, torch.Tensor]:
    """Matrices one below the other, by a layout's slow quantiser; and what they say."""
    scheme = parse_quantization(LAYOUTS[layout].config, "float16").scheme
    columns = next(iter(parts.values())).shape[1]
    weight = scheme.allocate(
        lambda shape, dtype: torch.empty(shape, dtype=dtype), [len(p) for p in parts.values()], columns, columns
    )
    said = []
    for index, (name, matrix) in enumerate(parts.items()):
        tensors, value = LAYOUTS[layout].quantize(name, matrix)
        cut = Cut(len(matrix), columns, 0, len(matrix), 0, columns)
        places = scheme.destinations(weight, index, cut)
        assert tensors.keys() <= places.keys()
        for suffix, place in places.items():
            assert place.is_whole
            if place.optional and suffix not in tensors:
                continue
            assert tensors[suffix].dtype in place.dtypes
            place.fill(tensors[suffix])
        said.append(value)
    return weight, torch.cat(said)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "mxfp4"])
@pytest.mark.parametrize("columns", [1, 8, 40, 45])
def test_what_a_weight_says(layout: str, columns: int) -> None:
    """In float64 to a float32's half step, in float32 the same bits, in half precision the nearest."""
    fp8 = layout.startswith(("fp8", "compressed"))
    if not fp8 and columns % 8:
        with pytest.raises(ValueError, match="expected a multiple of 8, found"):
            packed(layout, {"a.q": torch.randn(8, columns)})
        return
    rows = (37, 5, 16) if fp8 else (32, 8, 16)
    weight, said = packed(layout, {f"a.{i}": torch.randn(n, columns) for i, n in enumerate(rows)})
    assert weight.dequantize(torch.float32).equal(said)
    assert (weight.dequantize(torch.float64) - said).abs().max() <= said.abs().max() * 2**-24
    for dtype in (torch.bfloat16, torch.float16):
        assert weight.dequantize(dtype).equal(said.to(dtype))


def test_every_number_of_mxfp4() -> None:
    """Every code with scales from end to end, but for the two ends of float32."""
    scheme = parse_quantization(LAYOUTS["mxfp4"].config, "bfloat16").scheme
    weight = scheme.allocate(lambda shape, dtype: torch.zeros((1, *shape), dtype=dtype), [251], 32, 32)
    places = scheme.destinations(weight, 0, Cut(251, 32, 0, 251, 0, 32))
    low = torch.arange(16, dtype=torch.uint8)
    places["blocks"].fill(((low + 1) % 16 * 16 + low).expand(1, 251, 1, 16))
    places["scales"].fill(torch.arange(1, 252, dtype=torch.uint8).view(1, 251, 1))
    table = [*quantized.FP4, *(-number for number in quantized.FP4)]
    for dtype in (torch.float32, torch.float64):
        said = weight.dequantize(dtype)[0]
        for row in (0, 1, 125, 126, 250):
            for column in range(32):
                number = table[(column // 2 + column % 2) % 16]
                assert float(said[row, column]) == math.ldexp(number, row + 1 - 127)


def test_rounded_inputs() -> None:
    """Each way's largest error, in float64: half a step of e4m3, 2⁻⁴ of a number or of what the scale's steps are."""
    x = torch.randn(7, 300) * torch.logspace(-3, 3, 7).unsqueeze(1)

    def round_trip(x: torch.Tensor, kind: Any, scale: torch.Tensor | None = None) -> torch.Tensor:
        codes, scales = to_fp8(x, kind, 128, scale)
        return codes.double() * scales.repeat_interleave(128 if kind == "group" else 300, 1)[:, : x.shape[1]]

    for kind, block in (("token", 300), ("group", 128)):
        got = round_trip(x, kind)
        for start in range(0, 300, block):
            part = slice(start, start + block)
            step = x[:, part].abs().amax(1, keepdim=True).double() / 448 * 2**-10
            assert ((got - x)[:, part].abs() <= x[:, part].abs() * 2**-4 * 1.0001 + step).all(), kind
    assert round_trip(x, "static", torch.tensor([0.5, 1.0])).abs().max() == 448
    assert not round_trip(torch.zeros(2, 4), "token").isnan().any()


@pytest.mark.parametrize("layout", ["fp8_static", "compressed_rows"])
def test_a_product_in_fp8(layout: str) -> None:
    """Against float64 over the same rounded inputs: a bfloat16's half step, and what float32 sums lose."""
    weight, _ = packed(layout, {f"a.{i}": torch.randn(n, 64) for i, n in enumerate((32, 16))})
    assert isinstance(weight, Fp8Weight)
    x, bias = torch.randn(70, 64).bfloat16(), torch.randn(48).bfloat16()
    codes, scales = to_fp8(x, weight.activation, scale=weight.input_scales)
    want = (codes.double() * scales) @ weight.dequantize(torch.float64).T
    got = fp8_linear.multiply(x, weight)
    assert ((got - want).abs() <= want.abs() * 2**-8 + 1e-4).all()
    assert fp8_linear.multiply(x, weight, bias).equal(got + bias)
    assert not fp8_linear.serves(x, weight), "a CPU has no such units"


class Rank(Alone):
    """A rank of a group whose sums nobody asks for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def model_of(folder: Path, device: torch.device = CPU, rank: int = 0, size: int = 1) -> Decoder:
    return Decoder(read_spec(folder), 64, torch.float32, device, REFERENCE, group=Rank(rank, size))


def said(model: Decoder) -> list[dict[str, torch.Tensor]]:
    """Of each layer: its products' matrices, dequantised."""
    layers = []
    for layer in model.layers:
        mlp = layer.mlp.weights if isinstance(layer.mlp, Experts) else layer.mlp
        weights = {"qkv": layer.qkv, "o": layer.o, "gate_up": mlp.gate_up, "down": mlp.down}
        layers.append({n: w.dequantize(torch.float32) if isinstance(w, Packed) else w for n, w in weights.items()})
    return layers


@pytest.mark.parametrize(
    "layout", ["fp8_blocks", "fp8_static", "compressed_rows", "gptq_zeros", "gptq_order", "awq", "mxfp4"]
)
def test_ranks_hold_parts_of_one_model(layout: str, tmp_path: Path) -> None:
    """Each rank's matrices are rows and columns of the whole model's, read or made up."""
    make_quantized("qwen3_moe", layout, tmp_path, **MIXTURE | {"decoder_sparse_step": 1})
    for fill in (lambda model: load_weights(model, tmp_path), lambda model: fill_dummy(model, 3)):
        whole = model_of(tmp_path)
        fill(whole)
        expected = said(whole)
        for rank in range(2):
            part = model_of(tmp_path, rank=rank, size=2)
            fill(part)
            for got, want in zip(said(part), expected, strict=True):
                rows = torch.arange(128).view(4, 2, 16)[:, rank].flatten()  # of queries, keys, values, in 64 + 32 + 32
                rows = torch.cat([torch.arange(n) + start + rank * n for start, n in ((0, 32), (64, 16), (96, 16))])
                assert got["qkv"].equal(want["qkv"][rows])
                assert got["o"].equal(want["o"][:, rank * 32 : rank * 32 + 32])
                gate, up = want["gate_up"].chunk(2, 1)
                inner = slice(rank * 32, rank * 32 + 32)
                assert got["gate_up"].equal(torch.cat((gate[:, inner], up[:, inner]), 1))
                assert got["down"].equal(want["down"][:, :, inner])


@pytest.mark.parametrize(
    ("layout", "sizes", "size", "message"),
    [
        (
            "fp8_blocks",
            {"intermediate_size": 96},
            2,
            r"mlp\.(gate|down)_proj: .* among 2 ranks: .* multiple of (16|32), found (24|48)",
        ),
        ("gptq", {"intermediate_size": 16}, 4, r"mlp\.(gate|down)_proj: .* multiple of 8, found 4"),
        ("awq", {"intermediate_size": 48}, 4, r"mlp\.(gate|down)_proj: .* multiple of 8, found 12"),
        ("gptq", {"intermediate_size": 36}, 1, r"layers\.0\.mlp\.gate_proj: .* multiple of 8, found 36"),
    ],
)
def test_what_would_be_cut_through_is_refused(
    layout: str, sizes: dict[str, int], size: int, message: str, tmp_path: Path
) -> None:
    """From config.json alone."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES | {"vocab_size": 16} | sizes, architectures=["LlamaForCausalLM"])
    (tmp_path / "config.json").write_text(
        json.dumps({**config.to_dict(), "quantization_config": LAYOUTS[layout].config})
    )
    with pytest.raises(ConfigError, match=message):
        destinations(model_of(tmp_path, META, 1 if size > 1 else 0, size))


def test_one_scheme_for_what_is_computed_together(tmp_path: Path) -> None:
    make_quantized("llama", "gptq", tmp_path, **SIZES)
    text = json.loads((tmp_path / "config.json").read_text())
    text["quantization_config"]["modules_to_not_convert"] = ["k_proj"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=r"self_attn.q_proj, k_proj, v_proj, .* expected all or none"):
        model_of(tmp_path, META)


Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for layout in ("fp8_blocks", "gptq", "gptq_order"):
        folders[layout] = tmp_path_factory.mktemp(layout)
        make_quantized("llama", layout, folders[layout], **SIZES, attention_bias=False, mlp_bias=False)
    return folders


def changed(folder: Path, target: Path, change: Any, **config: Any) -> Path:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] |= config
    (target / "config.json").write_text(json.dumps(text))
    return target


@pytest.mark.parametrize(
    ("layout", "change", "config", "message"),
    [
        ("fp8_blocks", lambda t: t.pop(f"{Q}.weight_scale_inv"), {}, f"1 tensors are missing, among them {Q}.weight_scale_inv"),
        (
            "fp8_blocks", lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(4, 3)}), {},
            rf"{Q}.weight_scale_inv has shape \[4, 3\], config.json says \[4, 2\]",
        ),
        (
            "fp8_blocks", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), {},
            rf"{Q}.weight has the type F32, config.json says F8_E4M3",
        ),
        ("fp8_blocks", lambda t: None, {"weight_block_size": [32, 32]}, r"weight_scale_inv has shape \[\d, 2\], config.json says \[\d, 2\]"),
        (
            "gptq", lambda t: None, {"quant_method": "awq"},
            r"qweight has shape|unexpected tensor .*g_idx: .* quantised by awq, and .* is made of qweight, qzeros, scales",
        ),
        ("gptq", lambda t: None, {"group_size": 16}, r"has shape \[8, \d+\], config.json says \[4, \d+\]"),
        ("gptq", lambda t: None, {"group_size": 24}, r"columns, in groups of 24,: expected a multiple of 24, found 64"),
        ("gptq", lambda t: None, {"modules_to_not_convert": ["self_attn"]}, r"unexpected tensor .* is made of weight"),
    ],
)  # fmt: skip
def test_refused_before_memory_is_taken(
    folders: dict[str, Path], layout: str, change: Any, config: Any, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = changed(folders[layout], tmp_path, change, **config)
    with pytest.raises(ConfigError, match=message):
        check_weights(model_of(folder, META), folder)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(ConfigError, match=message):
        build_engine(Config.model_validate({"model": {"path": str(folder)}}), 4, CPU, lambda *_: None)


def put(name: str, at: tuple[int, ...], value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.{name}"][at] = value

    return change


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("fp8_blocks", put("weight_scale_inv", (1, 1), math.nan), rf"{Q}.weight_scale_inv: expected finite scales, found 1 of 8"),
        ("gptq", put("scales", (0, 3), math.inf), rf"{Q}.scales: expected finite scales, found 1 of 512 that are NaN or inf"),
        ("gptq", put("qzeros", (2, 2), 0), rf"{Q}.qzeros: config.json says sym, so every zero is to be 8; found 1"),
        ("gptq", put("g_idx", (9,), 3), rf"{Q}.g_idx: config.json says that columns are in order"),
        ("gptq_order", put("g_idx", (9,), 8), rf"{Q}.g_idx: expected groups within 0 … 7, found 0 … 8"),
        ("gptq_order", lambda t: t[f"{Q}.g_idx"].copy_(t[f"{Q}.g_idx"].flip(0).clone()), "expected the order of the matrix"),
        ("gptq", lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(64)}), "up_proj.bias: expected none, or zeros"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(
    folders: dict[str, Path], layout: str, change: Any, message: str, tmp_path: Path
) -> None:
    folder = changed(folders[layout], tmp_path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_weights(model_of(folder), folder)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "the key 'bits' is missing"),
        ({"quant_method": "gptq", "bits": 3}, "bits: expected 4, found 3"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: expected e4m3, found 'e5m2'"),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": 7},
            "quantization_config, of fp8",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size: expected -1 or"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: expected gemm or GEMM, found 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format: expected float-quantized"),
        ({"quant_method": "bitsandbytes"}, "expected one of awq, compressed-tensors, fp8, gptq, mxfp4, found"),
        (["fp8"], "expected an object"),
    ],
)
def test_what_no_scheme_serves(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_quantization(config, "bfloat16")


def test_which_modules() -> None:
    fp8 = parse_quantization(LAYOUTS["fp8_blocks"].config, "bfloat16")
    assert fp8.scheme_of("model.layers.1.mlp.gate_proj") is fp8.scheme
    assert fp8.scheme_of("model.layers.1.mlp.gate") is fp8.scheme_of("lm_head") is None
    rows = parse_quantization(LAYOUTS["compressed_rows"].config, "bfloat16")
    assert rows.scheme_of("model.layers.7.mlp.gate") is None
    assert rows.scheme_of("model.layers.7.mlp.gate_proj") is rows.scheme
    awq = parse_quantization(LAYOUTS["awq"].config, "float16")
    assert awq.scheme_of("model.layers.1.mlp.experts.0.gate_proj") is awq.scheme
    mxfp4 = parse_quantization(LAYOUTS["mxfp4"].config, "bfloat16")
    assert mxfp4.scheme_of("model.layers.3.self_attn.q_proj") is None
    assert mxfp4.scheme_of("model.layers.3.mlp.experts.0.down_proj") is mxfp4.scheme


@pytest.mark.parametrize(
    ("layout", "bytes_a_weight"),
    [("fp8_blocks", 1 + 4 / 16), ("compressed_rows", 1 + 4 / 64), ("gptq", 0.5 + 4 / 8), ("mxfp4", 0.5 + 1 / 32)],
)
def test_weights_stay_packed(layout: str, bytes_a_weight: float, tmp_path: Path) -> None:
    """In memory as in the file, scales included; and an expert's tensors begin with the dimension of experts."""
    make_quantized("qwen3_moe", layout, tmp_path, **MIXTURE | {"decoder_sparse_step": 1})
    model = model_of(tmp_path)
    load_weights(model, tmp_path)
    for layer in model.layers:
        own = layer.mlp.weights
        assert all(len(tensor) == 5 for tensor in own.tensors().values())
        for weight in own.packed():
            assert weight.nbytes <= 5 * weight.rows * weight.columns * bytes_a_weight
    packed_bytes = sum(
        weight.nbytes for layer in model.layers for weight in (layer.qkv, layer.o, *layer.mlp.weights.packed())
    )
    plain = num_bytes(model) - packed_bytes
    assert plain < num_bytes(model_of(tmp_path / "dequantised")) / 3
