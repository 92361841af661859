"""Between a worker's prefix cache and the tiers: full blocks go out, and those of prompts that come again come back.

Nothing here belongs to a request. A store holds a reference to its blocks until its result is there; a load fills
blocks of its own, and gives them to the prefix cache, where whoever waits for them finds them like any others. So a
request that ends, or that has waited for long enough, leaves a load to itself. Sans-IO; nothing blocks but `close`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ..core.clock import Clock
from ..core.hashing import BlockHash
from ..core.kv_messages import KVReport
from ..core.log import logger
from ..core.metrics import WorkerMetrics
from ..kv_transfer.memory import Buffer
from ..kv_transfer.offload.base import HostBlocks, Lookup
from ..kv_transfer.offload.keys import KeySpace, key_space, tenant_tag
from ..kv_transfer.offload.stack import OffloadStack, StackResult
from .engine import Engine
from .load_cost import LoadCost
from .sequence import Sequence

_Owner = TypeVar("_Owner")

_HELD_SHARE = 4
"""At most one block of so many is held by stores."""
_PATIENCE = 2.0
"""A load may take so many times as long as computing would."""
_LEAST_WAIT_S = 0.05
_KNOWN_TENANTS = 1024


class InTiers(NamedTuple):
    """What the tiers have of a prompt."""

    start: int
    """Blocks that the prefix cache had."""
    levels: tuple[int, ...]
    """For each block that follows, the number of the nearest tier that has it."""


class Fetched(NamedTuple, Generic[_Owner]):
    """A load that its owner need not wait for any more."""

    owner: _Owner
    start: int
    """The first token that was to be loaded."""
    num_good: int
    """Tokens from there on, of whole blocks, that are in the prefix cache now."""


class _Fetch(Generic[_Owner]):
    def __init__(
        self, owner: _Owner, prefix: list[int], blocks: list[int], keys: list[BlockHash], root: BlockHash
    ) -> None:
        self.owner: _Owner | None = owner
        self.prefix = prefix
        self.blocks = blocks
        self.keys = keys
        self.root = root
        self.forgotten = False
        """What is loaded was meant to be forgotten meanwhile."""
        self.num_lacking = 0
        self.started_s = self.deadline_s = 0.0


class Offloader(Generic[_Owner]):
    """See the module. Owned by the engine thread.

    Args:
        engine: whose blocks go out and come back; one KV group.
        stack: the tiers; None: there are none, and nothing here does anything.
        clock: for durations and deadlines.
        metrics: counts.
        cost: what loads take; default: measured.
    """

    def __init__(
        self,
        engine: Engine,
        stack: OffloadStack | None,
        clock: Clock,
        metrics: WorkerMetrics,
        cost: LoadCost | None = None,
    ) -> None:
        self._pool = engine.pool
        self._layout = engine.cache.layout
        self._block_tokens = engine.block_tokens
        self._stack = stack
        self._clock = clock
        self._metrics = metrics
        block_bytes = self._layout.block_bytes
        self._cost = cost or LoadCost(len(stack.levels) if stack is not None else 0, block_bytes)
        # `open_tiers` has seen to it that the cache is in the host's memory.
        array = engine.cache.blocks.array if isinstance(engine.cache.blocks, Buffer) else np.empty(0, np.uint8)
        self._memory = HostBlocks(array, block_bytes)
        self._space: Callable[[str], KeySpace] = functools.lru_cache(_KNOWN_TENANTS)(
            lambda salt: key_space(salt, self._layout)
        )
        self._max_held = max(engine.pool.num_blocks // _HELD_SHARE, 1)
        self._num_held = 0
        self._stores: dict[int, list[int]] = {}
        self._fetches: dict[int, _Fetch[_Owner]] = {}

    @property
    def num_open(self) -> int:
        """Stores and loads under way."""
        return len(self._stores) + len(self._fetches)

    # ---- out --------------------------------------------------------------------------------------------------------

    def offer(self, sequence: Sequence, salt: str, num_tokens: int) -> None:
        """Store a sequence's full blocks, those that came from a cache too, which counts as a use of them.

        What is more than stores may hold now is left for the next call.

        Args:
            sequence: whose.
            salt: its tenant's.
            num_tokens: whose KV is in the blocks, whatever steps are in flight.
        """
        start = sequence.num_offered
        stop = min(num_tokens // self._block_tokens, start + self._max_held - self._num_held)
        if self._stack is None or stop <= start:
            return
        blocks = sequence.tables[0][start:stop]
        keys = self._space(salt).of(sequence.keys(stop, self._block_tokens)[start:])
        self._pool.acquire(blocks)
        self._num_held += len(blocks)
        self._stores[self._stack.store(keys, self._memory, blocks)] = blocks
        sequence.num_offered = stop

    def forget(self, sequence: Sequence, salt: str) -> None:
        """What a sequence computed is not to be trusted: no tier gives it to anybody."""
        num_blocks = max(sequence.num_offered, sequence.num_committed)
        if self._stack is not None and num_blocks:
            self._stack.remove(self._space(salt).of(sequence.keys(num_blocks, self._block_tokens)))

    def clear(self, salt: str | None, root: BlockHash | None) -> None:
        """The tiers forget everything, or one tenant's blocks; ``root`` is its chains' beginning."""
        if self._stack is not None:
            self._stack.clear(None if salt is None else tenant_tag(salt))
            for fetch in self._fetches.values():
                fetch.forgotten |= root is None or fetch.root == root

    def pin(self, salt: str, hashes: list[BlockHash], *, on: bool) -> None:
        """The tiers keep blocks, as far as they have them, or need not any more."""
        if self._stack is not None:
            (self._stack.pin if on else self._stack.unpin)(self._space(salt).of(hashes))

    # ---- back -------------------------------------------------------------------------------------------------------

    def look(self, sequence: Sequence, salt: str) -> InTiers | None:
        """What the tiers have of a sequence beyond the prefix cache; None: nothing, or it is of no use. Does no I/O;
        when no tier has the first block, no other is looked up."""
        if self._stack is None or sequence.prompt_logprobs >= 0 or sequence.hidden_states:
            return None
        hashes = sequence.keys((sequence.num_tokens - 1) // self._block_tokens, self._block_tokens)
        start = len(self._pool.match(hashes))
        keys = self._space(salt).of(hashes[start:])
        found_first = self._stack.lookup(keys[:1])
        if not keys or found_first[0].state is not Lookup.HIT:
            return None
        levels = []
        for found in found_first + self._stack.lookup(keys[1:]):
            if found.state is not Lookup.HIT:
                break
            levels.append(found.level)
        return InTiers(start, tuple(levels)) if levels else None

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
        if self._stack is None:
            return False
        start, stop = sequence.num_matched_blocks, known.start + len(known.levels)
        levels = known.levels[max(start - known.start, 0) :]
        if start < known.start or not levels:  # what the cache had is gone, or it has all
            return False
        num_lacking = -(-sequence.num_tokens // self._block_tokens) - start
        promised = sum(fetch.num_lacking for fetch in self._fetches.values())
        if num_lacking + promised + spare > self._pool.num_free:
            return False
        compute_s = len(levels) * self._block_tokens * s_per_token
        if self._cost.load_s(levels) > compute_s:
            self._cost.declined(levels)
            self._metrics.offload_loads.labels("declined").inc()
            return False
        blocks = self._pool.allocate(stop - start)
        assert blocks is not None, "a prompt's room is less than that of its beginning"
        hashes = sequence.keys(stop, self._block_tokens)[start:]
        fetch = _Fetch(owner, sequence.tables[0][:start], blocks, hashes, sequence.root)
        self._pool.acquire(fetch.prefix)
        fetch.num_lacking = num_lacking - len(blocks)
        fetch.started_s = self._clock.monotonic_s()
        fetch.deadline_s = fetch.started_s + max(_PATIENCE * compute_s, _LEAST_WAIT_S)
        self._fetches[self._stack.load(self._space(salt).of(hashes), self._memory, blocks)] = fetch
        return True

    def poll(self) -> list[Fetched[_Owner]]:
        """Drive stores and loads. Returns the loads that are over for their owners."""
        if self._stack is None:
            return []
        over = []
        results = self._stack.poll()
        for result in results:
            blocks = self._stores.pop(result.number, None)
            if blocks is not None:
                self._num_held -= len(blocks)
                self._pool.release(blocks)
            else:
                over += self._landed(self._fetches.pop(result.number), result)
        if results:
            self._stack.publish(self._metrics)
        now_s = self._clock.monotonic_s()
        for fetch in self._fetches.values():
            if fetch.owner is not None and fetch.deadline_s <= now_s:
                self._metrics.offload_loads.labels("slow").inc()
                over.append(Fetched(fetch.owner, len(fetch.prefix) * self._block_tokens, 0))
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
            self._stack.publish(self._metrics)

    def close(self) -> None:
        """Wait for copies from and to the cache's memory, which may go then. Blocks. Idempotent."""
        if self._stack is not None:
            self._stack.close()
            self.poll()

    def _landed(self, fetch: _Fetch[_Owner], result: StackResult) -> list[Fetched[_Owner]]:
        """Give what was loaded to the prefix cache."""
        self._cost.loaded(result.levels, self._clock.monotonic_s() - fetch.started_s)
        for block, key, good in zip(fetch.blocks, fetch.keys, result.good, strict=True):
            if good and not fetch.forgotten:
                self._pool.commit(block, key, fetch.root)
        self._pool.release(fetch.prefix + fetch.blocks)
        num_good = result.good.index(False) if False in result.good else len(result.good)
        self._metrics.offload_tokens.inc(num_good * self._block_tokens)
        if fetch.owner is None:
            return []
        self._metrics.offload_loads.labels("loaded" if num_good == len(result.good) else "failed").inc()
        if result.error:
            logger.info("%d of %d blocks came from the tiers: %s", num_good, len(result.good), result.error)
        size = self._block_tokens
        return [Fetched(fetch.owner, len(fetch.prefix) * size, num_good * size)]
