"""Where each tensor of a published checkpoint goes, and which part of it."""

from __future__ import annotations

from torch import Tensor

from ...kernels.schemes.destination import Destination
from ...kernels.schemes.packed import Cut, Packed, Weight, small
from .decoder import Decoder, Layer
from .experts import Experts
from .latent_attention import LatentAttention
from .parameters import cannot_divide
from .shard import first_kv_head, vocabulary_rows
from .spec import ModelSpec


def destinations(model: Decoder) -> dict[str, Destination]:
    """Hugging Face tensor name → where it goes.

    Fused tensors (queries, keys and values; gate and up) appear as one destination for each part, quantised ones as one
    for each tensor that they are made of.

    Raises:
        ConfigError: the ranks' parts would cut through groups or blocks of quantised weights.
    """
    spec, group = model.spec, model.group
    names = {"model.embed_tokens.weight": _whole(model.embedding), "model.norm.weight": _whole(model.norm)}
    if not spec.tied_embeddings:
        rows = vocabulary_rows(spec, group.rank, group.size)
        names["lm_head.weight"] = _rows(model.head[: len(rows)], spec.vocab_size, rows.start)
    for layer in model.layers:
        names |= _layer(layer, model, f"model.layers.{layer.index}.")
    return names


def elsewhere(model: Decoder) -> set[str]:
    """The names of tensors that other ranks have: those of other experts, and biases that one rank adds for all."""
    names = set()
    for layer in model.layers:
        if isinstance(layer.mlp, Experts):
            prefix = f"model.layers.{layer.index}.mlp."
            own = f"{prefix}experts.{layer.mlp.held[0]}."
            parts = [name.removeprefix(own) for name in _experts(layer.mlp, model, prefix) if name.startswith(own)]
            others = set(range(layer.mlp.spec.num_experts)) - set(layer.mlp.held)
            names |= {f"{prefix}experts.{expert}.{part}" for expert in others for part in parts}
            if layer.mlp.spec.biases and layer.mlp.weights.down_bias is None:  # the first rank adds it
                names.add(f"{prefix}experts.down_proj_bias")
    return names


def alternatives(name: str) -> list[str]:
    """Other names under which checkpoints carry the tensor ``name``."""
    if ".mlp.experts." in name or ".mlp.gate." in name:
        mixtral = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            mixtral = mixtral.replace(ours, theirs)
        return [mixtral, name.replace(".mlp.gate.", ".mlp.router.")]
    return []


