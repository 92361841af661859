"""Where each tensor of a published checkpoint goes."""

from __future__ import annotations

from torch import Tensor

from .decoder import Decoder, Experts, Layer


def destinations(model: Decoder) -> dict[str, Tensor]:
    """Hugging Face tensor name → the view of the model's memory that it fills.

    Fused tensors (queries, keys and values; gate and up) appear as one view for each part.
    """
    names = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if not model.spec.tied_embeddings:
        names["lm_head.weight"] = model.head
    for layer in model.layers:
        prefix = f"model.layers.{layer.index}."
        names |= {prefix + name: tensor for name, tensor in _layer(layer, model).items()}
    return names


def alternatives(name: str) -> list[str]:
    """Other names under which checkpoints carry the tensor ``name``."""
    if ".mlp.experts." in name or ".mlp.gate.weight" in name:
        mixtral = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            mixtral = mixtral.replace(ours, theirs)
        return [mixtral]
    return []


def ignored(name: str, tied_embeddings: bool) -> bool:
    """Whether a tensor that a checkpoint has and the model does not need is harmless."""
    return name.endswith(".rotary_emb.inv_freq") or (tied_embeddings and name == "lm_head.weight")


def _layer(layer: Layer, model: Decoder) -> dict[str, Tensor]:
    spec = model.spec
    sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
    names = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_norm,
        "self_attn.o_proj.weight": layer.o,
    }
    for part, weight in zip("qkv", layer.qkv.split(sizes), strict=True):
        names[f"self_attn.{part}_proj.weight"] = weight
    if layer.qkv_bias is not None:
        for part, bias in zip("qkv", layer.qkv_bias.split(sizes), strict=True):
            names[f"self_attn.{part}_proj.bias"] = bias
    if layer.o_bias is not None:
        names["self_attn.o_proj.bias"] = layer.o_bias
    if layer.head_norm is not None:
        names["self_attn.q_norm.weight"] = layer.head_norm.query
        names["self_attn.k_norm.weight"] = layer.head_norm.key
    mlp = layer.mlp
    if isinstance(mlp, Experts):
        names["mlp.gate.weight"] = mlp.router
        for expert, (gate_up, down) in enumerate(zip(mlp.gate_up, mlp.down, strict=True)):
            gate, up = gate_up.chunk(2)
            names[f"mlp.experts.{expert}.gate_proj.weight"] = gate
            names[f"mlp.experts.{expert}.up_proj.weight"] = up
            names[f"mlp.experts.{expert}.down_proj.weight"] = down
        return names
    names["mlp.down_proj.weight"] = mlp.down
    names["mlp.gate_proj.weight"], names["mlp.up_proj.weight"] = mlp.gate_up.chunk(2)
    if mlp.gate_up_bias is not None and mlp.down_bias is not None:
        names["mlp.down_proj.bias"] = mlp.down_bias
        names["mlp.gate_proj.bias"], names["mlp.up_proj.bias"] = mlp.gate_up_bias.chunk(2)
    return names
