"""A rank's side of the byte plane: what it holds, and the transports that move it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .memory import Buffer
from .transports import Region, Transport
from .transports.landing import Landing

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
    blocks: Buffer | None = None
    """The cache's memory, where it can be summed: on the host, in this process."""


def host_end(heads: range, transports: Mapping[str, Transport], blocks: Buffer, generations: Buffer | None) -> End:
    """A rank whose cache lies in this process's host memory: registers its regions with its transports.

    Args:
        heads: see `End`.
        transports: by name; those that only copy are made to convert.
        blocks: the cache's memory.
        generations: [blocks] uint64, bumped before a block is written anew; of the first rank, else None.
    """
    able: dict[str, Transport] = {}
    for name, transport in transports.items():
        able[name] = transport if transport.converts else Landing(transport)
        able[name].register(Region(BLOCKS, blocks))
        if generations is not None:
            able[name].register(Region(GENERATIONS, generations))
    return End(heads, able, "host", blocks)
