"""How a rank's experts come to move: transports to its peers, and a balancer between its steps."""

from __future__ import annotations

from collections.abc import Callable

from ..core.checkpoint import model_name
from ..core.clock import Clock
from ..core.config import Config
from ..core.errors import ConfigError
from ..core.log import logger
from ..core.metrics import ExpertMetrics
from ..core.wire import SecureContext
from ..kv_transfer.memory import DeviceBuffer
from ..kv_transfer.transports import Transport
from ..kv_transfer.transports.base import Notify
from ..kv_transfer.transports.offer import offer
from .expert_balancer import Balancer
from .expert_parallel import ExpertGroup


def open_balancer(
    group: ExpertGroup,
    config: Config,
    context: SecureContext,
    address: str,
    on_bad_frame: Callable[[], None],
    metrics: ExpertMetrics,
    clock: Clock,
    note: Callable[[str], object] = lambda text: None,
    keep: Callable[[bytes], object] = lambda learned: None,
) -> Balancer | None:
    """A rank's balancer, which from now on is called between its steps; None where experts stay where they are.

    All ranks call this together, once they serve; blocks until all have.

    Args:
        group: has met the others, and has its experts.
        config: the cluster's.
        context: makes sockets.
        address: of this node, where peers reach it.
        on_bad_frame: called, by threads, for each frame from the network that was refused.
        metrics: what to count.
        clock: for time-outs.
        note: told, on any thread, what operators want to know.
        keep: told, on any thread, what the group after this one needs.

    Raises:
        ConfigError: experts are to move, and ranks do not fit each other or cannot read from each other.
        WorkerError: a rank did not come.
    """
    store = group.store
    if store is None:
        return None
    memory, kv = store.memory, config.kv
    device = memory.device if isinstance(memory, DeviceBuffer) else 0

    def make(notify: Notify) -> dict[str, Transport]:
        found, _ = offer(notify, context, address, memory.kind, kv.transport, on_bad_frame, device, kv.copy_programs)
        return found

    exchanges = group.exchange(), group.exchange()
    try:
        balancer = Balancer(
            group.loads,
            store,
            group.maps,
            group.topology,
            exchanges,
            make,
            config.experts.balance,
            model_name(config),
            metrics,
            clock,
            note,
            keep,
        )
    except ConfigError as error:
        if config.experts.balance.enabled is not None:
            raise
        logger.warning("experts stay where they are: %s", error)
        return None
    group.boundary = balancer.boundary
    return balancer
