"""What the prefix cache gives up goes to a first tier that takes such blocks.

A block is reused at once, so that it is copied first, into a bounded place, and stored from there. When there is no
place left it is lost: whoever needs its room does not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..core.hashing import BlockHash
from ..kv_transfer.offload.base import Lookup
from ..kv_transfer.offload.keys import TierKey
from .block_pool import BlockPool
from .tiers import Tiers


class _Name(NamedTuple):
    of_pool: BlockHash
    of_tiers: TierKey


class WriteBack:
    """See the module. Owned by the engine thread.

    Args:
        pool: whose blocks are stored when it gives their content up.
        tiers: the first takes what is given up.
    """

    def __init__(self, pool: BlockPool, tiers: Tiers) -> None:
        self._stack = tiers.stack
        self._spill = tiers.stack.spill
        self._memory = tiers.memory
        self._names: list[_Name | None] = [None] * pool.num_blocks
        self._stores: dict[int, list[int]] = {}
        pool.on_evict = self._save

    @property
    def num_open(self) -> int:
        """Stores under way."""
        return len(self._stores)

    def name(self, blocks: Sequence[int], keys: Sequence[BlockHash], tier_keys: Sequence[TierKey]) -> None:
        """What full blocks are called: the pool knows no tenants.

        Args:
            blocks: of a sequence.
            keys: under which the prefix cache knows them, if it does.
            tier_keys: under which tiers do.
        """
        for block, *names in zip(blocks, keys, tier_keys, strict=True):
            self._names[block] = _Name(*names)

    def ended(self, number: int) -> bool:
        """A store has ended; whether it is one of these."""
        places = self._stores.pop(number, None)
        for place in places or ():
            self._spill.give(place)
        return places is not None

    def _save(self, evicted: Sequence[tuple[int, BlockHash]]) -> None:
        blocks, keys = [], []
        # The end of a prefix was evicted first.
        for block, key in reversed(evicted):
            name, self._names[block] = self._names[block], None
            if name is not None and name.of_pool == key:
                blocks.append(block)
                keys.append(name.of_tiers)
        missing = [state is Lookup.MISS for state in self._stack.levels[0].tier.lookup(keys)]
        chosen, places = [], []
        for number, lacks in enumerate(missing):
            if lacks and (place := self._spill.take()) is not None:
                chosen.append(number)
                places.append(place)
        if not chosen:
            return
        memory = self._spill.memory
        if memory is not None and self._memory is not None:
            self._memory.read([blocks[number] for number in chosen], [memory.array[place] for place in places])
        number = self._stack.store([keys[number] for number in chosen], memory, places, evicted=True)
        self._stores[number] = places
