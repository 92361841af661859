"""The process's environment: what is read from it, and what is put there for libraries and children. By nobody else."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil


def cache_folder() -> Path:
    """Where Tandem may keep logs and compiled kernels: $XDG_CACHE_HOME/tandem or ~/.cache/tandem."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tandem"


def ray_address() -> str | None:
    """The Ray cluster that the environment names (RAY_ADDRESS), or None."""
    return os.environ.get("RAY_ADDRESS") or None


def ray_authenticates() -> bool:
    """Whether the environment asks Ray for token authentication."""
    return os.environ.get("RAY_AUTH_MODE") == "token"


def ucx_environment() -> dict[str, str]:
    """What the environment tells UCX: its own variables, which it reads itself."""
    return {name: value for name, value in os.environ.items() if name.startswith("UCX_")}


def announce_local_ray(address: str) -> Path:
    """Leave a note for `join_local_ray`, readable by this user alone; returns its path."""
    path = cache_folder() / "local-ray.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"address": address, "token": os.environ["RAY_AUTH_TOKEN"]}, file)
    return path


def join_local_ray() -> str | None:
    """Where the Ray of this user's `tandem serve` is, or None; from then on the environment has its token.

    Ray must not have been imported yet.
    """
    try:
        note = json.loads((cache_folder() / "local-ray.json").read_text(encoding="utf-8"))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": str(note["token"])}
        return str(note["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def worker_environment() -> dict[str, str]:
    """Variables that every worker process starts with; what the user has set wins."""
    wanted = {
        # A thread that waits for its siblings spins for some microseconds, and then sleeps: others need the core.
        "GOMP_SPINCOUNT": "10000",
        # Freed memory is kept: a prefill step takes and frees megabytes many times over, and taking them anew costs a
        # page fault for every 4 KiB (measured: a prefill of 2,048 tokens in 55 ms instead of 80).
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def prepare_children() -> None:
    """Have the processes that this one starts from now on begin as workers do, see `worker_environment`."""
    os.environ |= worker_environment()


def leave_torch_out() -> None:
    """Have this process do without torch, as it computes nothing: transformers would import it for models' sake, which
    takes 1.8 s and 350 MiB (measured). Call before either is imported."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is missing is no news
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def show_gpus(ids: Sequence[str]) -> None:
    """Let this process see the GPUs that it was given, and no others, also where Ray was told to leave that to us
    (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES): call this before CUDA starts.

    Args:
        ids: as Ray names them; none: nothing changes.
    """
    if ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids)


def prepare_collectives(one_host: bool) -> None:
    """Set what NCCL and gloo read when they start: call this before.

    Args:
        one_host: all ranks are on this host, and need not be reached from outside.
    """
    # NVLink multicast belongs to the whole host: a process that dies while it uses it can leave every GPU out of
    # service, also those of other users.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if one_host and sys.platform == "linux":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def prepare_collectives_between_hosts(address: str) -> None:
    """Set where NCCL and gloo listen: call this before `prepare_collectives`. Left to themselves they take what the
    host's name stands for, which may be an address that nobody else reaches.

    Args:
        address: of this host, where others reach it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


UNDISTURBED = {"RAY_worker_niceness": "0"}
"""For `ray start`: else Ray's workers, and with them gateways and engines, give way to everything else on a host."""


def prepare_ray() -> None:
    """Set what Ray reads when it is imported: call this before. No telemetry, and no word of Ray's among what a command
    prints: deaths of processes and nodes are told by Tandem."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def prepare_local_ray() -> None:
    """`prepare_ray`, for a Ray of our own: with a token, as other users of the machine are strangers."""
    prepare_ray()
    os.environ |= UNDISTURBED | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.pop("RAY_ADDRESS", None)


def separate_ray() -> dict[str, str]:
    """The environment of processes that start, and speak to, a Ray of their own, with a token of its own."""
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    return here | own | UNDISTURBED | {"PYTHONUNBUFFERED": "1"}
