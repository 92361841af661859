"""Versions, and whether what is installed can be used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys

import zmq

from ...core.config import Config
from ...kv_transfer.rdma import RdmaPort
from .finding import Finding, Notes

_PYTHON = (3, 11)
_TORCH = ((2, 11), (2, 13))
_IMPORT_TIMEOUT_S = 30.0
# Each by the names of its wheels, and the module that must be importable.
_RDMA_LIBRARIES = {
    "nixl": {"nixl-cu13": "nixl_cu13._api", "nixl-cu12": "nixl_cu12._api"},
    "ucx": {"ucxx-cu13": "ucxx", "ucxx-cu12": "ucxx"},
}


def look_at_software(where: str, config: Config, ports: list[RdmaPort]) -> list[Finding]:
    """Versions of what Tandem stands on. Imports torch; takes seconds.

    Args:
        where: this node.
        config: says what is needed.
        ports: of this host's RDMA devices.
    """
    notes = Notes("software", where)
    notes.judge(
        "python", sys.version_info[:2] >= _PYTHON, platform.python_version(), "≥ 3.11",
        "install Python 3.11 or newer, and Tandem into it", fatal=True,
    )  # fmt: skip
    _look_at_torch(notes)
    _look_at_triton(notes, needed=_wants_gpu(config))
    notes.ok("ray", importlib.metadata.version("ray"))
    notes.judge(
        "pyzmq", zmq.has("curve"), f"{zmq.__version__}, libzmq {zmq.zmq_version()}", "with CURVE",
        "install pyzmq from a wheel: its libzmq has CURVE", fatal=True,
    )  # fmt: skip
    notes.judge(
        "numba", importlib.util.find_spec("numba") is not None, _version("numba") or "not installed",
        "for compiled CPU kernels", "pip install numba",
    )  # fmt: skip
    for name, wheels in _RDMA_LIBRARIES.items():
        needed = config.kv.transport == name
        _look_at_rdma_library(notes, name, wheels, needed, useful=any(port.active for port in ports))
    return notes.findings


def _look_at_torch(notes: Notes) -> None:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    notes.judge(
        "torch", _TORCH[0] <= version <= _TORCH[1], f"{torch.__version__}, {built}", "2.11 to 2.13",
        "install a torch that Tandem is tested with",
    )  # fmt: skip


def _look_at_triton(notes: Notes, *, needed: bool) -> None:
    version = _version("triton")
    if version:
        notes.ok("triton", version)
    elif needed:
        notes.warn("triton", "not installed", "for the GPU's kernels", "pip install 'tandem[gpu]'")
    else:
        notes.ok("triton", "not installed; only GPUs need it")


def _look_at_rdma_library(notes: Notes, name: str, wheels: dict[str, str], needed: bool, *, useful: bool) -> None:
    expected = f"as kv.transport is {name}" if needed else "for RDMA" if useful else ""
    fix = f"pip install 'tandem[{name}]'"
    installed = [(wheel, module) for wheel, module in wheels.items() if _version(wheel)]
    if not installed:
        if needed or useful:
            notes.judge(name, False, "not installed", expected, fix, fatal=needed)
        else:
            notes.ok(name, "not installed; only RDMA needs it")
        return
    for wheel, module in installed:
        error = _import_error(module)
        measured = f"{wheel} {_version(wheel)}{f': {error}' if error else ''}"
        fix = f"python -c 'import {module}' shows why it cannot be imported"
        notes.judge(name, not error, measured, expected, fix, fatal=needed)


def _import_error(module: str) -> str:
    """Why a module cannot be imported, found out in another process: a library that crashes takes only that along."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"importing takes more than {_IMPORT_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"importing ended with status {done.returncode}"])[-1][:200]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _wants_gpu(config: Config) -> bool:
    pools = (config.pools.prefill, config.pools.decode, config.pools.colocated)
    return any(pool is not None and pool.gpus_per_replica for pool in pools)
