"""A host's RDMA devices, its network interfaces, and what UCX makes of them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess

import psutil

from ...core.config import Config
from ...core.environment import ucx_environment
from ...kv_transfer.rdma import INFINIBAND, RdmaPort
from .finding import Finding, Notes

_TIMEOUT_S = 20.0
_RDMA_TRANSPORTS = ("rc", "ud", "dc")
_MIN_PORTS = 1024


def look_at_network(where: str, address: str, config: Config, ports: list[RdmaPort]) -> list[Finding]:
    """RDMA ports, UCX's transports, the interface of this node's address, and the ports that workers listen on.

    Args:
        where: this node.
        address: where its workers listen.
        config: says what is needed.
        ports: of this host's RDMA devices.
    """
    notes = Notes("network", where)
    _look_at_interface(notes, address)
    if not ports:
        measured = f"no RDMA device ({INFINIBAND})"
        notes.ok(
            "RDMA", measured, "with kv.require_rdma, prefill and decode on one host" if config.kv.require_rdma else ""
        )
    for port in ports:
        measured = f"{port.state or 'state unknown'}, {port.link_layer}, {port.rate_gbit_s:g} Gbit/s"
        notes.judge(
            f"RDMA {port.device}/{port.port}", port.active, measured, "ACTIVE",
            "ibstat and the switch's port tell why; a port that nobody uses may stay down",
        )  # fmt: skip
    _look_at_ucx(notes, rdma=any(port.active for port in ports))
    return notes.findings


def interface_of(address: str) -> tuple[str, float]:
    """Name of the interface that has an address, and its speed in bit/s; "" and 0 where unknown."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            stats = psutil.net_if_stats().get(name)
            return name, stats.speed * 1e6 if stats is not None and 0 < stats.speed < 65535 * 100 else 0.0
    return "", 0.0


def ucx_transports(text: str) -> list[str]:
    """Of ``ucx_info -d``: the transports that UCX can use here, each once. Pure."""
    return list(dict.fromkeys(re.findall(r"Transport:\s*(\S+)", text)))


def _look_at_interface(notes: Notes, address: str) -> None:
    name, bits_per_s = interface_of(address)
    speed = f"{bits_per_s / 1e9:g} Gbit/s" if bits_per_s else "speed not told"
    measured = f"{address} on {name or 'no interface of this host'}, {speed}"
    try:
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
            pass
    except OSError as error:
        notes.fail(
            "address", f"{measured}: {error.strerror}", "workers can listen there",
            "start Ray with --node-ip-address set to an address of this host",
        )  # fmt: skip
    else:
        notes.ok("address", measured, "workers can listen there")
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            low, high = map(int, file.read().split())
    except (OSError, ValueError):
        return
    notes.judge(
        "ports", high - low >= _MIN_PORTS, f"{low} to {high}", "open between the nodes: workers listen on any of them",
        "sysctl net.ipv4.ip_local_port_range",
    )  # fmt: skip


def _look_at_ucx(notes: Notes, *, rdma: bool) -> None:
    settings = " ".join(f"{name}={value}" for name, value in sorted(ucx_environment().items()))
    found = ucx_transports(_ucx_info())
    if found:
        usable = not rdma or any(name.startswith(_RDMA_TRANSPORTS) for name in found)
        expected = "rc, ud or dc: there is an RDMA port" if rdma else ""
        notes.judge(
            "UCX", usable, f"{', '.join(found)} {settings}".strip(), expected,
            "UCX_LOG_LEVEL=info ucx_info -d tells why it leaves the device out",
        )  # fmt: skip
    elif settings:
        notes.ok("UCX", f"no ucx_info to ask; {settings}")
    else:
        notes.ok("UCX", "no ucx_info to ask")


def _ucx_info() -> str:
    """What the program says that comes with UCX or with its wheel; "" where it is not, or cannot run."""
    wheel = importlib.util.find_spec("libucx")
    folders = list(wheel.submodule_search_locations or ()) if wheel is not None else []
    installed = shutil.which("ucx_info")
    programs: list[tuple[str, dict[str, str] | None]] = [(installed, None)] if installed else []
    for folder in folders:
        programs.append((f"{folder}/bin/ucx_info", {**ucx_environment(), "LD_LIBRARY_PATH": f"{folder}/lib"}))
    for program, environment in programs:
        try:
            done = subprocess.run(
                [program, "-d"], capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return done.stdout
    return ""
