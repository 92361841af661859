"""What the measurements between two places mean. Pure."""

from __future__ import annotations

from typing import NamedTuple

from ...core.config import KVConfig
from ...core.units import format_bytes
from .finding import Finding, Notes
from .probe import LinkReport, Measured


class _Line(NamedTuple):
    """What a transport is measured against."""

    bytes_per_s: float
    name: str
    between_gpus: bool = False


_SHARE = 0.5
"""Below this share of its line something is wrong with a transport."""

_ENCRYPTED_BYTES_PER_S = 0.5e9
"""ZMQ encrypts and authenticates every byte on one core: on a faster line, that is the limit."""


def judge_link(where: str, kv: KVConfig, report: LinkReport) -> list[Finding]:
    """Rows of one pair: each transport beside its line, and the one that workers would use.

    Args:
        where: "decode-0 ← prefill-0", and where they live.
        kv: what is asked for.
        report: what was measured.
    """
    notes = Notes("KV links", where)
    for measured in report.transports:
        _judge_transport(notes, kv, measured, _line(measured.transport, report))
    if report.tcp.error:
        notes.warn(
            "plain TCP", report.tcp.error, "nodes reach each other on any port", "open the firewall between them"
        )
    chosen, refusals = _choose(kv, report)
    told = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    if chosen:
        notes.ok("would be used", f"{chosen}{f' ({told})' if told else ''}", f"kv.transport {kv.transport}")
    else:
        notes.fail(
            "would be used", f"nothing works: {told}", f"kv.transport {kv.transport}", _fix(kv, report),
        )  # fmt: skip
    return notes.findings


def _judge_transport(notes: Notes, kv: KVConfig, measured: Measured, line: _Line) -> None:
    name, rate = measured.transport, measured.rate
    if measured.refused:
        notes.ok(name, f"not here: {measured.refused}")
        return
    if rate.error:
        notes.fail(name, rate.error, "all bytes, as they were", f"leave it out with kv.transport: {_other(kv, name)}")
        return
    least = _SHARE * (min(line.bytes_per_s, _ENCRYPTED_BYTES_PER_S) if name == "zmq" else line.bytes_per_s)
    share = f", over {line.name}" if line.name else ""
    if line.bytes_per_s:
        share = f", {rate.bytes_per_s / line.bytes_per_s:.0%} of {line.name} at {_gb(line.bytes_per_s)}"
    fix = "measure again on an idle machine; then look at the line"
    if line.between_gpus:
        fix = "nvidia-smi nvlink --status: are all links up? Measure again when nobody uses the GPUs"
    if line.between_gpus and name != "cuda_ipc":
        # Nobody who does not ask for it gets it: cuda_ipc comes first.
        least *= kv.transport == name
        fix = f"kv.transport: auto takes cuda_ipc; UCX_PROTO_INFO=y shows whether {name} goes through the host"
    notes.judge(
        name, rate.bytes_per_s >= least, f"{_gb(rate.bytes_per_s)}{share} ({format_bytes(rate.num_bytes)})",
        f"≥ {_gb(least)}" if least else "", fix,
    )  # fmt: skip


def _line(transport: str, report: LinkReport) -> _Line:
    if report.gpu_link is not None and transport in ("cuda_ipc", "nixl"):
        return _Line(report.gpu_link.bytes_per_s, report.gpu_link.name, between_gpus=True)
    one_host = any(m.transport == "shm" and not m.refused for m in report.transports)
    if transport == "shm" or (one_host and transport in ("nixl", "ucx")):
        return _Line(report.memory.bytes_per_s, "copying in memory")
    if transport in ("nixl", "ucx") and report.rdma_bits_per_s:
        return _Line(report.rdma_bits_per_s / 8, "the RDMA port")
    if transport == "cuda_ipc":
        return _Line(0.0, "")
    if report.interface_bits_per_s and report.interface_bits_per_s / 8 < report.tcp.bytes_per_s:
        return _Line(report.interface_bits_per_s / 8, "the interface")
    return _Line(report.tcp.bytes_per_s, "plain TCP")


def _choose(kv: KVConfig, report: LinkReport) -> tuple[str, dict[str, str]]:
    """The transport that a worker would take, and why not those before it."""
    refusals: dict[str, str] = {}
    for measured in report.transports:
        name = measured.transport
        if kv.transport not in ("auto", name):
            continue
        reason = measured.refused or (measured.ruled_out if kv.require_rdma else "") or measured.rate.error
        if not reason:
            return name, refusals
        refusals[name] = reason
    if kv.transport != "auto" and not refusals:
        refusals[kv.transport] = "neither end knows it"
    return "", refusals


def _fix(kv: KVConfig, report: LinkReport) -> str:
    if kv.require_rdma and any(not measured.refused and measured.ruled_out for measured in report.transports):
        return "give both hosts an active RDMA port and NIXL or UCX, put both on one host, or leave kv.require_rdma out"
    if kv.transport != "auto":
        return "kv.transport: auto takes what works"
    return "each row above tells what one transport lacks"


def _other(kv: KVConfig, name: str) -> str:
    return "zmq" if name != "zmq" else "shm"


def _gb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
