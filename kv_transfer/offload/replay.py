"""A trace through the tiers, in simulated time: what hits, what moves, and when first tokens come.

Tiers, index, policies and `OffloadStack` are those that serve; `SimulatedTier` alone stands for memory, disk and
network. Around them stands a model of the rest: prefill workers that take requests in the order of their arrival, load
what the tiers have of the prompt, compute what they have not, and store it. A request whose next block is just being
computed, stored or moved waits for it, without a worker. Blocks are the trace's.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...core.clock import ManualClock
from ...core.config import OffloadConfig
from ...core.errors import ConfigError
from ...core.units import format_bytes
from . import disk
from .base import Lookup, Spill
from .keys import TierKey
from .pool import slots_within
from .record import HEADER_BYTES
from .simulated import Cost, SimulatedTier
from .stack import Level, OffloadStack, StackResult, Write
from .trace import Trace, TraceRequest, trace_key

WORKERS = "workers"
"""What the workers' own cache is called among the tiers."""


class Model(NamedTuple):
    """What stands around the tiers."""

    token_bytes: int
    """KV of one token, all layers and ranks."""
    block_tokens: int
    """Of a block in serving, which tells how many there is room for."""
    links: Mapping[str, Cost]
    """By kind of tier; of a disk tier, for each folder."""
    num_workers: int
    prefill_tokens_per_s: float
    """Of each worker."""
    overhead_s: float = 0.0
    """Of each prompt, however short."""
    worker_cache_bytes: int = 0
    """Of all workers together, as if it were one; least recently used goes first."""
    speed: float = 1.0
    """How much faster than it was recorded the load comes."""


class TierOutcome(NamedTuple):
    """What one tier has done."""

    hit_tokens: int
    loaded_bytes: int
    stored_bytes: int
    evicted: int
    refused: int
    failures: Mapping[str, int]


class Outcome(NamedTuple):
    """What a replay has shown."""

    prompt_tokens: int
    hit_tokens: int
    num_blocks: int
    hit_blocks: int
    tiers: Mapping[str, TierOutcome]
    """By name, nearest first, `WORKERS` before all if they keep anything."""
    moved_down: int
    """Blocks that one tier gave to the next."""
    ttft_s: np.ndarray
    """[requests] float64, in the order of their arrival."""
    busy: float
    """Share of their time for which workers loaded or computed, until the last was done."""


class _Active:
    def __init__(self, number: int, request: TraceRequest, keys: Sequence[TierKey], arrival_s: float) -> None:
        self.number = number
        self.request = request
        self.keys = keys
        self.arrival_s = arrival_s
        self.started_s = 0.0
        self.hits = 0
        self.cached: list[bool] = []
        """Of the hits, which are in the workers' cache."""
        self.owned: list[TierKey] = []
        """Keys for which others wait until this request's stores are over."""
        self.stores: set[int] = set()
        self.storing = False


