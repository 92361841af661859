"""Whether this host can move KV by RDMA, and what is ruled out where `kv.require_rdma` demands it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .transports import Transport

INFINIBAND = Path("/sys/class/infiniband")
"""Where Linux lists RDMA devices, those of Ethernet (RoCE) too."""

_IN_HOST = frozenset({"inproc", "shm", "cuda_ipc"})
_BY_RDMA = frozenset({"nixl", "ucx"})
_MAX_NAMED = 8


class RdmaPort(NamedTuple):
    """One port of one device. ``state`` and ``link_layer`` as the kernel words them: "ACTIVE", "InfiniBand"."""

    device: str
    port: str
    state: str
    link_layer: str
    rate_gbit_s: float

    @property
    def active(self) -> bool:
        """Whether it carries data."""
        return self.state == "ACTIVE"


def rdma_devices(root: Path = INFINIBAND) -> list[RdmaPort]:
    """All ports of this host's RDMA devices; none where the kernel has no such devices. Reads a few small files.

    Args:
        root: the folder that lists the devices.
    """
    return [
        RdmaPort(
            path.parent.parent.name,
            path.name,
            _read(path / "state").rpartition(": ")[2],
            _read(path / "link_layer"),
            _number(_read(path / "rate")),
        )
        for path in sorted(root.glob("*/ports/*"))
    ]


def rule_out_tcp(
    transports: Mapping[str, Transport], reasons: Mapping[str, str], ports: list[RdmaPort]
) -> tuple[dict[str, Transport], dict[str, str]]:
    """What is left of a worker's transports under `kv.require_rdma`: those within a host, and those over RDMA ports.

    What is ruled out is closed.

    Args:
        transports: by name, those that work here.
        reasons: by name, why others do not.
        ports: of this host, as `rdma_devices` finds them.
    """
    kept, refused = dict(transports), dict(reasons)
    for name in transports:
        why = plain_tcp(name, ports)
        if why:
            kept.pop(name).close()
            refused[name] = why
    return kept, refused


def plain_tcp(name: str, ports: list[RdmaPort]) -> str:
    """Why `kv.require_rdma` rules a transport out on a host with these RDMA ports, or ""."""
    if name in _IN_HOST or (name in _BY_RDMA and any(port.active for port in ports)):
        return ""
    over = f"no active RDMA port here ({_found(ports)}), so it" if name in _BY_RDMA else "it"
    return f"{over} would move KV by plain TCP, which kv.require_rdma rules out"


def _found(ports: list[RdmaPort]) -> str:
    named = [f"{port.device}/{port.port} is {port.state}" for port in ports[:_MAX_NAMED]]
    return ", ".join(named) or f"{INFINIBAND} has none"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> float:
    found = re.match(r"\d+(\.\d+)?", text)
    return float(found[0]) if found else 0.0
