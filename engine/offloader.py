"""Between a worker's prefix cache and the tiers: full blocks go out, and those of prompts that come again come back.

A store costs a tier and its owner as much for one block as for many: blocks that fill during decode are gathered, over
all sequences, until there are enough, a moment has passed, or the worker has nothing to compute.

Nothing here belongs to a request. A store holds a reference to its blocks until its result is there; a load fills
blocks of its own, and gives them to the prefix cache, where whoever waits for them finds them like any others. So a
request that ends, or that has waited for long enough, leaves a load to itself. Sans-IO; nothing blocks but `close`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from ..core.clock import Clock
from ..core.hashing import BlockHash
from ..core.kv_messages import KVReport
from ..core.log import logger
from ..core.metrics import WorkerMetrics
from ..kv_transfer.offload.base import Lookup
from ..kv_transfer.offload.device import DeviceBlocks
from ..kv_transfer.offload.host import HostTier
from ..kv_transfer.offload.keys import KeySpace, TierKey, key_space, tenant_tag
from ..kv_transfer.offload.stack import StackResult, Write
from .engine import Engine
from .load_cost import LoadCost
from .prefixes import Part, group_key, group_keys, longest_window
from .sequence import NO_BLOCK, Sequence
from .tiers import Tiers, whole_layout
from .write_back import WriteBack

_Owner = TypeVar("_Owner")

_HELD_SHARE = 4
"""At most one block of so many is held by stores."""
_STORED_TOGETHER = 16
"""Gathered blocks that are enough for a store."""
_GATHER_S = 0.05
_PUBLISH_S = 0.25
_PATIENCE = 2.0
"""A load may take so many times as long as computing would."""
_LEAST_WAIT_S = 0.05
_KNOWN_TENANTS = 1024
_GPU_S_PER_BYTE = 1 / 25e9
"""From registered memory of the host, until a load is measured: half of what PCIe 5.0 gives. A GPU computes a block
sooner than at 1 GB/s it would come, so that none would be loaded, nor measured, for long."""


class InTiers(NamedTuple):
    """What the prefix cache and the tiers have of a prompt."""

    num_blocks: int
    levels: dict[Part, int]
    """For each block that was not in the prefix cache, the number of the nearest tier that has it."""


class Fetched(NamedTuple, Generic[_Owner]):
    """A load that its owner need not wait for any more."""

    owner: _Owner
    start: int
    """The first token that was to be loaded."""
    num_good: int
    """Tokens from there on, of whole blocks, that are in the prefix cache now."""


class _Fetch(Generic[_Owner]):
    def __init__(self, owner: _Owner, start: int, hashes: list[BlockHash], root: BlockHash) -> None:
        self.owner: _Owner | None = owner
        self.start = start
        self.hashes = hashes
        self.root = root
        self.forgotten = False
        """What is loaded was meant to be forgotten meanwhile."""
        self.held: list[int] = []
        self.parts: list[Part] = []
        self.blocks: list[int] = []
        self.num_lacking = 0
        self.started_s = self.deadline_s = 0.0


class Offloader(Generic[_Owner]):
    """See the module. Owned by the engine thread.

    Args:
        engine: whose blocks go out and come back.
        tiers: None: there are none, and nothing here does anything.
        clock: for durations and deadlines.
        metrics: counts.
        cost: what loads take; default: measured.
    """

    def __init__(
        self,
        engine: Engine,
        tiers: Tiers | None,
        clock: Clock,
        metrics: WorkerMetrics,
        cost: LoadCost | None = None,
    ) -> None:
        self._engine = engine
        self._pool = engine.pool
        self._groups = engine.groups
        self._block_tokens = engine.block_tokens
        self._stack = None if tiers is None else tiers.stack
        self._memory = None if tiers is None else tiers.memory
        self._write_back: WriteBack | None = None
        if tiers is not None and tiers.stack.levels[0].write is Write.BACK:
            self._write_back = WriteBack(engine.pool, tiers)
        self._clock = clock
        self._metrics = metrics
        layout = whole_layout(engine)
        num_tiers = 0 if tiers is None else len(tiers.stack.levels)
        self._cost = cost or LoadCost(num_tiers, layout.block_bytes)
        if cost is None and tiers is not None and isinstance(self._memory, DeviceBlocks):
            for number, level in enumerate(tiers.stack.levels):
                if isinstance(level.tier, HostTier):
                    self._cost.s_per_byte[number] = _GPU_S_PER_BYTE
        self._spaces: Callable[[str], list[KeySpace]] = functools.lru_cache(_KNOWN_TENANTS)(
            lambda salt: [key_space(salt, layout, group) for group in range(len(self._groups))]
        )
        self._max_held = max(engine.pool.num_blocks // _HELD_SHARE, len(self._groups))
        self._whole = [number for number, group in enumerate(self._groups) if not group.window]
        self._windowed = [number for number, group in enumerate(self._groups) if group.window]
        self._num_held = 0
        self._gathered: dict[TierKey, int] = {}
        self._gathered_since_s = 0.0
        self._news = False
        self._published_s = -math.inf
        self._stores: dict[int, list[int]] = {}
        self._fetches: dict[int, _Fetch[_Owner]] = {}

    @property
    def num_open(self) -> int:
        """Stores and loads under way, or about to be."""
        num_saved = self._write_back.num_open if self._write_back is not None else 0
        return len(self._stores) + len(self._fetches) + num_saved + bool(self._gathered)

    # ---- out --------------------------------------------------------------------------------------------------------

    def offer(self, sequence: Sequence, salt: str, num_tokens: int) -> None:
        """Store a sequence's full blocks, those that came from a cache too, which counts as a use of them. Of layers
        that see a window, also what is dead already and nobody has reused: another prompt may part from this one there.

        They may be gathered first, and held meanwhile. What is more than stores may hold now is left for the next call.

        Args:
            sequence: whose.
            salt: its tenant's.
            num_tokens: whose KV is in the blocks, whatever steps are in flight.
        """
        start, full = sequence.num_offered, num_tokens // self._block_tokens
        stop = min(full, start + (self._max_held - self._num_held) // len(self._groups))
        known = stop if self._write_back is None else full
        if self._stack is None or known <= start:
            return
        hashes = sequence.keys(known, self._block_tokens)
        parts, blocks = self._filled(sequence, hashes, range(start, known))
        keys = self._keys(salt, hashes, parts)
        if self._write_back is not None:
            self._write_back.name(blocks, [group_key(hashes[part.position], part.group) for part in parts], keys)
        if stop <= start:
            return
        count = sum(part.position < stop for part in parts)
        self._pool.acquire(blocks[:count])
        self._num_held += count
        sequence.num_offered = stop
        if not self._gathered.keys().isdisjoint(keys[:count]):
            self._store_gathered()  # of two uses, neither is lost
        if not self._gathered:
            self._gathered_since_s = self._clock.monotonic_s()
        self._gathered.update(zip(keys[:count], blocks[:count], strict=True))
        if len(self._gathered) >= min(_STORED_TOGETHER, self._max_held // 2):
            self._store_gathered()

    def idle(self) -> None:
        """Nothing is being computed: nothing is gained by gathering more, or by telling metrics later."""
        self._store_gathered()
        if self._news:
            self.publish()

    def forget(self, sequence: Sequence, salt: str) -> None:
        """What a sequence computed is not to be trusted: no tier gives it to anybody."""
        num_blocks = max(sequence.num_offered, sequence.num_committed)
        if self._stack is not None and num_blocks:
            self._store_gathered()
            hashes = sequence.keys(num_blocks, self._block_tokens)
            self._stack.remove([key for space in self._spaces(salt) for key in space.of(hashes)])

    def clear(self, salt: str | None, root: BlockHash | None) -> None:
        """The tiers forget everything, or one tenant's blocks; ``root`` is its chains' beginning."""
        if self._stack is not None:
            self._store_gathered()
            self._stack.clear(None if salt is None else tenant_tag(salt))
            for fetch in self._fetches.values():
                fetch.forgotten |= root is None or fetch.root == root

    def pin(self, salt: str, hashes: list[BlockHash], *, on: bool) -> None:
        """The tiers keep blocks, as far as they have them, or need not any more."""
        if self._stack is not None:
            keys = [key for space in self._spaces(salt) for key in space.of(hashes)]
            (self._stack.pin if on else self._stack.unpin)(keys)

    # ---- back -------------------------------------------------------------------------------------------------------

    def look(self, sequence: Sequence, salt: str) -> InTiers | None:
        """What the tiers have of a sequence beyond the prefix cache; None: nothing, or it is of no use. Does no I/O;
        when no tier has the first block of layers that see everything, no other is looked up."""
        if self._stack is None or sequence.prompt_logprobs >= 0 or sequence.hidden_states:
            return None
        size = self._block_tokens
        hashes = sequence.keys((sequence.num_tokens - 1) // size, size)
        start, stop = self._engine.num_cached(hashes), len(hashes)
        levels: dict[Part, int] = {}
        for group in self._whole:
            if stop <= start:
                return None
            first = len(self._pool.match(group_keys(hashes[:stop], group)))
            if not self._find(salt, hashes, [Part(first, group)][: stop - first]):
                stop = first
                continue
            parts = [Part(position, group) for position in range(first, stop)]
            levels |= self._find(salt, hashes, parts)
            stop = next((part.position for part in parts if part not in levels), stop)

        def has(part: Part) -> bool:
            return part in levels or self._cached(hashes, part) is not None

        for group in self._windowed if stop > start else ():
            first = self._groups[group].first_block((start + 1) * size, size)
            parts = [Part(position, group) for position in range(first, stop)]
            levels |= self._find(salt, hashes, [part for part in parts if self._cached(hashes, part) is None])
        stop = longest_window(self._groups, stop, size, has)
        if stop <= start:
            return None
        firsts = [group.first_block(stop * size, size) for group in self._groups]
        return InTiers(stop, {part: at for part, at in levels.items() if firsts[part.group] <= part.position < stop})

    def fetch(
        self, owner: _Owner, sequence: Sequence, salt: str, known: InTiers, spare: int, s_per_token: float
    ) -> bool:
        """Start to load what a sequence lacks, if that is sooner than computing it, and if the sequence could be
        computed now: the load takes no block that it would not take itself.

        Args:
            owner: who waits; `poll` tells when it need not wait any more.
            sequence: matched against the prefix cache; its caller gives its blocks back when a load was started.
            salt: its tenant's.
            known: what `look` said.
            spare: blocks that must be left.
            s_per_token: what computing takes.

        Returns:
            whether there is something to wait for.
        """
        start, stop = sequence.num_matched_blocks, known.num_blocks
        if self._stack is None or stop <= start or self._engine.copying:
            return False
        fetch = _Fetch(owner, start, sequence.keys(stop, self._block_tokens), sequence.root)
        fetch.held, fetch.parts = self._split(fetch.hashes)
        if not known.levels.keys() >= set(fetch.parts):  # what the cache had is gone
            return False
        fetch.num_lacking = self._engine.num_lacking(sequence.num_tokens, stop)
        promised = sum(other.num_lacking for other in self._fetches.values())
        self._pool.acquire(fetch.held)
        if len(fetch.parts) + fetch.num_lacking + promised + spare > self._pool.num_free:
            self._pool.release(fetch.held)
            return False
        compute_s = (stop - start) * self._block_tokens * s_per_token
        levels = [known.levels[part] for part in fetch.parts]
        if self._cost.load_s(levels) > compute_s:
            self._pool.release(fetch.held)
            self._cost.declined(levels)
            self._metrics.offload_loads.labels("declined").inc()
            return False
        blocks = self._pool.allocate(len(fetch.parts))
        assert blocks is not None, "so many were free"
        fetch.blocks = blocks
        fetch.started_s = self._clock.monotonic_s()
        fetch.deadline_s = fetch.started_s + max(_PATIENCE * compute_s, _LEAST_WAIT_S)
        keys = self._keys(salt, fetch.hashes, fetch.parts)
        memory = self._memory.ordered() if isinstance(self._memory, DeviceBlocks) else self._memory
        self._fetches[self._stack.load(keys, memory, blocks)] = fetch
        return True

    def poll(self) -> list[Fetched[_Owner]]:
        """Drive stores and loads. Returns the loads that are over for their owners."""
        if self._stack is None:
            return []
        over = []
        now_s = self._clock.monotonic_s()
        if self._gathered and now_s >= self._gathered_since_s + _GATHER_S:
            self._store_gathered()
        results = self._stack.poll()
        for result in results:
            blocks = self._stores.pop(result.number, None)
            if blocks is not None:
                self._num_held -= len(blocks)
                self._pool.release(blocks)
            elif self._write_back is None or not self._write_back.ended(result.number):
                over += self._landed(self._fetches.pop(result.number), result)
        self._news |= bool(results)
        if self._news and now_s >= self._published_s + _PUBLISH_S:
            self.publish()
        for fetch in self._fetches.values():
            if fetch.owner is not None and fetch.deadline_s <= now_s:
                self._metrics.offload_loads.labels("slow").inc()
                over.append(Fetched(fetch.owner, fetch.start * self._block_tokens, 0))
                fetch.owner = None
                fetch.num_lacking = 0
        return over

    def next_event_s(self) -> float | None:
        """When `poll` has something to do although nobody was notified, on the monotonic clock."""
        if self._stack is None:
            return None
        times = [fetch.deadline_s for fetch in self._fetches.values() if fetch.owner is not None]
        if (at_s := self._stack.next_event_s()) is not None:
            times.append(at_s)
        return min(times, default=None)

    def reports(self) -> list[KVReport]:
        """Each tier's figures."""
        return [] if self._stack is None else self._stack.reports()

    def publish(self) -> None:
        """Bring the tiers' metrics up to date."""
        if self._stack is not None:
            self._news, self._published_s = False, self._clock.monotonic_s()
            self._stack.publish(self._metrics)

    def close(self) -> None:
        """Wait for copies from and to the cache's memory, which may go then. Blocks. Idempotent."""
        if self._stack is not None:
            self._store_gathered()
            self._stack.close()
            self.poll()

    def _store_gathered(self) -> None:
        if self._gathered and self._stack is not None:
            keys, blocks = list(self._gathered), list(self._gathered.values())
            self._gathered = {}
            self._stores[self._stack.store(keys, self._memory, blocks)] = blocks

    def _landed(self, fetch: _Fetch[_Owner], result: StackResult) -> list[Fetched[_Owner]]:
        """Give what was loaded to the prefix cache."""
        self._cost.loaded(result.levels, self._clock.monotonic_s() - fetch.started_s)
        for block, part, good in zip(fetch.blocks, fetch.parts, result.good, strict=True):
            if good and not fetch.forgotten:
                self._pool.commit(block, group_key(fetch.hashes[part.position], part.group), fetch.root)
        num_good = max(self._engine.num_cached(fetch.hashes) - fetch.start, 0)
        self._pool.release(fetch.held + fetch.blocks)
        self._metrics.offload_tokens.inc(num_good * self._block_tokens)
        if fetch.owner is None:
            return []
        self._metrics.offload_loads.labels("loaded" if all(result.good) else "failed").inc()
        if result.error:
            logger.info("%d of %d blocks came from the tiers: %s", sum(result.good), len(result.good), result.error)
        size = self._block_tokens
        return [Fetched(fetch.owner, fetch.start * size, num_good * size)]

    def _filled(self, sequence: Sequence, hashes: list[BlockHash], positions: range) -> tuple[list[Part], list[int]]:
        """The blocks that there are at some positions, in every group."""
        parts, blocks = [], []
        for part in (Part(position, group) for position in positions for group in range(len(self._groups))):
            block: int | None = sequence.tables[part.group][part.position]
            if block == NO_BLOCK:
                block = self._pool.find_free(group_key(hashes[part.position], part.group))
            if block is not None:
                parts.append(part)
                blocks.append(block)
        return parts, blocks

    def _find(self, salt: str, hashes: list[BlockHash], parts: list[Part]) -> dict[Part, int]:
        """The nearest tier of each block that one has."""
        if self._stack is None or not parts:
            return {}
        found = self._stack.lookup(self._keys(salt, hashes, parts))
        return {part: at.level for part, at in zip(parts, found, strict=True) if at.state is Lookup.HIT}

    def _split(self, hashes: list[BlockHash]) -> tuple[list[int], list[Part]]:
        """Of what a prefix needs, the blocks that the prefix cache has, and the parts that it lacks."""
        held: list[int] = []
        lacking: list[Part] = []
        for group in self._whole:
            cached = self._pool.match(group_keys(hashes, group))
            held += cached
            lacking += [Part(position, group) for position in range(len(cached), len(hashes))]
        size = self._block_tokens
        for group in self._windowed:
            first = self._groups[group].first_block(len(hashes) * size, size)
            for part in (Part(position, group) for position in range(first, len(hashes))):
                block = self._cached(hashes, part)
                if block is None:
                    lacking.append(part)
                else:
                    held.append(block)
        return held, sorted(lacking)

    def _cached(self, hashes: list[BlockHash], part: Part) -> int | None:
        return self._pool.find(group_key(hashes[part.position], part.group))

    def _keys(self, salt: str, hashes: list[BlockHash], parts: list[Part]) -> list[TierKey]:
        suffixes = [space.suffix for space in self._spaces(salt)]
        return [hashes[position] + suffixes[group] for position, group in parts]
