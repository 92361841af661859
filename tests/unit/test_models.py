"""config.json, weights, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.checkpoints import make_checkpoint
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.engine.build import build_engine, warm_up
from tandem.engine.kv_cache import plan_num_blocks
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.names import destinations
from tandem.engine.models.rope import cos_sin_table
from tandem.engine.models.spec import ARCHITECTURES, MoeSpec, context_length, parse_spec, read_spec
from tandem.engine.weights import fill_dummy, fingerprint, load_weights
from tandem.kernels.oracle import REFERENCE
from tandem.kv_transfer.layout import KVLayout

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip


def spec_of(**changes: Any) -> Any:
    return parse_spec({**BASE, **changes}, {})


def test_old_and_new_spellings_agree() -> None:
    old = spec_of(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16")
    new = spec_of(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, dtype="bfloat16")
    assert dict(old.rope) == dict(new.rope)
    assert old.dtype == new.dtype == "bfloat16"
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    assert spec_of(**moe, num_experts=6).moe == spec_of(**moe, num_local_experts=6).moe == MoeSpec(6, 2, 4, False)


def test_windows() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "num_hidden_layers": 4, "max_window_layers": 2}
    assert spec_of(**qwen).windows == (0, 0, 0, 0)
    assert spec_of(**qwen, use_sliding_window=True).windows == (0, 0, 16, 16)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert spec_of(**qwen, use_sliding_window=True, layer_types=kinds).windows == (16, 0, 16, 0)
    assert spec_of(architectures=["MistralForCausalLM"], sliding_window=7).windows == (7, 7)


def test_end_tokens() -> None:
    assert spec_of(eos_token_id=3).eos_ids == (3,)
    assert parse_spec({**BASE, "eos_token_id": 3}, {"eos_token_id": [4, 5]}).eos_ids == (4, 5)
    assert spec_of().eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type gpt2 is not supported"),
        ({"quantization_config": {"quant_method": "quip"}}, "quant_method: expected one of awq, .*, found 'quip'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 3}, "is not a multiple of"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"vocab_size": ...}, "needs the key 'vocab_size'"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
            "not within 1 … 2",
        ),
        ({"num_hidden_layers": "two"}, "config.json"),
    ],
)
def test_what_cannot_be_served_says_why(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not ...}
    with pytest.raises(ConfigError, match=message) as caught:
        parse_spec(config, {})
    if "architecture" in message:
        assert all(name in caught.value.fix for name in ARCHITECTURES)


def test_an_unknown_way_to_stretch_positions() -> None:
    with pytest.raises(ConfigError, match="rope_type 'longrope' is not supported"):
        cos_sin_table({"rope_type": "longrope"}, 8, 16, 16)


def test_context_length() -> None:
    assert context_length(spec_of(), None) == 64
    assert context_length(spec_of(), 32) == 32
    with pytest.raises(ConfigError, match="max_position_embeddings, 64"):
        context_length(spec_of(), 65)


def decoder(folder: Path) -> Decoder:
    return Decoder(read_spec(folder), 64, torch.float32, CPU, REFERENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", folder)
    return folder


def rewrite(source: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint with changed tensors."""
    target.mkdir(exist_ok=True)
    for path in source.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    return target


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    cases: list[tuple[Any, str]] = [
        (lambda t: t.pop(name), f"1 tensors are missing, among them {name}"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensor extra"),
        (lambda t: t.update({name: torch.ones(3, 5)}), r"has shape \[3, 5\], config.json says \[48, 48\]"),
    ]
    for number, (change, message) in enumerate(cases):
        with pytest.raises(ConfigError, match=message):
            load_weights(decoder(folder), rewrite(folder, tmp_path / str(number), change))
    (tmp_path / "0" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        load_weights(decoder(folder), tmp_path / "0")
    (tmp_path / "0" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load_weights(decoder(folder), tmp_path / "0")
    index = tmp_path / "0" / "model.safetensors.index.json"
    for text in (
        "{",
        "{}",
        json.dumps({"weight_map": {name: "../../etc/passwd"}}),
        json.dumps({"weight_map": {name: "x"}}),
    ):
        index.write_text(text)
        with pytest.raises(ConfigError):
            load_weights(decoder(folder), tmp_path / "0")


def test_progress_reaches_the_end(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    load_weights(decoder(folder), folder, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_dummy_weights_are_equal_everywhere(folder: Path) -> None:
    a, b = decoder(folder), decoder(folder)
    fill_dummy(a, 7)
    fill_dummy(b, 7)
    for name, place in destinations(a).items():
        assert torch.equal(place.tensor, destinations(b)[name].tensor)
    fill_dummy(b, 8)
    assert not torch.equal(a.embedding, b.embedding)


def test_the_fingerprint_tells_models_apart(folder: Path, tmp_path: Path) -> None:
    base = fingerprint(folder, "auto", "float32", 0)
    shutil.copytree(folder, tmp_path / "same")
    assert fingerprint(tmp_path / "same", "auto", "float32", 0) == base
    other = rewrite(folder, tmp_path / "other", lambda t: t["model.norm.weight"].add_(1))
    several = {
        base, fingerprint(other, "auto", "float32", 0), fingerprint(folder, "auto", "bfloat16", 0),
        fingerprint(folder, "dummy", "float32", 0), fingerprint(folder, "dummy", "float32", 1),
    }  # fmt: skip
    assert len(several) == 5


MEMORY = r"""
import re, sys
from pathlib import Path
import psutil, torch
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.names import destinations
from tandem.engine.models.spec import read_spec
from tandem.engine.weights import load_weights
from tandem.kernels.oracle import REFERENCE
model = Decoder(read_spec(Path(sys.argv[1])), 64, torch.float32, torch.device("cpu"), REFERENCE)
before = psutil.Process().memory_info().rss
load_weights(model, Path(sys.argv[1]))
# Not getrusage: its maximum begins with that of the process that started this one.
after = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
weights = sum(p.tensor.numel() * p.tensor.element_size() for p in destinations(model).values())
print((after - before) / weights, weights)
"""


def test_peak_memory_is_the_weights(tmp_path: Path) -> None:
    """Three shards, 900 MB: read through a mapping, the peak is at most 1.1 times the weights."""
    config = {
        **BASE, "vocab_size": 20_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2,
        "num_attention_heads": 16, "architectures": ["LlamaForCausalLM"], "head_dim": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = decoder(tmp_path)
    names = list(destinations(model))
    weight_map = {}
    for shard in range(3):
        part = {name: torch.randn(destinations(model)[name].shape) for name in names[shard::3]}
        safetensors.torch.save_file(part, tmp_path / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"{shard}.safetensors")
        del part
    del model
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    ratio, weights = map(float, done.stdout.split())
    print(f"peak {ratio:.3f} of {weights / 1e6:.0f} MB")
    assert weights > 800e6
    assert ratio <= 1.1


def test_the_cache_fits_one_sequence_or_says_what_is_needed() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_tokens=16, dtype="float32")
    assert layout.block_bytes == 2 * 2 * 2 * 8 * 16 * 4
    assert plan_num_blocks(layout, 4, 100 * layout.block_bytes + 5, 4, 64, 0) == 100
    assert plan_num_blocks(layout, 4, "auto", 4, 64, 1 << 40) == 16
    with pytest.raises(
        ConfigError, match=r"hold 2 blocks of 16 tokens; one sequence of model.max_model_len = 64 tokens needs 4,"
    ) as caught:
        plan_num_blocks(layout, 4, 2 * layout.block_bytes, 4, 64, 1 << 40)
    assert "raise kv.capacity" in caught.value.fix


def test_engines_on_a_cpu(folder: Path) -> None:
    """Half precision works too, by torch; a warm-up leaves nothing behind."""
    for dtype in ("float32", "bfloat16", "float16"):
        config = Config.model_validate(
            {"model": {"path": str(folder), "dtype": dtype, "max_model_len": 128}, "kv": {"capacity": "8MiB"}}
        )
        engine = build_engine(config, 4, CPU, lambda *_: None).engine
        warm_up(engine, 64, lambda *_: None)
        engine.pool.check()
        assert engine.pool.num_free == engine.pool.num_blocks
        assert engine.cache.tensor.dtype == getattr(torch, dtype)
    for kv_dtype in ("bfloat16", "fp8_e4m3"):
        config = Config.model_validate({"model": {"path": str(folder)}, "kv": {"dtype": kv_dtype}})
        with pytest.raises(ConfigError, match=r"kv\.dtype"):
            build_engine(config, 4, CPU, lambda *_: None)


def test_fp8_kv_on_a_cpu(folder: Path) -> None:
    """By torch, for a model in half precision: a quarter of the bytes of float32."""
    kv = {"dtype": "fp8_e4m3", "capacity": "1MiB"}
    model = {"path": str(folder), "dtype": "bfloat16", "max_model_len": 128}
    engine = build_engine(Config.model_validate({"model": model, "kv": kv}), 4, CPU, lambda *_: None).engine
    warm_up(engine, 64, lambda *_: None)
    engine.pool.check()
    assert engine.cache.tensor.dtype == torch.float8_e4m3fn
    assert engine.cache.tensor.nbytes == engine.cache.num_blocks * engine.cache.layout.block_bytes
    assert not engine.cache.tensor.float().isnan().any()
