"""Where each tensor of a published checkpoint goes, and which part of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..tensor_parallel import Group
from .decoder import Decoder, Layer
from .experts import Experts
from .shard import first_kv_head, vocabulary_rows


class Destination(NamedTuple):
    """The part of a checkpoint's tensor that a rank holds."""

    tensor: Tensor
    """The view of the model's memory that it fills."""
    shape: tuple[int, ...]
    """Of the whole tensor, in the checkpoint."""
    dim: int = 0
    """Along which the part is cut out: 0 for rows, 1 for columns."""
    start: int = 0
    """Where the part begins."""

    def part_of(self, whole: Tensor) -> Tensor:
        """What of ``whole`` goes here: a view."""
        return whole.narrow(self.dim, self.start, self.tensor.shape[self.dim])

    @property
    def is_whole(self) -> bool:
        """Whether the part is everything."""
        return self.tensor.shape == self.shape


def destinations(model: Decoder) -> dict[str, Destination]:
    """Hugging Face tensor name → where it goes.

    Fused tensors (queries, keys and values; gate and up) appear as one destination for each part.
    """
    spec, group = model.spec, model.group
    names = {"model.embed_tokens.weight": _whole(model.embedding), "model.norm.weight": _whole(model.norm)}
    if not spec.tied_embeddings:
        rows = vocabulary_rows(spec, group.rank, group.size)
        names["lm_head.weight"] = _rows(model.head[: len(rows)], spec.vocab_size, rows.start)
    for layer in model.layers:
        prefix = f"model.layers.{layer.index}."
        names |= {prefix + name: destination for name, destination in _layer(layer, model).items()}
    return names


def elsewhere(model: Decoder) -> set[str]:
    """The names of tensors that other ranks have, which hold other experts."""
    names = set()
    for layer in model.layers:
        if isinstance(layer.mlp, Experts):
            for expert in set(range(layer.mlp.spec.num_experts)) - set(layer.mlp.held):
                prefix = f"model.layers.{layer.index}.mlp.experts.{expert}."
                names |= {f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")}
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


def _whole(tensor: Tensor) -> Destination:
    return Destination(tensor, tuple(tensor.shape))


def _rows(tensor: Tensor, whole: int, start: int) -> Destination:
    return Destination(tensor, (whole, *tensor.shape[1:]), 0, start)


def _columns(tensor: Tensor, whole: int, start: int) -> Destination:
    return Destination(tensor, (tensor.shape[0], whole), 1, start)


def _layer(layer: Layer, model: Decoder) -> dict[str, Destination]:
    spec, local, group = model.spec, model.local, model.group
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    first_query = group.rank * local.num_heads * spec.head_dim
    first_key = first_kv_head(spec, group.rank, group.size) * spec.head_dim
    parts = [("q", queries, first_query), ("k", keys, first_key), ("v", keys, first_key)]
    sizes = [local.num_heads * spec.head_dim, *[local.num_kv_heads * spec.head_dim] * 2]
    names = {
        "input_layernorm.weight": _whole(layer.input_norm),
        "post_attention_layernorm.weight": _whole(layer.post_norm),
        "self_attn.o_proj.weight": _columns(layer.o, queries, first_query),
    }
    for (part, whole, start), weight in zip(parts, layer.qkv.split(sizes), strict=True):
        names[f"self_attn.{part}_proj.weight"] = _rows(weight, whole, start)
    if layer.qkv_bias is not None:
        for (part, whole, start), bias in zip(parts, layer.qkv_bias.split(sizes), strict=True):
            names[f"self_attn.{part}_proj.bias"] = _rows(bias, whole, start)
    if layer.o_bias is not None:
        names["self_attn.o_proj.bias"] = _whole(layer.o_bias)
    if layer.head_norm is not None:
        names["self_attn.q_norm.weight"] = _whole(layer.head_norm.query)
        names["self_attn.k_norm.weight"] = _whole(layer.head_norm.key)
    mlp = layer.mlp
    if isinstance(mlp, Experts):
        return names | _experts(mlp, group)
    names |= {f"mlp.{name}": part for name, part in _gated(mlp.gate_up, mlp.down, spec.inner, group.rank).items()}
    if mlp.gate_up_bias is not None and mlp.down_bias is not None:
        names["mlp.down_proj.bias"] = _whole(mlp.down_bias)
        for name, bias in zip(("gate", "up"), mlp.gate_up_bias.chunk(2), strict=True):
            names[f"mlp.{name}_proj.bias"] = _rows(bias, spec.inner, group.rank * local.inner)
    return names


def _experts(mlp: Experts, group: Group) -> dict[str, Destination]:
    names = {"mlp.gate.weight": _whole(mlp.router)}
    if mlp.router_bias is not None:
        names["mlp.gate.bias"] = _whole(mlp.router_bias)
    if mlp.correction is not None:
        names["mlp.gate.e_score_correction_bias"] = _whole(mlp.correction)
    whole = mlp.spec.inner * group.size
    for slot, index in enumerate(mlp.held):
        expert = mlp.weights.expert(slot)
        parts = _gated(expert.gate_up, expert.down, whole, group.rank)
        names |= {f"mlp.experts.{index}.{name}": part for name, part in parts.items()}
    if mlp.shared is not None:
        parts = _gated(mlp.shared.gate_up, mlp.shared.down, mlp.spec.shared_inner * group.size, group.rank)
        names |= {f"mlp.shared_experts.{name}": part for name, part in parts.items()}
    return names


def _gated(gate_up: Tensor, down: Tensor, inner: int, rank: int) -> dict[str, Destination]:
    """The three matrices of a gated unit whose whole inner size is ``inner``."""
    gate, up = gate_up.chunk(2)
    start = rank * len(gate)
    return {
        "gate_proj.weight": _rows(gate, inner, start),
        "up_proj.weight": _rows(up, inner, start),
        "down_proj.weight": _columns(down, inner, start),
    }
