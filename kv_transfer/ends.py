"""A rank's side of the byte plane: what it holds, and the transports that move it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ..core.config import KVConfig
from ..core.errors import ConfigError
from ..core.log import logger
from ..core.wire import SecureContext
from .memory import Buffer, DeviceBuffer
from .rdma import rdma_devices, rule_out_tcp
from .transports import Region, Transport
from .transports.base import Notify
from .transports.faulty import FaultyTransport
from .transports.landing import Landing
from .transports.offer import offer

BLOCKS = "blocks"
GENERATIONS = "generations"


class End(NamedTuple):
    """One local rank's side of the byte plane."""

    heads: range
    """KV heads of the model whose KV this rank's cache holds."""
    transports: Mapping[str, Transport]
    """By name, those that work here; their regions are registered already."""
    memory: str = "host"
    """Kind of the region that holds the blocks: "host" or "cuda"."""
    blocks: np.ndarray | int | None = None
    """The cache's memory, where the first rank can sum it: [bytes] uint8, or the address where its GPU reads it."""
    missing: Mapping[str, str] = {}
    """By name, why other transports are not to be had here."""
    device: int = 0
    """Number of the GPU, in this process, that reads `blocks`."""


def first_end(
    heads: range,
    transports: Mapping[str, Transport],
    blocks: Buffer | DeviceBuffer,
    generations: Buffer | None,
    missing: Mapping[str, str] = {},
) -> End:
    """A rank whose cache is this process's: registers its regions with its transports.

    Args:
        heads: see `End`.
        transports: by name; those that only copy are made to convert, if the cache is the host's.
        blocks: the cache's memory.
        generations: [blocks] uint64, bumped before a block is written anew; of the first rank, else None.
        missing: see `End`.
    """
    able = converting(transports) if blocks.kind == "host" else dict(transports)
    for transport in able.values():
        transport.register(Region(BLOCKS, blocks))
        if generations is not None:
            transport.register(Region(GENERATIONS, generations))
    if isinstance(blocks, Buffer):
        return End(heads, able, blocks.kind, blocks.array, missing)
    return End(heads, able, blocks.kind, blocks.address, missing, blocks.device)


def open_transports(
    notify: Notify,
    context: SecureContext,
    address: str,
    blocks: Buffer | DeviceBuffer,
    kv: KVConfig,
    on_bad_frame: Callable[[], None],
) -> tuple[dict[str, Transport], dict[str, str]]:
    """The transports that work for a rank here, and why others do not, by name. Blocks while they start.

    They have no regions yet. In host memory all of them convert.

    Args:
        notify: each transport's.
        context: makes sockets.
        address: of this node, where peers reach it.
        blocks: the rank's cache.
        kv: which transports to use.
        on_bad_frame: called, from any thread, for each frame that is refused.

    Raises:
        ConfigError: the one that is wanted does not work here; says why.
    """
    device = blocks.device if isinstance(blocks, DeviceBuffer) else 0
    transports, missing = offer(
        notify, context, address, blocks.kind, kv.transport, on_bad_frame, device, kv.copy_programs
    )
    if kv.transport in missing:
        raise ConfigError(f"kv.transport: {kv.transport}: {missing[kv.transport]}")
    if kv.require_rdma:
        transports, missing = rule_out_tcp(transports, missing, rdma_devices())
    if kv.transport == "auto":
        for name, why in missing.items():
            logger.info("no KV by %s: %s", name, why)
    if blocks.kind == "host":
        transports = converting(transports)
    if kv.inject_faults is not None:
        logger.warning("kv.inject_faults: reads of KV go wrong on purpose: %s", kv.inject_faults)
        transports = {
            name: FaultyTransport(transport, kv.inject_faults, notify, GENERATIONS)
            for name, transport in transports.items()
        }
    return transports, missing


def converting(transports: Mapping[str, Transport]) -> dict[str, Transport]:
    """The same transports, of which those that only copy are made to convert; they have no regions yet."""
    return {name: transport if transport.converts else Landing(transport) for name, transport in transports.items()}