def ignored(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor that a checkpoint has and the model does not need is harmless."""
    # Scales of a quantised KV cache, which ours does without.
    unused = name.endswith((".rotary_emb.inv_freq", ".k_scale", ".v_scale"))
    # Layers beyond the model's predict further tokens.
    layer = name.removeprefix("model.layers.").partition(".")[0]
    unused = unused or (spec.latent is not None and layer.isdecimal() and int(layer) >= spec.num_layers)
    return unused or (spec.tied_embeddings and name == "lm_head.weight")


def _whole(tensor: Tensor) -> Destination:
    return Destination(tensor, tuple(tensor.shape))


def _rows(tensor: Tensor, whole: int, start: int) -> Destination:
    return Destination(tensor, (whole, *tensor.shape[1:]), 0, start)


def _layer(layer: Layer, model: Decoder, prefix: str) -> dict[str, Destination]:
    spec, local, group = model.spec, model.local, model.group
    names = {
        prefix + "input_layernorm.weight": _whole(layer.input_norm),
        prefix + "post_attention_layernorm.weight": _whole(layer.post_norm),
    }
    if layer.latent is not None:
        names |= _latent_attention(layer.latent, model, prefix + "self_attn.")
    else:
        names |= _attention(layer, model, prefix + "self_attn.")
    mlp, prefix = layer.mlp, prefix + "mlp."
    if isinstance(mlp, Experts):
        return names | _experts(mlp, model, prefix)
    names |= _gated(mlp.gate_up, mlp.down, spec.inner, model, prefix)
    if mlp.gate_up_bias is not None and mlp.down_bias is not None:
        names[prefix + "down_proj.bias"] = _whole(mlp.down_bias)
        for name, bias in zip(("gate", "up"), mlp.gate_up_bias.chunk(2), strict=True):
            names[f"{prefix}{name}_proj.bias"] = _rows(bias, spec.inner, group.rank * local.inner)
    return names


def _latent_attention(own: LatentAttention, model: Decoder, prefix: str) -> dict[str, Destination]:
    spec, group, latent = model.spec, model.group, own.latent
    heads = model.local.num_heads

    def of_heads(columns: int, dim: int) -> Cut:
        rows = heads * dim
        return Cut(spec.num_heads * dim, columns, group.rank * rows, rows, 0, columns)

    sizes = {"kv_a_proj_with_mqa": latent.row_dim}
    if latent.q_rank:
        sizes = {"q_a_proj": latent.q_rank} | sizes
    down = {prefix + name: Cut(rows, spec.hidden, 0, rows, 0, spec.hidden) for name, rows in sizes.items()}
    columns = heads * latent.value_dim
    kv = of_heads(latent.kv_rank, latent.nope_dim + latent.value_dim)
    o = Cut(spec.hidden, spec.num_heads * latent.value_dim, 0, spec.hidden, group.rank * columns, columns)
    q, wide = ("q_b_proj", latent.q_rank) if latent.q_rank else ("q_proj", spec.hidden)
    names = {
        prefix + "kv_a_layernorm.weight": _whole(own.kv_norm),
        **_matrices(own.down, down, model),
        **_matrices(own.q, {prefix + q: of_heads(wide, latent.query_dim)}, model),
        **_matrices(own.kv, {prefix + "kv_b_proj": kv}, model),
        **_matrices(own.o, {prefix + "o_proj": o}, model),
    }
    if own.q_norm is not None:
        names[prefix + "q_a_layernorm.weight"] = _whole(own.q_norm)
    if own.down_bias is not None:
        for name, bias in zip(sizes, own.down_bias.split(list(sizes.values())), strict=True):
            names[f"{prefix}{name}.bias"] = _whole(bias)
    if own.o_bias is not None:
        names[prefix + "o_proj.bias"] = _whole(own.o_bias)
    return names


def _attention(layer: Layer, model: Decoder, attention: str) -> dict[str, Destination]:
    spec, local, group = model.spec, model.local, model.group
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    first_query = group.rank * local.num_heads * spec.head_dim
    first_key = first_kv_head(spec, group.rank, group.size) * spec.head_dim
    starts = {"q": first_query, "k": first_key, "v": first_key}
    wholes = {"q": queries, "k": keys, "v": keys}
    sizes = [local.num_heads * spec.head_dim, *[local.num_kv_heads * spec.head_dim] * 2]
    cuts = {
        f"{attention}{part}_proj": Cut(wholes[part], spec.hidden, starts[part], size, 0, spec.hidden)
        for part, size in zip(starts, sizes, strict=True)
    }
    o = Cut(spec.hidden, queries, 0, spec.hidden, first_query, sizes[0])
    names = {**_matrices(layer.qkv, cuts, model), **_matrices(layer.o, {attention + "o_proj": o}, model)}
    if layer.qkv_bias is not None:
        for part, bias in zip(starts, layer.qkv_bias.split(sizes), strict=True):
            names[f"{attention}{part}_proj.bias"] = _rows(bias, wholes[part], starts[part])
    if layer.o_bias is not None:
        names[attention + "o_proj.bias"] = _whole(layer.o_bias)
    if layer.sinks is not None:
        names[attention + "sinks"] = _rows(layer.sinks, spec.num_heads, group.rank * local.num_heads)
    if layer.head_norm is not None:
        names[attention + "q_norm.weight"] = _whole(layer.head_norm.query)
        names[attention + "k_norm.weight"] = _whole(layer.head_norm.key)
    return names


def _experts(mlp: Experts, model: Decoder, prefix: str) -> dict[str, Destination]:
    names = {prefix + "gate.weight": _whole(mlp.router)}
    if mlp.router_bias is not None:
        names[prefix + "gate.bias"] = _whole(mlp.router_bias)
    if mlp.correction is not None:
        names[prefix + "gate.e_score_correction_bias"] = _whole(mlp.correction)
    if mlp.shared is not None:
        inner = mlp.spec.shared_inner * model.group.size
        names |= _gated(mlp.shared.gate_up, mlp.shared.down, inner, model, prefix + "shared_experts.")
    inner, quantization = mlp.spec.inner * (1 if mlp.whole else model.group.size), model.spec.quantization
    weights = mlp.weights
    packed = isinstance(weights.gate_up, Packed)
    if mlp.spec.stacked or (packed and quantization is not None and quantization.scheme.only_experts):
        return names | _stacked(mlp, model, prefix + "experts.")
    for slot, index in enumerate(mlp.held):
        expert = weights.expert(slot)
        own = f"{prefix}experts.{index}."
        names |= _gated(expert.gate_up, expert.down, inner, model, own, whole=mlp.whole)
    return names


def _stacked(mlp: Experts, model: Decoder, prefix: str) -> dict[str, Destination]:
    """Of experts that are published in one tensor each for gate and up, whose rows alternate, and for down."""
    weights, hidden, inner = mlp.weights, model.spec.hidden, mlp.spec.inner
    cuts = _gated_cuts(inner * (1 if mlp.whole else model.group.size), inner, 2, model)
    gate_up, down = f"{prefix}gate_up_proj", f"{prefix}down_proj"
    names: dict[str, Destination] = {}
    for name, weight, cut in zip((gate_up, down), (weights.gate_up, weights.down), cuts, strict=True):
        if isinstance(weight, Packed):
            names |= _packed(weight, 0, cut, model, name, "_")
    count, (rows, columns) = len(weights), cuts
    if isinstance(weights.gate_up, Tensor) and isinstance(weights.down, Tensor):
        # Published as x multiplies with them: [experts, inputs, outputs].
        names[gate_up] = Destination(
            weights.gate_up.view(count, 2, inner, hidden), (count, hidden, rows.rows), 2, rows.first_row, rows.num_rows,
            convert=lambda part: part.unflatten(2, (-1, 2)).permute(0, 3, 2, 1), dummy=small,
        )  # fmt: skip
        names[down] = Destination(
            weights.down, (count, columns.columns, hidden), 1, columns.first_column, columns.num_columns,
            convert=lambda part: part.transpose(1, 2), dummy=small,
        )  # fmt: skip
    if weights.gate_up_bias is not None:
        names[gate_up + "_bias"] = Destination(
            weights.gate_up_bias.view(count, 2, inner), (count, rows.rows), 1, rows.first_row, rows.num_rows,
            convert=lambda part: part.unflatten(1, (-1, 2)).transpose(1, 2), dummy=small,
        )  # fmt: skip
    if weights.down_bias is not None:
        names[down + "_bias"] = Destination(weights.down_bias, (count, hidden), 1, dummy=small)
    total = mlp.spec.num_experts
    held = None if mlp.held == list(range(total)) else tuple(mlp.held)
    return {name: place._replace(shape=(total, *place.shape[1:]), experts=held) for name, place in names.items()}


def _gated(
    gate_up: Weight, down: Weight, inner: int, model: Decoder, prefix: str, *, whole: bool = False
) -> dict[str, Destination]:
    """The three matrices of a gated unit whose whole inner size is ``inner``; ``whole``: of which a rank has all."""
    rows, columns = _gated_cuts(inner, inner if whole else inner // model.group.size, 1, model)
    return {
        **_matrices(gate_up, {prefix + "gate_proj": rows, prefix + "up_proj": rows}, model),
        **_matrices(down, {prefix + "down_proj": columns}, model),
    }


def _gated_cuts(inner: int, size: int, times: int, model: Decoder) -> tuple[Cut, Cut]:
    """What a rank has of a matrix with ``times`` rows for each inner column, and of that which follows it."""
    hidden, start = model.spec.hidden, 0 if size == inner else model.group.rank * size
    rows = Cut(times * inner, hidden, times * start, times * size, 0, hidden)
    return rows, Cut(hidden, inner, 0, hidden, start, size)


def _matrices(weight: Weight, cuts: dict[str, Cut], model: Decoder) -> dict[str, Destination]:
    """Of modules whose matrices lie one below the other in ``weight``."""
    names: dict[str, Destination] = {}
    row = 0
    for part, (module, cut) in enumerate(cuts.items()):
        if isinstance(weight, Packed):
            names |= _packed(weight, part, cut, model, module, ".")
            continue
        dim, start = (1, cut.first_column) if cut.along_columns else (0, cut.first_row)
        rows = weight[row : row + cut.num_rows]
        names[module + ".weight"] = Destination(rows, (cut.rows, cut.columns), dim, start)
        row += cut.num_rows
    return names


def _packed(weight: Weight, part: int, cut: Cut, model: Decoder, module: str, joint: str) -> dict[str, Destination]:
    quantization = model.spec.quantization
    assert quantization is not None
    assert isinstance(weight, Packed)
    try:
        found = quantization.scheme.destinations(weight, part, cut)
    except ValueError as error:
        raise cannot_divide(module, error, model.group.size) from None
    return {f"{module}{joint}{suffix}": destination for suffix, destination in found.items()}
