"""What a checkpoint's config.json says, reduced to what the decoder needs to know."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigError

# Others are imported where they are needed: they bring torch, and gateways and commands read a spec without it.
if TYPE_CHECKING:
    from ...kernels.routing import Routing
    from .quantization import Quantization


@dataclass(frozen=True)
class MoeSpec:
    """The experts of a layer."""

    num_experts: int
    top_k: int
    inner: int
    renormalize: bool
    """Whether the weights of the chosen experts sum to one."""
    method: str = "softmax"
    """How tokens choose: a key of `kernels.routing.METHODS`."""
    num_groups: int = 1
    """Of experts, where a token chooses groups first."""
    top_groups: int = 1
    """How many of these it chooses."""
    scale: float = 1.0
    """Of the weights."""
    router_bias: bool = False
    """Whether the router adds a bias."""
    biases: bool = False
    """Whether the experts add biases."""
    activation: str = "silu"
    """The experts' gated unit: a key of `kernels.activation.GATED`."""
    shared_inner: int = 0
    """Inner size of the experts, taken together, that every token goes to."""
    stacked: bool = False
    """Whether a checkpoint has all experts of a layer in one tensor."""

    @property
    def routing(self) -> Routing:
        """As the kernels take it."""
        from ...kernels.routing import Routing

        return Routing(self.method, self.top_k, self.renormalize, self.num_groups, self.top_groups, self.scale)


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention: keys and values are made of a latent that all heads share."""

    q_rank: int
    """Of compressed queries; 0: they are not compressed."""
    kv_rank: int
    """Of the latent."""
    nope_dim: int
    """Of a head's queries and keys, the part that is not rotated."""
    rope_dim: int
    """And the part that is; of keys, the heads share it."""
    value_dim: int
    interleaved: bool
    """Whether numbers that are rotated together are neighbours, or half of ``rope_dim`` apart."""
    scale: float
    """Of the scores."""

    @property
    def query_dim(self) -> int:
        """Of a head's queries."""
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """What the cache has of a token in a layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer with grouped-query or latent attention, rotary positions, RMS norms and gated SiLU
    units."""

    architecture: str
    vocab_size: int
    hidden: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """1 with latent attention: what is cached serves all heads."""
    head_dim: int
    """Of what is cached: with latent attention, of its rows."""
    norm_eps: float
    rope: Mapping[str, Any]
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    """Tokens that each layer's attention sees; 0: all."""
    moe: MoeSpec | None
    moe_layers: frozenset[int]
    eos_ids: tuple[int, ...]
    dtype: str
    """Of the checkpoint: float32, bfloat16 or float16."""
    quantization: Quantization | None = None
    sinks: bool = False
    """Whether each head has a learned logit beside those of the tokens."""
    latent: LatentSpec | None = None
    """None: grouped-query attention."""

    @property
    def num_kv_parts(self) -> int:
        """What the cache has of a token, layer and head: a key and a value, or one row that serves as both."""
        return 1 if self.latent else 2

    @property
    def rope_dim(self) -> int:
        """Of a head, how much is rotated."""
        return self.latent.rope_dim if self.latent else self.head_dim


_Reader = Callable[[Mapping[str, Any]], dict[str, Any]]


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"windows": [config.get("sliding_window") or 0] * config["num_hidden_layers"]}


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": _qwen_windows(config)}


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    layers = config["num_hidden_layers"]
    window = (config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        "windows": [window] * layers,
        "moe": MoeSpec(
            num_experts=_first(config, "num_experts", "num_local_experts"),
            top_k=config["num_experts_per_tok"],
            inner=config["moe_intermediate_size"],
            renormalize=bool(config.get("norm_topk_prob", False)),
        ),
        "moe_layers": frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
    }


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_mistral(config),
        "moe": MoeSpec(
            num_experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            inner=config["intermediate_size"],
            renormalize=True,
        ),
        "moe_layers": frozenset(range(config["num_hidden_layers"])),
    }


def _gpt_oss(config: Mapping[str, Any]) -> dict[str, Any]:
    from ...kernels.activation import SWIGLU_LIMIT

    limit = config.get("swiglu_limit", SWIGLU_LIMIT)
    if limit != SWIGLU_LIMIT:
        raise ValueError(f"swiglu_limit {limit} is not supported, expected {SWIGLU_LIMIT}")
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    kinds = config.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries, expected num_hidden_layers, {layers}")
    bias = bool(config.get("attention_bias", True))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "sinks": True,
        "windows": [window if kind == "sliding_attention" else 0 for kind in kinds],
        "moe": MoeSpec(
            num_experts=_first(config, "num_local_experts", "num_experts"),
            top_k=_first(config, "num_experts_per_tok", "experts_per_token"),
            inner=config["intermediate_size"],
            renormalize=True,
            method="topk_softmax",
            router_bias=True,
            biases=True,
            activation="clamped_swiglu",
            stacked=True,
        ),
        "moe_layers": frozenset(range(layers)),
    }


def _deepseek_v2(config: Mapping[str, Any]) -> dict[str, Any]:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method: expected greedy or group_limited_greedy, found {method!r}")
    renormalize = bool(config.get("norm_topk_prob", False)) and config["num_experts_per_tok"] > 1
    return _deepseek(
        config,
        interleaved=True,
        method="softmax" if method == "greedy" else "softmax_grouped",
        scale=1.0 if renormalize else float(config.get("routed_scaling_factor", 1.0)),
        renormalize=renormalize,
    )


