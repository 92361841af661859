"""Which transports work on this machine, for memory of one kind, and why others do not."""

from __future__ import annotations

from collections.abc import Callable

from ...core.wire import SecureContext
from .base import Notify, Transport
from .shm import ShmTransport
from .zmq import ZmqTransport


def offer(
    notify: Notify,
    context: SecureContext,
    address: str,
    memory_kind: str,
    choice: str,
    on_bad_frame: Callable[[], None],
) -> tuple[dict[str, Transport], dict[str, str]]:
    """Open what works here.

    Args:
        notify: called when a transport's `poll` has news.
        context: makes ZMQ sockets.
        address: of this host, where peers reach it.
        memory_kind: of the regions that will be registered: "host" or "cuda".
        choice: "auto", or the one transport to open.
        on_bad_frame: called for each frame that is refused.

    Returns:
        transports by name, and by name why others are not there.
    """
    transports: dict[str, Transport] = {}
    reasons: dict[str, str] = {}
    makers: dict[str, Callable[[], Transport]] = {
        "shm": lambda: ShmTransport(notify),
        "zmq": lambda: ZmqTransport(notify, context, address, on_bad_frame),
    }
    for name, make in makers.items():
        if choice not in ("auto", name):
            reasons[name] = f"kv.transport is {choice}"
        elif memory_kind != "host":
            reasons[name] = f"it moves host memory, not {memory_kind}"
        else:
            transports[name] = make()
    return transports, reasons
