"""`tandem explain`: which kernels serve a model, and why not others."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...core.checkpoint import model_folder, model_name
from ...core.config import Config, load_config
from ...core.errors import ConfigError
from ...engine.build import plan_dtypes
from ...engine.kv_cache import TORCH_DTYPES
from ...engine.models.experts import experts_spec
from ...engine.models.spec import ModelSpec, read_spec
from ...kernels import exchange_oracle
from ...kernels.device import PRESETS, Device, describe
from ...kernels.moe_oracle import Choice
from ...kernels.moe_oracle import select as select_experts
from ...kernels.oracle import GROUPED, LATENT, Needs, choose

_MIN_TABLE_WIDTH = 120


def explain(file: Path | None, overrides: list[str], device_name: str, *, as_json: bool) -> None:
    """Print the choice of kernels.

    Raises:
        ConfigError: the configuration, or nothing serves it on such a device.
    """
    config = load_config(file, overrides)
    spec = read_spec(model_folder(config))
    device = _device(device_name)
    dtype, kv_dtype = plan_dtypes(config, spec, device.type)
    choices = choices_for(config, spec, device)
    if as_json:
        record = {
            "model": model_name(config),
            "dtype": dtype,
            "kv_dtype": kv_dtype,
            "device": dataclasses.asdict(device),
            "operations": [{"operation": op, **_record(choice)} for op, choice in choices.items()],
        }
        sys.stdout.write(json.dumps(record) + "\n")
        return
    table = Table(show_edge=False, pad_edge=False)
    for header in ("operation", "backend", "served by", "not by"):
        table.add_column(header)
    for op, choice in choices.items():
        refused = "\n".join(f"{backend}: {reason}" for backend, reason in choice.rejected)
        table.add_row(op, choice.backend, choice.serves, refused)
    console = Console(highlight=False)
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    console.print(f"{model_name(config)} in {dtype}, KV in {kv_dtype}, on {_told(device)}\n")
    console.print(table)


def choices_for(config: Config, spec: ModelSpec, device: Device) -> dict[str, Choice]:
    """Of the operations that the model has.

    Raises:
        ConfigError: as `kernels.oracle.choose`.
    """
    dtype, kv_dtype = (TORCH_DTYPES[name] for name in plan_dtypes(config, spec, device.type))
    sharing = max(
        config.expert_parallel(role) * (pool.tensor_parallel if config.expert_parallel(role) > 1 else 1)
        for role in ("prefill", "decode", "colocated")
        if (pool := getattr(config.pools, role)) is not None
    )
    experts = experts_spec(spec, dtype, 1, sharing)
    scheme = spec.quantization.scheme if spec.quantization else None
    choices = choose(Needs(dtype, kv_dtype, experts, scheme, spec.sinks), device, config.model.kernels)
    if experts is not None and sharing > 1:
        few = exchange_oracle.select(experts, device)
        choices["exchange"] = exchange_oracle.select(experts, device, few=False)
        if device.type == "cuda":
            choices["exchange, few tokens"] = few
            choices["moe, after all_gather"] = select_experts(experts._replace(format="batched"), device)
    absent = set(LATENT if spec.latent is None else GROUPED)
    if spec.moe is None:
        absent.add("moe")
    elif len(spec.moe_layers) == spec.num_layers and not spec.moe.shared_inner:
        absent |= {"gated_linear", "silu_mul"}
    if spec.quantization is None or spec.quantization.scheme.only_experts:
        absent.add("packed_linear")
    else:
        absent.add("gated_linear")
    return {op: choice for op, choice in choices.items() if op not in absent}


def _device(name: str) -> Device:
    if name == "here":
        return describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name not in PRESETS:
        raise ConfigError(f"--device {name}: not known", fix=f"give {', '.join(PRESETS)} or here")
    return PRESETS[name]


def _record(choice: Choice) -> dict[str, object]:
    rejected = [{"backend": backend, "reason": reason} for backend, reason in choice.rejected]
    return {"backend": choice.backend, "serves": choice.serves, "rejected": rejected}


def _told(device: Device) -> str:
    installed = {"Triton": device.triton, "Numba": device.numba, "FlashInfer": device.flashinfer}
    missing = [name for name, there in installed.items() if not there]
    has = f", with {', '.join(name for name, there in installed.items() if there)}" if any(installed.values()) else ""
    without = f", without {', '.join(missing)}" if missing else ""
    if device.capability is None:
        return f"{device.name}{has}{without}"
    version = ".".join(map(str, device.capability))
    return f"{device.name} (compute capability {version}, {device.num_processors} processors){has}{without}"