def _deepseek_v3(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, served in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if config.get(key, served) != served:
            raise ValueError(f"{key}: expected {served}, found {config[key]!r}")
    return _deepseek(
        config,
        interleaved=bool(config.get("rope_interleave", True)),
        method="sigmoid_grouped",
        scale=float(config.get("routed_scaling_factor", 1.0)),
        renormalize=bool(config.get("norm_topk_prob", True)),
    )


def _deepseek(
    config: Mapping[str, Any], *, interleaved: bool, method: str, scale: float, renormalize: bool
) -> dict[str, Any]:
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias: expected false, found true")
    layers, bias = config["num_hidden_layers"], bool(config.get("attention_bias", False))
    grouped = method != "softmax"
    moe = MoeSpec(
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        inner=config["moe_intermediate_size"],
        renormalize=renormalize,
        method=method,
        num_groups=(config.get("n_group") or 1) if grouped else 1,
        top_groups=(config.get("topk_group") or 1) if grouped else 1,
        scale=scale,
        shared_inner=(config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
    )
    if moe.num_experts % moe.num_groups or not 0 < moe.top_groups <= moe.num_groups:
        raise ValueError(
            f"n_group, topk_group: expected groups that divide {moe.num_experts} experts, and some of them, found "
            f"{moe.num_groups} and {moe.top_groups}"
        )
    latent = _latent(config, interleaved)
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "num_kv_heads": 1,
        "head_dim": latent.row_dim,
        "latent": latent,
        "moe": moe,
        "moe_layers": frozenset(i for i in range(layers) if i >= first and i % step == 0),
    }


def _latent(config: Mapping[str, Any], interleaved: bool) -> LatentSpec:
    nope, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    if turned % 2:
        raise ValueError(f"qk_rope_head_dim {turned} is odd; rotary positions need pairs")
    rope = _rope(config)
    # YaRN's sharpening (arXiv:2309.00071) is of all dimensions here, not of the rotated ones alone.
    sharper = 1.0
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        sharper = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return LatentSpec(
        q_rank=config.get("q_lora_rank") or 0,
        kv_rank=config["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=turned,
        value_dim=config["v_head_dim"],
        interleaved=interleaved,
        scale=(nope + turned) ** -0.5 * sharper**2,
    )


def _first(config: Mapping[str, Any], name: str, other: str) -> Any:
    """A key that writers of config.json spell in two ways."""
    return config[name] if name in config else config[other] if other in config else config[name]


def _qwen_windows(config: Mapping[str, Any]) -> list[int]:
    layers = config["num_hidden_layers"]
    window = (config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    kinds = config.get("layer_types")
    if kinds:
        return [window if kind == "sliding_attention" else 0 for kind in kinds]
    first = config.get("max_window_layers", layers)
    return [window if layer >= first else 0 for layer in range(layers)]


ARCHITECTURES: dict[str, _Reader] = {
    "GptOssForCausalLM": _gpt_oss,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
"""Architecture name → what is special about it. A new family of this kind is one entry here."""


def read_spec(folder: Path) -> ModelSpec:
    """Read a checkpoint folder's config.json (and generation_config.json, for the end-of-sequence tokens).

    Raises:
        ConfigError: not readable, an unsupported architecture, or a key that is missing or out of bounds.
    """
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_spec(config, _read_json(generation) if generation.is_file() else {}, str(folder / "config.json"))


def context_length(spec: ModelSpec, wanted: int | None) -> int:
    """The longest sequence to serve: ``wanted`` tokens, or what the model was made for.

    Raises:
        ConfigError: more than that.
    """
    if wanted is not None and wanted > spec.max_positions:
        raise ConfigError(
            f"model.max_model_len: {wanted} is more than the model's max_position_embeddings, {spec.max_positions}",
            fix=f"give at most {spec.max_positions}",
        )
    return wanted or spec.max_positions


def parse_spec(config: Mapping[str, Any], generation: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The spec of a parsed config.json; ``where`` names it in errors. Raises as `read_spec`."""
    names = config.get("architectures") or [f"model_type {config.get('model_type')}"]
    reader = ARCHITECTURES.get(names[0])
    if reader is None:
        raise ConfigError(
            f"{where}: architecture {names[0]} is not supported", fix=f"supported: {', '.join(ARCHITECTURES)}"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{where}: hidden_act {activation!r} is not supported", fix="supported: silu")
    try:
        return _build(config, generation, names[0], reader)
    except KeyError as error:
        raise ConfigError(f"{where}: {names[0]} needs the key {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _build(config: Mapping[str, Any], generation: Mapping[str, Any], name: str, reader: _Reader) -> ModelSpec:
    layers, heads, hidden = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary positions need pairs")
    own: dict[str, Any] = {
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "windows": [0] * layers,
        "moe": None,
        "moe_layers": frozenset(),
    } | reader(config)
    own["windows"] = tuple(own["windows"])
    moe = own["moe"]
    if moe is not None and not 0 < moe.top_k <= moe.num_experts:
        raise ValueError(f"num_experts_per_tok {moe.top_k} is not within 1 … {moe.num_experts} experts")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    quantization = config.get("quantization_config")
    return ModelSpec(
        architecture=name,
        vocab_size=config["vocab_size"],
        hidden=hidden,
        inner=config["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(config),
        max_positions=config["max_position_embeddings"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=dtype,
        quantization=_read_quantization(quantization, dtype) if quantization else None,
        **own,
    )


def _read_quantization(config: Mapping[str, Any], dtype: str) -> Quantization:
    from .quantization import parse_quantization

    return parse_quantization(config, dtype)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix="a checkpoint folder in Hugging Face format has one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, found {type(value).__name__}")
    return value
