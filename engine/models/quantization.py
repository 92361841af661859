"""What config.json's quantization_config says: which scheme, and which modules it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.schemes.awq import Awq
from ...kernels.schemes.fp8 import Activation, Fp8
from ...kernels.schemes.gptq import Gptq
from ...kernels.schemes.mxfp4 import Mxfp4
from ...kernels.schemes.packed import Scheme


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a checkpoint.

    Attributes:
        method: as config.json names it.
        scheme: of all weights that are quantised.
        ignored: modules that are not, or whose parts are not: their names, ends of their names, with * for any part of
            a name, or "re:" and a regular expression.
    """

    method: str
    scheme: Scheme
    ignored: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear module, by its name in the checkpoint; None: it is not quantised."""
        if self.scheme.only_experts and ".experts" not in module:
            return None
        return None if any(_matches(pattern, module) for pattern in self.ignored) else self.scheme


def parse_quantization(config: Mapping[str, Any], dtype: str) -> Quantization:
    """The typed form of a quantization_config.

    Args:
        config: as config.json has it.
        dtype: of the checkpoint's other tensors.

    Raises:
        ValueError: something in it is missing or unknown, or cannot be served; names the key.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"quantization_config: expected an object, found {type(config).__name__}")
    method = config.get("quant_method")
    if method not in _METHODS:
        raise ValueError(f"quantization_config.quant_method: expected one of {', '.join(_METHODS)}, found {method!r}")
    try:
        return _METHODS[method](config, dtype)
    except KeyError as error:
        raise ValueError(f"quantization_config, of {method}: the key {error} is missing") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"quantization_config, of {method}: {error}") from None


def _fp8(config: Mapping[str, Any], dtype: str) -> Quantization:
    _expect(config, "fmt", ("e4m3",), "e4m3")
    kind = _expect(config, "activation_scheme", ("dynamic", "static"))
    block = config.get("weight_block_size")
    if block is None:
        scheme = Fp8("tensor", activation="static" if kind == "static" else "token")
    else:
        if kind == "static":
            raise ValueError("quantization_config.activation_scheme: expected dynamic, with blocks; found static")
        scheme = Fp8("block", _block(block), "group", "weight_scale_inv")
    return Quantization("fp8", scheme, _ignored(config, "modules_to_not_convert", "ignored_layers"))


def _compressed_tensors(config: Mapping[str, Any], dtype: str) -> Quantization:
    _expect(config, "format", ("float-quantized", "naive-quantized"), "float-quantized")
    groups = config["config_groups"]
    if len(groups) != 1:
        raise ValueError(f"quantization_config.config_groups: expected one group, found {len(groups)}")
    [(name, group)] = groups.items()
    where = f"config_groups.{name}"
    if list(group.get("targets", ())) != ["Linear"]:
        raise ValueError(f"quantization_config.{where}.targets: expected ['Linear'], found {group.get('targets')!r}")
    weights = group["weights"]
    _expect(weights, "type", ("float",), where=f"{where}.weights.")
    _expect(weights, "num_bits", (8,), where=f"{where}.weights.")
    _expect(weights, "symmetric", (True,), True, where=f"{where}.weights.")
    granularity = _expect(weights, "strategy", ("tensor", "channel", "block"), where=f"{where}.weights.")
    block = _block(weights["block_structure"]) if granularity == "block" else (128, 128)
    activation = _activation(group.get("input_activations"), f"{where}.input_activations.")
    return Quantization("compressed-tensors", Fp8(granularity, block, activation), _ignored(config, "ignore"))


def _activation(config: Mapping[str, Any] | None, where: str) -> Activation:
    if config is None:
        return "none"
    _expect(config, "type", ("float",), where=where)
    _expect(config, "num_bits", (8,), where=where)
    strategy = _expect(config, "strategy", ("tensor", "token", "group"), "tensor", where=where)
    if not config.get("dynamic", False):
        if strategy != "tensor":
            raise ValueError(f"quantization_config.{where}strategy: expected tensor, if static; found {strategy}")
        return "static"
    # A scale for each token is at least as close as one for all.
    return "group" if strategy == "group" else "token"


def _gptq(config: Mapping[str, Any], dtype: str) -> Quantization:
    _expect(config, "bits", (4,))
    if config.get("lm_head"):
        raise ValueError("quantization_config.lm_head: expected false, found true")
    form = _expect(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    _refuse(config, "modules_in_block_to_quantize")
    dynamic = config.get("dynamic") or {}
    if any(not name.startswith("-:") for name in dynamic):
        raise ValueError("quantization_config.dynamic: expected modules to leave alone (-:…), found others")
    scheme = Gptq(
        _group_size(config), bool(config["sym"]), bool(config.get("desc_act", False)), int(form == "gptq"),
        _scale_dtype(dtype),
    )  # fmt: skip
    ignored = _ignored(config, "modules_to_not_convert")
    return Quantization("gptq", scheme, (*ignored, *(f"re:{name.removeprefix('-:')}" for name in dynamic)))


def _awq(config: Mapping[str, Any], dtype: str) -> Quantization:
    key = "bits" if "bits" in config else "w_bit"
    _expect(config, key, (4,))
    _expect(config, "version", ("gemm", "GEMM"), "gemm")
    _expect(config, "zero_point", (True,), True)
    scheme = Awq(_group_size(config, "group_size" if "group_size" in config else "q_group_size"), _scale_dtype(dtype))
    return Quantization("awq", scheme, _ignored(config, "modules_to_not_convert"))


def _mxfp4(config: Mapping[str, Any], dtype: str) -> Quantization:
    return Quantization("mxfp4", Mxfp4(), _ignored(config, "modules_to_not_convert"))


_METHODS: dict[str, Callable[[Mapping[str, Any], str], Quantization]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
"""Value of quant_method → how to read the rest."""


def _expect(config: Mapping[str, Any], key: str, known: tuple[Any, ...], default: Any = ..., where: str = "") -> Any:
    value = config[key] if default is ... else config.get(key, default)
    if value not in known:
        expected = " or ".join(map(str, known))
        raise ValueError(f"quantization_config.{where}{key}: expected {expected}, found {value!r}")
    return value


def _refuse(config: Mapping[str, Any], key: str) -> None:
    if config.get(key):
        raise ValueError(f"quantization_config.{key}: expected nothing, found {config[key]!r}")


def _block(value: Any) -> tuple[int, int]:
    sizes = value.split("x") if isinstance(value, str) else value
    height, width = (int(size) for size in sizes)
    if height < 1 or width < 1:
        raise ValueError(f"quantization_config: expected blocks of one row and column at least, found {value}")
    return height, width


def _group_size(config: Mapping[str, Any], key: str = "group_size") -> int:
    size = int(config[key])
    if size != -1 and size < 1:
        raise ValueError(f"quantization_config.{key}: expected -1 or a number of columns, found {size}")
    return size


def _scale_dtype(dtype: str) -> torch.dtype:
    """Scales of float16 stay so; others, which the file's own header alone tells of, fit into float32."""
    return torch.float16 if dtype == "float16" else torch.float32


def _ignored(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(name for key in keys for name in config.get(key) or ())


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    parts = re.escape(pattern).replace(r"\*", r"[^.]*")
    return re.search(rf"(^|\.){parts}($|\.)", module) is not None
