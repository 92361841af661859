"""How a node's host tier is reached from other nodes: who serves one, and what moves its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ...core.config import KVConfig
from ...core.errors import ConfigError
from ...core.wire import SecureContext
from ...kernels import copy_runs
from ..rdma import rdma_devices, rule_out_tcp
from ..transports import Transport
from ..transports.base import Notify
from ..transports.offer import offer

_ACROSS = ("nixl", "ucx", "zmq")
"""Transports that leave a host."""


class Servers:
    """Where host tiers are served. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endpoints: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = []

    def follow(self, endpoints: Mapping[str, str]) -> None:
        """These are all, by name."""
        with self._lock:
            self._endpoints = dict(endpoints)
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this, on any thread, whenever they have changed."""
        with self._lock:
            self._listeners.append(listener)

    def others(self, own: str) -> dict[str, str]:
        """Endpoints by name, all but one's own."""
        with self._lock:
            return {name: endpoint for name, endpoint in self._endpoints.items() if name != own}


class Network(NamedTuple):
    """What a remote tier needs of its process."""

    context: SecureContext
    address: str
    """Of this node, where peers reach it."""
    kv: KVConfig
    """Which transports may be used."""
    servers: Servers
    own: str
    """The name of this node's own server."""


def open_transports(notify: Notify, context: SecureContext, address: str, kv: KVConfig) -> dict[str, Transport]:
    """The transports that work here and leave a host, in order of preference. Blocks while they start.

    Args:
        notify: each transport's.
        context: makes sockets.
        address: of this node.
        kv: ``transport`` counts if it names one that leaves a host, and ``require_rdma`` as for handoffs.

    Raises:
        ConfigError: there is none.
    """
    choice = kv.transport if kv.transport in _ACROSS else "auto"
    transports, missing = offer(notify, context, address, "host", choice)
    for name in [name for name in transports if name not in _ACROSS]:
        transports.pop(name).close()
    if kv.require_rdma:
        transports, missing = rule_out_tcp(transports, missing, rdma_devices())
    if not transports:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items() if name in _ACROSS)
        raise ConfigError(f"no transport reaches other nodes' host tiers: {reasons}")
    # What is compiled on its first call is compiled before somebody waits for it.
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    copy_runs.native(np.zeros(1, np.uint8), np.zeros(1, np.uint8), zero, zero, one)
    return transports
