"""Which transports work here, and why the others do not: for workers, for their ranks, and for `tandem doctor`."""

from __future__ import annotations

from collections.abc import Callable

from ...core.errors import ConfigError, TandemError
from ...core.wire import SecureContext
from ..rdma import rdma_devices
from . import PREFERENCE
from .base import Notify, Transport
from .cuda_ipc import CudaIpcTransport
from .nixl import NixlTransport
from .shm import ShmTransport
from .ucx import UcxTransport
from .zmq import ZmqTransport

_MEMORY = {
    kind.name: kind.memory for kind in (CudaIpcTransport, ShmTransport, NixlTransport, UcxTransport, ZmqTransport)
}
_NEEDS_RDMA = ("nixl",)
"""Without RDMA it uses TCP, which it does not encrypt: only who asks for it by name gets that."""


def offer(
    notify: Notify,
    context: SecureContext,
    address: str,
    memory_kind: str,
    choice: str,
    on_bad_frame: Callable[[], None] | None = None,
    device: int = 0,
    copy_programs: int = 16,
) -> tuple[dict[str, Transport], dict[str, str]]:
    """Make the transports that work here. Blocks while they start: half a second for NIXL.

    Args:
        notify: each transport's.
        context: makes sockets, and knows the cluster's key.
        address: of this node, where peers reach it.
        memory_kind: "host" or "cuda": where the KV blocks lie.
        choice: ``kv.transport``.
        on_bad_frame: called, from any thread, for each frame that is refused.
        device: number of the GPU whose memory it is.
        copy_programs: see ``kv.copy_programs``.

    Returns:
        transports by name in order of preference, and why each of the others is not there.
    """
    transports: dict[str, Transport] = {}
    missing: dict[str, str] = {}
    for name in PREFERENCE:
        if name == "inproc":
            continue
        if choice not in ("auto", name):
            missing[name] = f"kv.transport is {choice}"
        elif memory_kind not in _MEMORY.get(name, frozenset()):
            missing[name] = f"it does not move KV in {memory_kind} memory"
        elif choice == "auto" and name == "ucx":
            missing[name] = "only kv.transport: ucx takes it: UCX may crash a process whose peer dies"
        elif choice == "auto" and name in _NEEDS_RDMA and not any(port.active for port in rdma_devices()):
            missing[name] = f"no RDMA device here is up; kv.transport: {name} takes it over TCP, unencrypted"
        else:
            try:
                gpu = device if memory_kind == "cuda" else None
                transports[name] = _make(name, notify, context, address, on_bad_frame, gpu, copy_programs)
            except TandemError as error:
                missing[name] = str(error)
    return transports, missing


def _make(
    name: str,
    notify: Notify,
    context: SecureContext,
    address: str,
    on_bad_frame: Callable[[], None] | None,
    gpu: int | None,
    copy_programs: int,
) -> Transport:
    match name:
        case "cuda_ipc":
            assert gpu is not None, "it is for GPUs' memory"
            return CudaIpcTransport(notify, gpu, copy_programs)
        case "shm":
            return ShmTransport(notify)
        case "nixl":
            return NixlTransport(notify, gpu)
        case "ucx":
            return UcxTransport(notify, context, address, on_bad_frame)
        case "zmq":
            return ZmqTransport(notify, context, address, on_bad_frame)
    raise ConfigError(f"there is no transport {name}")
