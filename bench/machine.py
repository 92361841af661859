"""What a figure was measured on."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from .. import __version__

_PACKAGES = (
    "torch", "triton", "cuda-bindings", "ray", "numba", "numpy", "transformers", "pyzmq", "msgspec", "uvicorn", "tbb",
    "nixl-cu13", "nixl-cu12", "ucxx-cu13", "libucx-cu13",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Processor, memory, versions, commit and time: enough to repeat a run, and to doubt it."""
    versions = {"python": platform.python_version(), "tandem": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
