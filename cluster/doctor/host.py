"""What a host lets a worker do: share memory, open files, hold KV."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil

from ...core.checkpoint import model_folder
from ...core.config import Config
from ...core.errors import ConfigError, TransferError
from ...core.units import format_bytes
from ...engine.models.spec import read_spec
from ...kv_transfer.memory import Buffer, map_shared
from ...kv_transfer.rdma import RdmaPort
from .finding import Finding, Notes

_MIN_FILES = 4096
_MIN_SHM_BYTES = 64 << 20
_CHILD_TIMEOUT_S = 10.0
_CGROUP = Path("/sys/fs/cgroup")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_CHILD = """
import os, sys
descriptor = os.memfd_create("tandem-doctor")
os.write(descriptor, b"seen")
print(os.getpid(), descriptor, flush=True)
sys.stdin.read()
"""


def look_at_host(where: str, config: Config, num_workers: int, ports: list[RdmaPort]) -> list[Finding]:
    """Memory, limits and files of this host.

    Args:
        where: this node.
        config: says what is needed.
        num_workers: that live here.
        ports: of this host's RDMA devices.
    """
    notes = Notes("host", where)
    _look_at_cores(notes)
    _look_at_shared_memory(notes)
    _look_at_foreign_descriptors(notes)
    _look_at_limits(notes, config, rdma=any(port.active for port in ports))
    if num_workers:
        _look_at_memory(notes, config, num_workers)
    return notes.findings


def available_bytes() -> int:
    """Memory that can still be had: of the host, or of the container if that has less."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available


def _look_at_cores(notes: Notes) -> None:
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    notes.judge(
        "cores", load <= cores, f"{cores}, load {load:.1f}", f"load ≤ {cores}",
        "the figures below are measured on a busy machine: look again when it is idle",
    )  # fmt: skip


def _look_at_shared_memory(notes: Notes) -> None:
    expected = "a memfd that can be mapped again"
    fix = "without it KV goes by TCP even on one host: Linux, and a container that may use memfd_create"
    try:
        buffer = Buffer(1 << 20)
        if buffer.shared is None:
            raise TransferError("this system has no memfd")
        buffer.array[-1] = 7
        seen = int(map_shared(buffer.shared)[-1]) == 7
        buffer.close()
    except (OSError, TransferError) as error:
        notes.warn("shared memory", str(error), expected, fix)
    else:
        notes.judge("shared memory", seen, "memfd works" if seen else "what is written is not seen", expected, fix)
    if Path("/dev/shm").is_dir():
        size = psutil.disk_usage("/dev/shm")
        notes.judge(
            "/dev/shm", size.total >= _MIN_SHM_BYTES, f"{format_bytes(size.free)} of {format_bytes(size.total)} free",
            "≥ 64 MiB, for Ray and NCCL", "start the container with a larger --shm-size",
        )  # fmt: skip
    with contextlib.suppress(OSError, IndexError):
        chosen = _HUGE_PAGES.read_text().split("[")[1].split("]")[0]
        notes.ok("huge pages", f"for shared memory: {chosen}", "optional")


def _look_at_foreign_descriptors(notes: Notes) -> None:
    """Whether a process may open another's memfd, as the shm transport does."""
    name, expected = "/proc/PID/fd", "open to processes of the same user"
    fix = "mount /proc without hidepid, and run workers of one host as one user in one PID namespace"
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            try:
                pid, descriptor = child.stdout.readline().split()
                seen = Path(f"/proc/{pid}/fd/{descriptor}").read_bytes()
            finally:
                child.communicate(timeout=_CHILD_TIMEOUT_S)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        notes.warn(name, str(error), expected, fix)
        return
    notes.judge(name, seen == b"seen", "another process's memory can be opened", expected, fix)


def _look_at_limits(notes: Notes, config: Config, *, rdma: bool) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    wanted = _MIN_FILES + config.gateway.max_queued
    notes.judge(
        "open files", files == resource.RLIM_INFINITY or files >= wanted, _limit(files, ""), f"≥ {wanted:,}",
        "ulimit -n 65536, in the shell that starts Ray",
    )  # fmt: skip
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    endless = locked == resource.RLIM_INFINITY
    if rdma:
        notes.judge(
            "locked memory", endless, _limit(locked, "B"), "unlimited, as RDMA locks all of the KV cache",
            "ulimit -l unlimited, in the shell that starts Ray",
        )  # fmt: skip
    else:
        notes.ok("locked memory", _limit(locked, "B"), "unlimited if there were RDMA")


def _look_at_memory(notes: Notes, config: Config, num_workers: int) -> None:
    try:
        folder = model_folder(config)
        spec = read_spec(folder)
    except ConfigError as error:
        notes.fail("model", error.message, "on every node with a worker", error.fix)
        return
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    notes.ok("model", f"{spec.architecture}, {format_bytes(weights)}")
    if any(
        pool is not None and pool.gpus_per_replica
        for pool in (config.pools.prefill, config.pools.decode, config.pools.colocated)
    ):
        return  # the GPU's memory is what counts
    available = available_bytes()
    roles = ("prefill", "decode", "colocated")
    capacities = [config.of_pool(role).kv.capacity for role in roles if getattr(config.pools, role) is not None]
    capacity = "auto" if "auto" in capacities else max(int(capacity) for capacity in capacities)
    wanted = num_workers * (weights + (0 if isinstance(capacity, str) else capacity))
    kv = "KV takes a quarter of what is free" if isinstance(capacity, str) else f"{format_bytes(capacity)} of KV"
    notes.judge(
        "free memory", available >= wanted, format_bytes(available),
        f"≥ {format_bytes(wanted)}: {num_workers} × ({format_bytes(weights)} of weights; {kv})",
        "lower kv.capacity or pools.*.replicas, or add nodes", fatal=True,
    )  # fmt: skip


def _limit(value: int, unit: str) -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return format_bytes(value) if unit == "B" else f"{value:,}"
