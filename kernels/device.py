"""What a device is, as far as kernels care: described once, so that a choice for another machine can be told here."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace

import torch

from ..core.errors import ConfigError
from . import compiled, on_gpu


@dataclass(frozen=True)
class Device:
    """A processor or a GPU, and what is installed beside it.

    Attributes:
        type: "cpu" or "cuda".
        name: for people.
        capability: compute capability of a GPU; None for a CPU.
        num_processors: multiprocessors of a GPU; 1 for a CPU.
        triton: whether Triton is installed.
        numba: whether Numba is.
        flashinfer: whether FlashInfer is.
    """

    type: str
    name: str
    capability: tuple[int, int] | None = None
    num_processors: int = 1
    triton: bool = True
    numba: bool = True
    flashinfer: bool = False


PRESETS = {
    "h100": Device("cuda", "NVIDIA H100", (9, 0), 132),
    "h200": Device("cuda", "NVIDIA H200", (9, 0), 132),
    "a100": Device("cuda", "NVIDIA A100", (8, 0), 108),
    "cpu": Device("cpu", "a CPU"),
}
"""Machines that need not be here, with what `pip install tandem[gpu]` brings."""


@functools.cache
def describe(device: torch.device) -> Device:
    """A device of this machine.

    Raises:
        ConfigError: it is not here.
    """
    flashinfer = importlib.util.find_spec("flashinfer") is not None
    installed = Device("cpu", "this CPU", None, 1, on_gpu.AVAILABLE, compiled.AVAILABLE, flashinfer)
    if device.type == "cpu":
        return installed
    if not torch.cuda.is_available():
        raise ConfigError("a GPU is wanted, and no CUDA device is here", fix="gpus_per_replica: 0 computes on the CPU")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return replace(
        installed, type="cuda", name=name, capability=capability, num_processors=on_gpu.num_processors(device)
    )


def dtype_refused(dtype: torch.dtype, device: Device) -> str | None:
    """Why a device has no arithmetic of a type; None: it has."""
    least = {torch.bfloat16: (8, 0), torch.float8_e4m3fn: (8, 9), torch.float8_e5m2: (8, 9)}.get(dtype, (0, 0))
    if device.capability is None or device.capability >= least:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{name} needs compute capability {version(least)}, {device.name} has {version(device.capability)}"


def version(capability: tuple[int, int]) -> str:
    """A compute capability as people write it."""
    return ".".join(map(str, capability))
