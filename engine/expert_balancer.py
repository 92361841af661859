"""Keeps ranks that share experts equally full: counts what they compute, decides when experts move, and has them moved.

All ranks have one. They meet at *boundaries*, one between each two of their steps, also the empty ones in which nobody
has work: whatever they do together they do at the same boundary, by its number, and never because one of them wants to.
Every so many boundaries they tell each other what tokens each expert has had on them. The first rank alone adds that
up, plans, and proposes; planning takes milliseconds, and has a thread of its own (`expert_planner`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.clock import Clock
from ..core.config_experts import BalanceConfig, ExpertsConfig
from ..core.errors import CapacityError, ConfigError, PlacementError
from ..core.expert_messages import ExpertsReport, LoadEntries
from ..core.log import logger
from ..core.metrics import ExpertMetrics
from ..eplb.exchange import Exchange
from ..eplb.learned import Learned
from ..eplb.load_file import warm_up_placement
from ..eplb.maps import ExpertMaps
from ..eplb.migrate import Migrator, Outcome
from ..eplb.peers import MakeTransports
from ..eplb.placement import Placement, Topology, initial_placement
from ..eplb.standing import Standing
from ..eplb.store import ExpertStore
from .expert_planner import Look, Planner
from .upload import download

_MOST_BOUNDARIES = 32
"""Between two looks at the load."""
_LOOK = struct.Struct("<Qd")
"""Steps with work since the last look, and the seconds that they took."""

Boundary = Callable[[bool], None]
"""Called between two steps, with whether the one that follows has work for anybody."""


class Balancer:
    """One rank's. Made by all ranks together; blocks until all are there. One engine thread calls all but what says
    otherwise.

    Args:
        loads: [layers, local experts] int64, tokens that came to each slot; set back here.
        store: this rank's experts, filled.
        maps: where they all are.
        topology: of the slots.
        exchanges: two between the ranks, for nothing else.
        make: this rank's transports.
        config: when, and how.
        model: what recorded loads say that they are of.
        metrics: what to count.
        clock: for time-outs and ages.
        note: told, by the rank that leads and on any thread, how attempts end, for people.
        keep: likewise told, when experts have moved, what the group after this one needs: a `Learned`, packed.

    Raises:
        ConfigError: ranks do not fit each other, or cannot read from each other.
        WorkerError: a rank did not come.
    """

    def __init__(
        self,
        loads: Tensor,
        store: ExpertStore,
        maps: ExpertMaps,
        topology: Topology,
        exchanges: tuple[Exchange, Exchange],
        make: MakeTransports,
        config: BalanceConfig,
        model: str,
        metrics: ExpertMetrics,
        clock: Clock,
        note: Callable[[str], object] = lambda text: None,
        keep: Callable[[bytes], object] = lambda learned: None,
    ) -> None:
        words, self._exchange = exchanges
        placement = maps.placement
        self._loads = loads
        self._maps = maps
        self._clock = clock
        self._first = self._exchange.rank * maps.num_local
        self._period = max(1, min(_MOST_BOUNDARIES, config.window_steps // 4))
        self._num_boundaries = 0
        self._num_worked = 0
        self._worked_s = 0.0
        self._since_s: float | None = None
        shape = placement.num_layers, placement.num_logical
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=loads.device)
        self._coming: tuple[bytes, Tensor, torch.cuda.Event | None] | None = None
        self._exchanging = False
        self._migrator = Migrator(
            words,
            make,
            store,
            maps,
            topology,
            Standing.first(placement),
            timeout_s=config.timeout_s,
            every=config.exchange_steps,
            checksums=config.checksums,
            metrics=metrics,
            tell=self._ended,
            before_swap=lambda layer: self._gather(slice(layer, layer + 1)),
        )
        self._planner: Planner | None = None
        if self._exchange.rank == 0:
            per_look = min(self._period, config.window_steps)
            self._planner = Planner(
                self._migrator.propose,
                lambda: maps.placement,
                topology,
                store.layout.expert_bytes,
                loads.device.type,
                config,
                max(1, config.window_steps // per_look),
                model,
                metrics,
                clock,
                note,
                keep,
            )

    def boundary(self, has_work: bool) -> None:
        """Between two steps; all ranks call it, with the same.

        Raises:
            WorkerError: a rank did not take part. No step may follow.
        """
        now_s = self._clock.monotonic_s()
        if self._since_s is not None:
            self._worked_s += now_s - self._since_s
        self._since_s = now_s if has_work else None
        self._migrator.step_boundary()
        self._num_boundaries += 1
        if self._num_boundaries % self._period == 0:
            self._look()
        self._num_worked += has_work

    # ---- any thread -------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this is the rank that plans, and knows how all of them are."""
        return self._planner is not None

    def propose(self, placement: Placement) -> None:
        """Move to this placement, whoever made it; see `Migrator.propose`."""
        self._migrator.propose(placement)

    def demand(self) -> Future[str]:
        """Place experts anew, whatever that gains, by the load of the window; of the rank that leads.

        Returns:
            what becomes of it, for people.

        Raises:
            CapacityError: this rank does not lead.
        """
        if self._planner is None:
            raise CapacityError("the first worker of a group is the one that plans")
        return self._planner.demand()

    def report(self) -> ExpertsReport | None:
        """How the group is; None on ranks that do not lead."""
        return None if self._planner is None else self._planner.report()

    def entries(self, after: int) -> LoadEntries:
        """The load since entry ``after``, as much of it as is kept; of ranks that do not lead, nothing."""
        return LoadEntries() if self._planner is None else self._planner.entries(after)

    def close(self) -> None:
        """End. Blocks until the threads have ended. Idempotent; other ranks find this one missing."""
        if self._planner is not None:
            self._planner.close()
        self._migrator.close()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What was shown at the last look is there now, and what was counted then is on the host: nobody waits."""
        if self._exchanging:
            parts = self._exchange.finish()
            if self._planner is not None:
                self._planner.hand(self._parse(parts))
        self._exchanging = self._coming is not None
        if self._coming is not None:
            head, tokens, counted = self._coming
            if counted is not None:
                counted.synchronize()
            self._exchange.start(head + tokens.numpy().tobytes())
        self._gather(slice(None))
        tokens = download(self._tokens) if self._tokens.is_cuda else self._tokens.clone()
        counted = None
        if self._tokens.is_cuda:
            counted = torch.cuda.Event()
            counted.record()
        self._tokens.zero_()
        self._coming = _LOOK.pack(self._num_worked, self._worked_s), tokens, counted
        self._num_worked, self._worked_s = 0, 0.0

    def _gather(self, layers: slice) -> None:
        """Count what slots had for the experts that they hold now."""
        last = self._first + self._maps.num_local
        experts = self._maps.physical_to_logical[layers, self._first : last].to(torch.int64)
        self._tokens[layers].scatter_add_(1, experts, self._loads[layers])
        self._loads[layers].zero_()

    def _parse(self, parts: list[bytes]) -> Look:
        num_steps, seconds = _LOOK.unpack_from(parts[0])
        tokens = [np.frombuffer(part, np.int64, offset=_LOOK.size).reshape(self._tokens.shape) for part in parts]
        return Look(num_steps, seconds, np.stack(tokens))

    def _ended(self, outcome: Outcome) -> None:
        if self._planner is not None:
            self._planner.ended(outcome)


def first_placement(
    num_layers: int, num_experts: int, num_ranks: int, config: ExpertsConfig, num_groups: int, learned: bytes = b""
) -> tuple[Placement, Topology]:
    """Where experts are before the group serves, and on what.

    Where the group before it had them, if there was one; else by the file of ``experts.balance``, which is read, if it
    names one.

    Args:
        num_layers: with experts.
        num_experts: of a layer.
        num_ranks: that share them.
        config: how many are there twice, and the file.
        num_groups: that the router limits tokens to.
        learned: by the group before this one, if there was one: a `Learned`, packed.

    Raises:
        ConfigError: the slots cannot be divided among the ranks, or there are more than enough for all on each; or the
            file is no load of this model's.
    """
    num_redundant = config.redundant
    num_slots = num_experts + num_redundant
    if num_slots % num_ranks:
        raise ConfigError(
            f"experts.parallel: {num_slots} experts, {num_redundant} of them redundant, cannot be divided among "
            f"{num_ranks} ranks",
            fix=f"experts.redundant: {num_redundant + -num_slots % num_ranks} makes it a multiple",
        )
    if num_slots // num_ranks > num_experts:
        raise ConfigError(
            f"experts.redundant: {num_redundant} gives each of {num_ranks} ranks {num_slots // num_ranks} experts, "
            f"the model has {num_experts}",
            fix=f"give at most {num_experts * (num_ranks - 1)}",
        )
    topology = Topology(num_slots, num_ranks, num_groups=num_groups)
    if learned and config.balanced:
        try:
            placement = Learned.unpack(learned).placement(num_layers, num_experts, topology)
        except PlacementError as error:
            # All ranks have the same bytes, and so begin in the same way.
            logger.warning("experts begin where they did first: %s", error)
        else:
            logger.info("experts begin where the group before had them, or its load says: %08x", _digest(placement))
            return placement, topology
    file = config.balance.load_file
    if file is None:
        return initial_placement(num_layers, num_experts, topology), topology
    try:
        return warm_up_placement(Path(file).expanduser(), num_layers, num_experts, topology), topology
    except (ConfigError, PlacementError) as error:
        raise ConfigError(f"experts.balance.load_file: {error.message}", fix=error.fix) from None


def compare_placements(exchange: Exchange, placement: Placement) -> None:
    """All ranks call this with their first ones: those that read different files would send tokens astray.

    Raises:
        ConfigError: a rank has another.
        WorkerError: a rank did not come.
    """
    own = _digest(placement).to_bytes(4, "little")
    others = exchange.gather(own)
    different = [rank for rank, other in enumerate(others) if other != others[0]]
    if different:
        raise ConfigError(
            f"experts.balance.load_file: rank {different[0]} places experts otherwise than rank 0",
            fix="give the same file to all nodes",
        )


def _digest(placement: Placement) -> int:
    return zlib.crc32(np.ascontiguousarray(placement.physical_to_logical).tobytes())
