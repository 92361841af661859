"""How ranks that have different experts exchange tokens, and why not otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .device import Device, version
from .moe_oracle import Choice, ExpertsSpec

MAX_PEERS = 16
"""Ranks that write into each other's memory: those of one host."""


class Way(NamedTuple):
    """One way of exchanging tokens. `refuses` tells why it cannot; None: it can, unless the ranks find otherwise when
    they meet."""

    name: str
    serves: str
    refuses: Callable[[ExpertsSpec, Device, bool], str | None]


def _peer_memory(spec: ExpertsSpec, device: Device, few: bool) -> str | None:
    if device.type != "cuda":
        return "GPUs write into each other's memory; CPUs have gloo"
    if not device.triton:
        return "Triton is not installed"
    if device.capability is not None and device.capability < (8, 0):
        return f"Triton needs compute capability 8.0, {device.name} has {version(device.capability)}"
    if not few:
        return "its buffers hold a decode step's tokens"
    if spec.expert_parallel > MAX_PEERS:
        return f"{spec.expert_parallel} ranks are not of one host, which has at most {MAX_PEERS}"
    return None


def _all_gather(spec: ExpertsSpec, device: Device, few: bool) -> str | None:
    if device.type != "cuda":
        return "on CPUs bytes cost more than waiting for counts"
    return None if few else "everybody's tokens to everybody are too many bytes"


def _all_to_all(spec: ExpertsSpec, device: Device, few: bool) -> str | None:
    return None


WAYS = (
    Way("peer_memory", "one host: Triton, written where it is needed; else: all_gather", _peer_memory),
    Way("all_gather", "NCCL, every token to every rank", _all_gather),
    Way("all_to_all", "each token to the ranks that need it, after their number", _all_to_all),
)
"""The first that can serves."""


def select(spec: ExpertsSpec, device: Device, *, few: bool = True) -> Choice:
    """A way for a model's tokens; depends on nothing but the arguments.

    Args:
        spec: what the model asks of its experts' kernel.
        device: of every rank.
        few: for steps whose tokens fit into buffers of a fixed size.
    """
    rejected: list[tuple[str, str]] = []
    for way in WAYS:
        reason = way.refuses(spec, device, few)
        if reason is None:
            return Choice(way.name, way.serves, tuple(rejected))
        rejected.append((way.name, reason))
    raise AssertionError("all_to_all always can")
