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
from ..kv_transfer.memory import Buffer
from ..kv_transfer.offload.base import BlockMemory, HostBlocks, Notify
from ..kv_transfer.offload.build import Place, open_stack
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


def memory_of(engine: Engine, others: Sequence[np.ndarray] = ()) -> BlockMemory:
    """A worker's blocks.

    Args:
        engine: of the first rank.
        others: of each other rank its blocks, [bytes] uint8, in the host's memory.
    """
    blocks, size, spec = engine.cache.blocks, engine.model.group.size, engine.model.spec
    assert isinstance(blocks, Buffer)
    layout = whole_layout(engine)
    if size == 1:
        return HostBlocks(blocks.array, layout.block_bytes)
    arrays = [blocks.array, *others]
    ranks = [RankBlocks(kv_heads_of(spec, rank, size), array) for rank, array in enumerate(arrays)]
    return SplitBlocks(layout, ranks)


def open_tiers(
    config: Config,
    role: str,
    engine: Engine,
    place: Place,
    clock: Clock,
    notify: Notify,
    others: Sequence[np.ndarray] = (),
) -> Tiers | None:
    """A worker's tiers; None: none are configured. See `build.open_stack` and `memory_of`.

    Raises:
        ConfigError: a tier cannot be, or this worker's KV cannot go to tiers; names the key.
    """
    if not config.offload.tiers:
        return None
    if not config.kv.prefix_cache:
        raise ConfigError(
            "kv.prefix_cache: false, and offload.tiers bring blocks back to the prefix cache",
            fix="leave kv.prefix_cache at true, or offload.tiers empty",
        )
    if not isinstance(engine.cache.blocks, Buffer):
        raise ConfigError(
            f"pools.{role}.gpus_per_replica: this worker's KV is in a GPU's memory, and offload.tiers take KV from the "
            "host's",
            fix="leave offload.tiers empty, or serve on CPUs",
        )
    stack = open_stack(config.offload, whole_layout(engine).block_bytes, place, clock, notify)
    return None if stack is None else Tiers(stack, memory_of(engine, others))
