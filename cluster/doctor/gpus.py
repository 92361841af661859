"""The GPUs of a host, as its driver and torch see them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from typing import NamedTuple

import msgspec

from ...core.config import Config
from .finding import Finding, Notes

_TIMEOUT_S = 20.0
_QUERY = "index,name,driver_version,memory.total,memory.free,compute_cap"
_LOWEST_CAPABILITY = (8, 0)
_PCIE_GB_S_A_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""By generation, one way."""


class Gpu(NamedTuple):
    """Memory in MiB."""

    number: int
    name: str
    driver: str
    total_mib: float
    free_mib: float
    capability: tuple[int, int]


class GpuLink(msgspec.Struct, frozen=True):
    """What lies between two GPUs of a host."""

    name: str
    """For people: "18 NVLinks"."""
    bytes_per_s: float
    """One way; 0 where the driver does not tell."""


def look_at_gpus(where: str, config: Config) -> list[Finding]:
    """Model, driver, memory, and the links between pairs. Takes a second for each GPU at most.

    Args:
        where: this node.
        config: says whether GPUs are needed.
    """
    import torch

    notes = Notes("GPU", where)
    pools = (config.pools.prefill, config.pools.decode, config.pools.colocated)
    wanted = any(pool is not None and pool.gpus_per_replica for pool in pools)
    gpus = parse_gpus(_nvidia_smi(f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"))
    usable = torch.cuda.is_available()
    if not gpus and not usable:
        if wanted:
            notes.warn(
                "GPUs", "no GPU", "pools.*.gpus_per_replica asks for some", "nvidia-smi must list them on a node"
            )
        else:
            notes.ok("GPUs", "no GPU")
        return notes.findings
    notes.judge(
        "torch and CUDA", usable, f"torch sees {torch.cuda.device_count() if usable else 0} of {len(gpus)} GPUs",
        "a torch built for the driver's CUDA", "install a torch for CUDA, and a driver that is new enough for it",
        fatal=wanted,
    )  # fmt: skip
    if not gpus:
        gpus = [_ask_torch(index) for index in range(torch.cuda.device_count())]
    for gpu in gpus:
        busy = gpu.free_mib < 0.9 * gpu.total_mib
        told = f"{gpu.name}, {'.'.join(map(str, gpu.capability))}, driver {gpu.driver}"
        measured = f"{told}, {gpu.free_mib / 1024:.1f} of {gpu.total_mib / 1024:.1f} GiB free"
        if gpu.capability < _LOWEST_CAPABILITY:
            notes.warn(f"GPU {gpu.number}", measured, "compute capability ≥ 8.0", "use an Ampere GPU or a newer one")
        else:
            notes.judge(f"GPU {gpu.number}", not busy, measured, "≥ 90 % free", "nvidia-smi shows who uses it")
    if len(gpus) > 1:
        _look_at_links(notes, len(gpus), torch.cuda.device_count() if usable else 0)
    return notes.findings


def parse_gpus(text: str) -> list[Gpu]:
    """Of ``nvidia-smi --query-gpu`` as CSV; lines that say something else are left out. Pure."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            index, name, driver, total, free, capability = cells
            major, minor = capability.split(".")
            gpus.append(Gpu(int(index), name, driver, float(total), float(free), (int(major), int(minor))))
        except ValueError:
            continue
    return gpus


def nvlink_gb_s(text: str) -> dict[int, float]:
    """GPU → the sum of its links in GB/s one way, of ``nvidia-smi nvlink --status``. Pure."""
    rates: Counter[int] = Counter()
    gpu = -1
    for line in text.splitlines():
        if found := re.match(r"\s*GPU (\d+):", line):
            gpu = int(found[1])
        elif found := re.match(r"\s*Link \d+:\s*([\d.]+) GB/s", line):
            rates[gpu] += float(found[1])  # type: ignore[assignment]
    return dict(rates)


def link_between(one: str, other: str) -> GpuLink | None:
    """What lies between two GPUs, told by their UUIDs; None if they are not both on this host."""
    text = _nvidia_smi("--query-gpu=index,uuid,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader,nounits")
    return parse_link(one, other, text, _nvidia_smi("topo", "-m"), _nvidia_smi("nvlink", "--status"))


def parse_link(one: str, other: str, gpus: str, topology: str, nvlinks: str) -> GpuLink | None:
    """`link_between`, of what nvidia-smi says. Pure.

    Args:
        one: a UUID, as `other`, with or without "GPU-".
        other: likewise.
        gpus: index, UUID, generation and width of PCIe of each GPU, as CSV.
        topology: the matrix of ``nvidia-smi topo -m``.
        nvlinks: of ``nvidia-smi nvlink --status``.
    """
    known: dict[str, tuple[int, float]] = {}
    for line in gpus.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 4 or not cells[0].isdigit():
            continue
        generation, lanes = (int(cell) if cell.isdigit() else 0 for cell in cells[2:])
        known[cells[1].removeprefix("GPU-")] = int(cells[0]), _PCIE_GB_S_A_LANE.get(generation, 0.0) * lanes
    here, there = known.get(one.removeprefix("GPU-")), known.get(other.removeprefix("GPU-"))
    if here is None or there is None:
        return None
    if here == there:
        return GpuLink("the memory of one GPU", 0.0)
    way = topology_of(topology).get((here[0], there[0]), "")
    if way.startswith("NV") and way[2:].isdigit():
        rates = [float(rate) for rate in re.findall(r"Link \d+:\s*([\d.]+) GB/s", nvlinks)]
        return GpuLink(f"{way[2:]} NVLinks", int(way[2:]) * min(rates, default=0.0) * 1e9)
    return GpuLink(f"PCIe{f' ({way})' if way else ''}", min(here[1], there[1]) * 1e9)


def topology_of(text: str) -> dict[tuple[int, int], str]:
    """Pair of GPUs → how they are connected, "NV18" or "PHB", of ``nvidia-smi topo -m``. Pure."""
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    heads = next((row for row in rows if row[:2] == ["GPU0", "GPU1"] or row == ["GPU0"]), [])
    columns = [int(head[3:]) for head in heads if re.fullmatch(r"GPU\d+", head)]
    found: dict[tuple[int, int], str] = {}
    for row in rows:
        if row and row is not heads and re.fullmatch(r"GPU\d+", row[0]):
            found |= {(int(row[0][3:]), column): way for column, way in zip(columns, row[1:], strict=False)}
    return found


def _look_at_links(notes: Notes, num_gpus: int, num_visible: int) -> None:
    import torch

    pairs = [(a, b) for a in range(num_visible) for b in range(num_visible) if a != b]
    closed = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if pairs:
        measured = f"{len(pairs) - len(closed)} of {len(pairs)} pairs" + (f", not {closed[:8]}" if closed else "")
        notes.judge(
            "peer access", not closed, measured, "every pair",
            "KV of such pairs goes through host memory: look at nvidia-smi topo -m, IOMMU and ACS",
        )  # fmt: skip
    rates = nvlink_gb_s(_nvidia_smi("nvlink", "--status"))
    if rates:
        slow = [gpu for gpu, rate in rates.items() if rate < 0.9 * max(rates.values())]
        measured = f"{min(rates.values()):.0f} to {max(rates.values()):.0f} GB/s each way"
        notes.judge(
            "NVLink", not slow and len(rates) == num_gpus, f"{measured} on {len(rates)} GPUs", "the same on all",
            f"links of GPU {slow} are down: nvidia-smi nvlink --status",
        )  # fmt: skip
    else:
        notes.ok("NVLink", "none: GPUs reach each other over PCIe")


def _ask_torch(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = properties.major, properties.minor
    return Gpu(index, properties.name, "unknown", total / 2**20, free / 2**20, capability)


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
