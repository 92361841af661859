"""Small random checkpoints of every supported family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    # Sharper than a new model's, so that greedy choices are not ties.
    "initializer_range": 0.2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "Llama",
        {
            "head_dim": 10,
            "num_key_value_heads": 6,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 37, "head_dim": 14}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}),
    "qwen3": (
        "Qwen3",
        {
            "head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
            },
        },
    ),
    "qwen3_mixed": (
        "Qwen3",
        {
            "head_dim": 14, "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 27,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 19,
            "norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 10, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 3,
            "intermediate_size": 19, "sliding_window": 23,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 128,
            },
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "num_key_value_heads": 6, "q_lora_rank": None, "kv_lora_rank": 20, "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6, "v_head_dim": 14, "attention_bias": True, "first_k_dense_replace": 1,
            "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
            "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 6, "q_lora_rank": 28, "kv_lora_rank": 22, "qk_nope_head_dim": 14,
            "qk_rope_head_dim": 8, "v_head_dim": 10, "first_k_dense_replace": 1, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_group": 4,
            "topk_group": 2, "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
                "mscale": 0.7, "mscale_all_dim": 1.0,
            },
        },
    ),
}  # fmt: skip


def make_checkpoint(family: str, folder: Path, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """Write a family's checkpoint into ``folder``, float32, and return the model that it is of."""
    name, special = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(_COMMON | special | overrides))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")  # the others refuse odd sizes
    with torch.no_grad():
        # Norms and biases start at one and zero, where a mistake in them would not show.
        corrections = [named for named in model.named_buffers() if named[0].endswith("correction_bias")]
        for parameter_name, parameter in [*model.named_parameters(), *corrections]:
            if "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter_name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            if parameter_name.endswith("gate_up_proj_bias"):
                parameter.mul_(40)  # beyond the unit's clamps
            elif parameter_name.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers continues ``prompt`` with."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return ids[0, len(prompt) :].tolist()
