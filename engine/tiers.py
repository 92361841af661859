"""Which workers' KV goes to tiers, and the tiers of one."""

from __future__ import annotations

from ..core.clock import Clock
from ..core.config import Config
from ..core.errors import ConfigError
from ..kv_transfer.memory import Buffer
from ..kv_transfer.offload.base import Notify
from ..kv_transfer.offload.build import Place, open_stack
from ..kv_transfer.offload.stack import OffloadStack
from .engine import Engine


def open_tiers(
    config: Config, role: str, engine: Engine, place: Place, clock: Clock, notify: Notify
) -> OffloadStack | None:
    """A worker's tiers; None: none are configured. See `build.open_stack`.

    Raises:
        ConfigError: a tier cannot be, or this worker's KV cannot go to tiers; names the key.
    """
    tiers = config.offload.tiers
    if not tiers:
        return None
    if tiers[0].write == "write_back":
        raise ConfigError(
            "offload.tiers.0.write: the first tier cannot be write_back: there is no tier above it",
            fix="make it write_through or second_use",
        )
    if not config.kv.prefix_cache:
        raise ConfigError(
            "kv.prefix_cache: false, and offload.tiers bring blocks back to the prefix cache",
            fix="leave kv.prefix_cache at true, or offload.tiers empty",
        )
    if engine.model.group.size > 1:
        raise ConfigError(
            f"pools.{role}.tensor_parallel: {engine.model.group.size}, and offload.tiers are for workers of one rank",
            fix="leave offload.tiers empty, or give each worker one rank",
        )
    if not isinstance(engine.cache.blocks, Buffer):
        raise ConfigError(
            f"pools.{role}.gpus_per_replica: this worker's KV is in a GPU's memory, and offload.tiers take KV from the "
            "host's",
            fix="leave offload.tiers empty, or serve on CPUs",
        )
    return open_stack(config.offload, engine.cache.layout.block_bytes, place, clock, notify)
