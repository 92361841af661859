"""DeepSeek's checkpoints: what config.json says, which tensors are of no use, and what the cache keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.checkpoints import make_checkpoint
from tandem.cluster.cli.explain import choices_for
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import Experts
from tandem.engine.models.shard import kv_heads_of, shard
from tandem.engine.models.spec import parse_spec, read_spec
from tandem.engine.weights import check_weights, load_weights
from tandem.kernels.device import PRESETS
from tandem.kernels.oracle import REFERENCE
from tandem.kv_transfer.layout import KVLayout

CPU = torch.device("cpu")
# As published, without what nobody reads.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def test_v3_as_published() -> None:
    spec = parse_spec(V3, {})
    assert spec.latent is not None
    assert spec.latent.scale == pytest.approx(0.1352337788608801)
    assert spec.moe is not None
    assert (spec.moe.method, spec.moe.num_groups, spec.moe.top_groups, spec.moe.scale) == ("sigmoid_grouped", 8, 4, 2.5)
    assert spec.moe_layers == frozenset(range(3, 61))
    layout = KVLayout(61, spec.num_kv_heads, spec.head_dim, 16, "bfloat16", spec.num_kv_parts)
    assert layout.token_bytes == 61 * 576 * 2
    # Every rank of eight has the same head of the cache, and its share of the others.
    assert shard(spec, 8).num_heads == 16
    assert {kv_heads_of(spec, rank, 8) for rank in range(8)} == {range(1)}


def test_v2_scales_the_weights_that_it_does_not_normalise() -> None:
    v2 = V3 | {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "group_limited_greedy"}
    del v2["scoring_func"]
    for normalised, scale in ((False, 2.5), (True, 1.0)):
        moe = parse_spec(v2 | {"norm_topk_prob": normalised}, {}).moe
        assert moe is not None
        assert (moe.method, moe.renormalize, moe.scale) == ("softmax_grouped", normalised, scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func: expected sigmoid, found 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method: expected noaux_tc, found 'greedy'"),
        ({"n_group": 7}, "expected groups that divide 256 experts, and some of them, found 7 and 4"),
        ({"topk_group": 9}, "found 8 and 9"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 is odd"),
        ({"mlp_bias": True}, "mlp_bias: expected false"),
        ({"kv_lora_rank": ...}, "needs the key 'kv_lora_rank'"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "topk_method: expected greedy or group_limited_greedy"),
    ],
)
def test_what_cannot_be_served_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec({key: value for key, value in {**V3, **changes}.items() if value is not ...}, {})


def test_who_serves_latents_is_explained() -> None:
    for device, backend in (("cpu", "torch"), ("h100", "triton")):
        choices = choices_for(Config(), parse_spec(V3, {}), PRESETS[device])
        assert choices["latent_decode"].backend == choices["latent_prefill"].backend == backend
        assert "decode_attention" not in choices


def test_blocks_of_scales_are_not_cut_through() -> None:
    """By how many ranks the published checkpoint can be shared is known before a byte is read."""

    class Rank:
        def __init__(self, size: int) -> None:
            self.rank, self.size = 0, size

    def check(size: int) -> None:
        group: Any = Rank(size)
        check_weights(Decoder(spec, 16, torch.bfloat16, torch.device("meta"), REFERENCE, group=group), None)

    spec = parse_spec(V3 | {"num_hidden_layers": 4, "n_routed_experts": 16}, {})
    check(16)
    with pytest.raises(ConfigError, match=r"_proj: cannot be quantised .* among 32 ranks"):
        check(32)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(3, 5)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    model = Decoder(read_spec(tmp_path), 16, torch.bfloat16, CPU, REFERENCE)
    load_weights(model, tmp_path)
    experts = model.layers[2].mlp
    assert isinstance(experts, Experts)
    # Corrections are compared with each other: in bfloat16 many would be equal.
    assert torch.equal(experts.correction, tensors["model.layers.2.mlp.gate.e_score_correction_bias"])
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(3, 5)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"unexpected tensor model\.layers\.2\.eh_proj\.weight"):
        load_weights(Decoder(read_spec(tmp_path), 16, torch.float32, CPU, REFERENCE), tmp_path)
