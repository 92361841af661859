"""One pull's bookkeeping: what is read, what is on its way, and what must be true of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.ids import PeerId
from ..core.messages import FailureReason, Table
from .layout import KVLayout
from .peers import Peer
from .plan import Side
from .transports import Transport


class Flying(NamedTuple):
    """A read on its way."""

    pull: Pull
    transport: Transport
    num_bytes: int
    """KV bytes; 0: it fetches generations."""
    num_runs: int
    start_s: float


class Pull:
    """Where a pull stands."""

    def __init__(self, number: int, name: PeerId, peer: Peer, tokens: range) -> None:
        self.number = number
        self.name = name
        self.peer = peer
        self.tokens = tokens
        self.blocks = np.empty((3, 0), np.int64)
        """The peer's blocks that were read: number, generation, first token."""
        self.verify: Sums | None = None
        self.reads: set[tuple[int, str, int]] = set()
        self.failure: FailureReason | None = None
        self.num_bytes = 0
        self.num_fenced = 0
        """Blocks whose generations were asked for."""
        self.slots = np.empty(0, np.int64)
        self.good_until = tokens.stop


class Sums(NamedTuple):
    """What a pull's checksums must be, and over what."""

    expected: np.ndarray
    layers: range
    tables: list[list[int]]
    first_tokens: list[int]


def side_of(layout: KVLayout, first_head: int, first_token: int, blocks: Sequence[int], tokens: range) -> Side:
    """The part of a table that some tokens lie in."""
    size = layout.block_tokens
    start = max(0, tokens.start - first_token) // size
    part = np.asarray(blocks[start : -(-tokens.stop // size) - first_token // size], np.int64)
    return Side(layout, first_head, first_token + start * size, part)


def blocks_of(block_tokens: int, wanted: Sequence[tuple[range, Table]]) -> np.ndarray:
    """The blocks that some tokens lie in, over KV groups: [3, blocks] int64: number, generation, first token."""
    columns = [np.empty((3, 0), np.int64)]
    for tokens, table in wanted:
        start, stop = tokens.start // block_tokens, -(-tokens.stop // block_tokens)
        part = slice(start - table.first_token // block_tokens, stop - table.first_token // block_tokens)
        first_tokens = np.arange(start, stop, dtype=np.int64) * block_tokens
        columns.append(np.array([table.blocks[part], table.generations[part], first_tokens], np.int64))
    return np.concatenate(columns, axis=1)
