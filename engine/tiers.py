"""A worker's tiers, and its blocks as they see them: those of all ranks as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ..core.clock import Clock
from ..core.config import Config
from ..core.errors import ConfigError
from ..kv_transfer.layout import KVLayout
from ..kv_transfer.memory import DeviceBuffer
from ..kv_transfer.offload.base import BlockMemory, HostBlocks, Notify
from ..kv_transfer.offload.build import Place, open_stack
from ..kv_transfer.offload.device import DeviceBlocks, RankMemory
from ..kv_transfer.offload.split import RankBlocks, SplitBlocks
from ..kv_transfer.offload.stack import OffloadStack
from .engine import Engine
from .models.shard import kv_heads_of


class Tiers(NamedTuple):
    """Where a worker's KV goes, and where it comes from."""

    stack: OffloadStack
    memory: BlockMemory | None
    """The worker's blocks; None where nothing is copied, as in a simulation."""


def whole_layout(engine: Engine) -> KVLayout:
    """The layout of blocks with the heads of all ranks: that of a worker of one rank."""
    return msgspec.structs.replace(engine.cache.layout, num_kv_heads=engine.model.spec.num_kv_heads)


def memory_of(engine: Engine, others: Sequence[np.ndarray | int] = (), programs: int = 16) -> BlockMemory:
    """A worker's blocks. On a GPU it compiles kernels, and blocks for some seconds the first time.

    Args:
        engine: of the first rank.
        others: of each other rank its blocks, see `Ranks.memory`.
        programs: of a GPU's copy, see `DeviceBlocks`.
    """
    blocks, size, spec = engine.cache.blocks, engine.model.group.size, engine.model.spec
    layout = whole_layout(engine)
    heads = [kv_heads_of(spec, rank, size) for rank in range(size)]
    if isinstance(blocks, DeviceBuffer):
        addresses = [blocks.address, *(other for other in others if isinstance(other, int))]
        memories = [RankMemory(*rank) for rank in zip(heads, addresses, strict=True)]
        return DeviceBlocks(layout, memories, blocks.device, programs)
    if size == 1:
        return HostBlocks(blocks.array, layout.block_bytes)
    arrays = [blocks.array, *(other for other in others if not isinstance(other, int))]
    return SplitBlocks(layout, [RankBlocks(*rank) for rank in zip(heads, arrays, strict=True)])


def open_tiers(
    config: Config,
    engine: Engine,
    place: Place,
    clock: Clock,
    notify: Notify,
    others: Sequence[np.ndarray | int] = (),
) -> Tiers | None:
    """A worker's tiers; None: none are configured. See `build.open_stack` and `memory_of`.

    Raises:
        ConfigError: a tier cannot be, or there is no prefix cache; names the key.
    """
    if not config.offload.tiers:
        return None
    if not config.kv.prefix_cache:
        raise ConfigError(
            "kv.prefix_cache: false, and offload.tiers bring blocks back to the prefix cache",
            fix="leave kv.prefix_cache at true, or offload.tiers empty",
        )
    memory = memory_of(engine, others, config.kv.copy_programs)
    pin = memory.pin if isinstance(memory, DeviceBlocks) else None
    stack = open_stack(config.offload, whole_layout(engine).block_bytes, place, clock, notify, pin)
    return None if stack is None else Tiers(stack, memory)
