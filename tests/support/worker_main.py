"""One worker or gateway in a process of its own, as its actor runs it, without Ray.

Started by a fork server, so that a process begins with everything imported.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tandem.cluster.gateway.runtime import GatewayRuntime
from tandem.cluster.worker_runtime import WorkerRuntime
from tandem.core.config import Config
from tandem.core.log import configure_logging
from tandem.core.messages import Membership
from tandem.core.wire import ClusterKeys

_CLONE_NEWNET = 0x40000000


class Who(NamedTuple):
    """What a process is to be."""

    peer: str
    role: str
    config: dict[str, Any]
    keys: ClusterKeys
    address: str
    log: Path
    network: str
    """Path of a network namespace to live in; "" for this one."""
    host_tier: Path
    """Folder of the node's host tier, where one is configured."""
    environment: dict[str, str]
    """Variables beside those that the fork server has."""


def main(who: Who, controller: Connection) -> None:
    """Send an encoded `Member` once requests can be served; then take encoded memberships, until the number of seconds
    that are left for what is under way."""
    os.environ.update(who.environment)
    if who.network:
        descriptor = os.open(who.network, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {who.network}")
        os.close(descriptor)
    # As in a process that no fork server made: locks that numba makes leave nothing behind when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    config = Config.model_validate(who.config)
    configure_logging(who.peer, "DEBUG", "text", who.log)
    runtime: WorkerRuntime | GatewayRuntime
    if who.role == "gateway":
        runtime = GatewayRuntime(who.peer, config, who.keys, who.address, lambda phase: None)
    else:
        runtime = WorkerRuntime(
            who.peer, who.role, config, who.keys, who.address, "node", lambda phase: None, lambda _: who.host_tier
        )
    controller.send(msgspec.msgpack.encode(runtime.start()))
    grace_s = 0.0
    try:
        while isinstance(told := controller.recv(), bytes):
            runtime.follow(msgspec.msgpack.decode(told, type=Membership))
        grace_s = told
    except EOFError:  # the test is over
        pass
    runtime.stop(grace_s)