def plan_slots(config: OffloadConfig, model: Model, trace_block_tokens: int) -> list[int]:
    """How many of a trace's blocks each tier has room for, all that it keeps beside them counted. Pure.

    Raises:
        ConfigError: no tiers are configured, one has room for none, or one is remote; names the key.
    """
    if not config.tiers:
        raise ConfigError("offload.tiers: there are none", fix="list at least one tier, for example a host tier")
    block_bytes = model.token_bytes * model.block_tokens
    slots = []
    for number, tier in enumerate(config.tiers):
        if tier.kind == "remote":
            raise ConfigError(
                f"offload.tiers.{number}.kind: remote: a trace is replayed on one node, and there is no other",
                fix="leave the remote tier out; with the host capacity of all nodes together, the host tier shows what "
                "it could give at most",
            )
        if tier.kind == "host":
            blocks = slots_within(tier.capacity, block_bytes)
        else:
            slot_bytes = disk.slot_bytes(block_bytes) if tier.kind == "disk" else HEADER_BYTES + block_bytes
            blocks = tier.capacity // slot_bytes
        slots.append(blocks * model.block_tokens // trace_block_tokens)
        if not slots[-1]:
            raise ConfigError(
                f"offload.tiers.{number}.capacity: {format_bytes(tier.capacity)} holds no block of the trace, "
                f"{trace_block_tokens} tokens of {format_bytes(model.token_bytes)} each"
            )
    return slots


def open_simulation(config: OffloadConfig, model: Model, trace: Trace, clock: ManualClock) -> OffloadStack:
    """The stack that a configuration means, with tiers that move no bytes.

    Raises:
        ConfigError: as `plan_slots`.
    """
    # More room than there are blocks makes no difference, and an index costs memory for every slot.
    most = len({block for request in trace.requests for block in request.hash_ids})
    block_bytes = model.token_bytes * trace.block_tokens
    levels = []
    slots = plan_slots(config, model, trace.block_tokens)
    for number, (tier, room) in enumerate(zip(config.tiers, slots, strict=True)):
        cost, folders = model.links[tier.kind], max(1, len(tier.path))
        cost = cost._replace(
            load_bytes_per_s=cost.load_bytes_per_s * folders, store_bytes_per_s=cost.store_bytes_per_s * folders
        )
        simulated = SimulatedTier(
            f"{tier.kind}-{number}", min(room, most), block_bytes, tier.policy, cost, clock, tier.timeout_s
        )
        levels.append(Level(simulated, Write(tier.write)))
    return OffloadStack(levels, Spill(max(1, config.moving // block_bytes), None))


class Replay:
    """See the module. Owned by one thread.

    Args:
        trace: what is replayed.
        config: the tiers.
        model: all else.
        step: called for every request that has its first token.

    Raises:
        ConfigError: as `plan_slots`.
    """

    def __init__(
        self, trace: Trace, config: OffloadConfig, model: Model, step: Callable[[], None] = lambda: None
    ) -> None:
        self._trace = trace
        self._model = model
        self._step = step
        self._clock = ManualClock()
        self.stack = open_simulation(config, model, trace, self._clock)
        self._block_bytes = model.token_bytes * trace.block_tokens
        self._cache: OrderedDict[TierKey, None] = OrderedDict()
        self._cache_blocks = model.worker_cache_bytes // self._block_bytes
        self._keys: dict[int, TierKey] = {}
        self._idle = model.num_workers
        self._arrived = 0
        self._ready: list[tuple[int, _Active]] = []
        self._waiting: list[tuple[TierKey, _Active]] = []
        self._computing: list[tuple[float, int, _Active]] = []
        self._loading: dict[int, _Active] = {}
        self._storing: dict[int, _Active] = {}
        self._owners: dict[TierKey, _Active] = {}
        self._hit_tokens = [0] * (len(config.tiers) + 1)
        """By level; of the workers' cache, last."""
        self._hit_blocks = 0
        self._busy_s = 0.0
        self._last_s = 0.0
        self._ttft_s = np.zeros(len(trace.requests))

    def run(self) -> Outcome:
        """Replay all of it, once. Computes all the while."""
        while True:
            while self._go_on():
                pass
            times = [self._arrival_s(self._arrived)] if self._arrived < len(self._trace.requests) else []
            times += [self._computing[0][0]] if self._computing else []
            event_s = self.stack.next_event_s()
            times += [event_s] if event_s is not None else []
            if not times:
                return self._outcome()
            self._clock.advance_to(max(min(times), self._clock.monotonic_s()))

    def _go_on(self) -> bool:
        """Do what is due now; says whether anything was."""
        results = self.stack.poll()
        for result in results:
            self._settle(result)
        now_s, changed = self._clock.monotonic_s(), bool(results)
        while self._arrived < len(self._trace.requests) and self._arrival_s(self._arrived) <= now_s:
            self._arrive()
            changed = True
        while self._computing and self._computing[0][0] <= now_s:
            self._finish(heapq.heappop(self._computing)[2])
            changed = True
        if changed:
            # What the tiers do about it at once comes before the next request.
            return True
        self._wake()
        while self._idle and self._ready:
            self._begin(heapq.heappop(self._ready)[1])
            changed = True
        return changed

    def _arrival_s(self, number: int) -> float:
        requests = self._trace.requests
        return (requests[number].timestamp - requests[0].timestamp) / 1e3 / self._model.speed

    def _arrive(self) -> None:
        request = self._trace.requests[self._arrived]
        keys = []
        for block in request.hash_ids:
            key = self._keys.get(block)
            if key is None:
                key = self._keys[block] = trace_key(block)
            keys.append(key)
        active = _Active(self._arrived, request, keys, self._arrival_s(self._arrived))
        heapq.heappush(self._ready, (self._arrived, active))
        self._arrived += 1

    def _wake(self) -> None:
        """Let those go on whose block has come, or will not come."""
        waiting = []
        for key, active in self._waiting:
            owner, state = self._owners.get(key), Lookup.MISS
            if owner is None or owner.storing:
                [(state, _)] = self.stack.lookup([key])
            if state is Lookup.HIT or (owner is None and state is Lookup.MISS):
                heapq.heappush(self._ready, (active.number, active))
            else:
                waiting.append((key, active))
        self._waiting = waiting

    def _begin(self, active: _Active) -> None:
        keys = active.keys
        cached = [key in self._cache for key in keys]
        states = [found.state for found in self.stack.lookup(keys)]
        hits = [c or state is Lookup.HIT for c, state in zip(cached, states, strict=True)]
        active.hits = hits.index(False) if False in hits else len(hits)
        if active.hits < len(keys):
            following = keys[active.hits]
            if following in self._owners or states[active.hits] is Lookup.PENDING:
                self._waiting.append((following, active))
                return
        active.cached = cached[: active.hits]
        active.started_s = self._clock.monotonic_s()
        self._idle -= 1
        self._own(active, keys[active.hits :])
        wanted = [key for key, there in zip(keys, active.cached, strict=False) if not there]
        if wanted:
            self._loading[self.stack.load(wanted, None, range(len(wanted)))] = active
        else:
            self._compute(active, iter(()))

    def _own(self, active: _Active, keys: Sequence[TierKey]) -> None:
        for key in keys:
            if key not in self._owners:
                self._owners[key] = active
                active.owned.append(key)

    def _settle(self, result: StackResult) -> None:
        active = self._loading.pop(result.number, None)
        if active is not None:
            self._compute(active, iter(zip(result.good, result.levels, strict=True)))
            return
        active = self._storing.pop(result.number)
        active.stores.remove(result.number)
        if not active.stores:
            for key in active.owned:
                del self._owners[key]

    def _compute(self, active: _Active, loaded: Iterator[tuple[bool, int]]) -> None:
        """Start to compute what was not found: all behind the first block that did not come."""
        count = tokens = 0
        for there in active.cached:
            good, level = (True, -1) if there else next(loaded)
            if not good:
                break
            count += 1
            before, tokens = tokens, self._trace.tokens_of(active.request, count)
            self._hit_tokens[level] += tokens - before
        self._own(active, active.keys[count : active.hits])
        active.hits = count
        self._hit_blocks += count
        # The last token is computed in any case: its logits are wanted.
        seconds = max(1, active.request.input_length - tokens) / self._model.prefill_tokens_per_s
        end_s = self._clock.monotonic_s() + self._model.overhead_s + seconds
        heapq.heappush(self._computing, (end_s, active.number, active))

    def _finish(self, active: _Active) -> None:
        self._last_s = self._clock.monotonic_s()
        self._ttft_s[active.number] = self._last_s - active.arrival_s
        self._busy_s += self._last_s - active.started_s
        self._idle += 1
        self._step()
        active.storing = True
        self._store(active, active.keys, evicted=False)
        for key in reversed(active.keys):
            self._cache[key] = None
            self._cache.move_to_end(key)
        gone = [self._cache.popitem(last=False)[0] for _ in range(len(self._cache) - self._cache_blocks)]
        # Without a cache what was offered just now is given up at once, which is news only to a tier that waits for it.
        if gone and (self._cache_blocks or self.stack.levels[0].write is Write.BACK):
            gone.reverse()
            self._own(active, gone)
            self._store(active, gone, evicted=True)

    def _store(self, active: _Active, keys: Sequence[TierKey], *, evicted: bool) -> None:
        number = self.stack.store(keys, None, range(len(keys)), evicted=evicted)
        active.stores.add(number)
        self._storing[number] = active

    def _outcome(self) -> Outcome:
        tiers = {}
        if self._cache_blocks:
            tiers[WORKERS] = TierOutcome(self._hit_tokens[-1], 0, 0, 0, 0, {})
        for level, tokens in zip(self.stack.levels, self._hit_tokens, strict=False):
            stats = level.tier.stats()
            tiers[level.tier.name] = TierOutcome(
                tokens,
                stats.loaded * self._block_bytes,
                stats.stored * self._block_bytes,
                stats.evicted,
                stats.refused,
                dict(stats.failures),
            )
        return Outcome(
            self._trace.prompt_tokens,
            sum(self._hit_tokens),
            sum(len(request.hash_ids) for request in self._trace.requests),
            self._hit_blocks,
            tiers,
            self.stack.moved_down,
            self._ttft_s,
            self._busy_s / (self._model.num_workers * self._last_s) if self._last_s else 0.0,
        )
