"""What a worker's experts need of the cluster before they can move: transports, keys, metrics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..core.checkpoint import model_name
from ..core.clock import Clock
from ..core.config import Config
from ..core.errors import ConfigError
from ..core.log import logger
from ..core.metrics import ExpertMetrics, WorkerMetrics
from ..core.wire import SecureContext
from ..engine.expert_balancer import Balancer
from ..engine.expert_parallel import ExpertGroup
from ..eplb.placement import plan
from ..kv_transfer.memory import DeviceBuffer
from ..kv_transfer.transports import Transport
from ..kv_transfer.transports.base import Notify
from ..kv_transfer.transports.offer import offer


def prepare(group: ExpertGroup, config: Config) -> None:
    """Compile what plans placements, on the rank that will. Blocks for some seconds, if it was never done here."""
    if group.movable and group.rank == 0:
        placement = group.maps.placement
        load = np.random.default_rng(0).random((placement.num_layers, placement.num_logical))
        plan(load, group.topology, placement, config.experts.balance.policy)


def open_balancer(
    group: ExpertGroup,
    config: Config,
    context: SecureContext,
    address: str,
    metrics: WorkerMetrics,
    clock: Clock,
    note: Callable[[str], object],
) -> Balancer | None:
    """A rank's balancer, which from now on is called between its steps; None where experts stay where they are.

    All ranks call this together, once they serve; blocks until all have.

    Args:
        group: has met the others, and has its experts.
        config: the cluster's.
        context: makes sockets.
        address: of this node, where peers reach it.
        metrics: where its own are listed.
        clock: for time-outs.
        note: told, on any thread, what operators want to know.

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
        bad_frame = metrics.bad_frames.labels("experts").inc
        found, _ = offer(notify, context, address, memory.kind, kv.transport, bad_frame, device, kv.copy_programs)
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
            ExpertMetrics(metrics.registry),
            clock,
            note,
        )
    except ConfigError as error:
        if config.experts.balance.enabled is not None:
            raise
        logger.warning("experts stay where they are: %s", error)
        return None
    group.boundary = balancer.boundary
    return balancer
