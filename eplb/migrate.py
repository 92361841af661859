"""Moves experts between ranks while they serve.

What an engine does, on each of its ranks:

1. Its weights lie in an `ExpertStore`, whose ``live[layer]`` tensors, [slots of this rank, …], it fills and computes
   with; its kernels read the placement in an `ExpertMaps`, by layer and physical expert (rank r owns the slots
   r · P/R … (r + 1) · P/R − 1). Neither's memory ever moves, so that CUDA graphs may read both.
2. All ranks make a `Migrator` together, over an exchange of its own: ``Migrator(TorchExchange(group), …)``; after their
   CUDA graphs are recorded, which other threads' work with the device would spoil.
3. Its thread calls `Migrator.step_boundary` between two steps, once for each step of any kind, dummy steps too, on the
   stream that computes. There, and nowhere else, weights and maps change; on all ranks before the same step.
4. Rank 0, whenever it likes, calls `Migrator.propose` with a placement. How that went is told to ``tell``.
5. `WorkerError` from `step_boundary` means what it means from a collective: a rank is gone or stood still for too long.
   No further step may be computed before the ranks are equal again: `close`; gather those that go on, and new ones in
   the place of those that are gone, in a new group; `standing.reconcile`; `settle`; make a new `Migrator`.

A thread of its own reads the experts, one-sided, out of its peers' live weights into the staging memory. The protocol
is in `eplb.rebalance`.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..core.clock import Clock, SystemClock
from ..core.errors import CapacityError, PlacementError, WorkerError
from ..core.log import logger
from ..core.metrics import ExpertMetrics
from ..kernels.events import CpuGpuEvent
from ..kv_transfer.memory import Buffer
from ..kv_transfer.transports import Region
from .exchange import Exchange
from .ledger import Ledger
from .maps import ExpertMaps
from .moves import changed_layers, plan_moves
from .peers import Introduction, MakeTransports, Peers
from .placement import Placement, Topology
from .rebalance import Commit, End, Instruction, ReadPlan, Reason, Rebalance, Stage, Word
from .staging import EXPERTS, LANDING, LEDGER, STAGING, Staged, StageError, Stager, landing_bytes
from .standing import Standing
from .store import ExpertStore, checksum


class Outcome(NamedTuple):
    """How an attempt to rebalance went, as one rank saw it."""

    attempt: int
    reason: Reason
    rank: int
    """Whose word ended it."""
    layer: int | None
    """That was not committed, and stayed as it was on all ranks; of a rank that left, see `Migrator.settle`."""
    num_layers: int
    """That were committed."""
    num_experts: int
    """That came into slots of this rank, in these layers."""
    num_bytes: int
    """That this rank read from peers for them."""
    duration_s: float
    detail: str
    """What went wrong on this rank, if it was here."""


class Migrator:
    """A rank's part in moving experts; see the module. One engine thread calls all but `propose`.

    Made by all ranks together; blocks until all are there.

    Args:
        exchange: between the ranks, for nothing else.
        make: this rank's transports, see `Peers`.
        store: its experts, filled.
        maps: where they are.
        topology: of their slots.
        standing: what the ranks have agreed on; `Standing.first` of a first placement.
        timeout_s: within which a rank has to read the plan, or to stage a layer.
        every: steps between two exchanges, at least 1. A layer takes about two of them.
        checksums: whether experts are compared with a checksum that was taken of them here and now.
        metrics: what to count.
        tell: called, on the engine's thread, when an attempt has ended.
        before_swap: called there with a layer whose slots are about to hold other experts.
        clock: for time-outs.

    Raises:
        ConfigError: ranks do not fit each other, or cannot read from each other.
        PlacementError: store, maps and topology do not fit each other.
        WorkerError: a rank did not come.
    """

    def __init__(
        self,
        exchange: Exchange,
        make: MakeTransports,
        store: ExpertStore,
        maps: ExpertMaps,
        topology: Topology,
        standing: Standing,
        *,
        timeout_s: float = 10.0,
        every: int = 4,
        checksums: bool = False,
        metrics: ExpertMetrics | None = None,
        tell: Callable[[Outcome], None] = lambda outcome: None,
        before_swap: Callable[[int], None] = lambda layer: None,
        clock: Clock = SystemClock(),
    ) -> None:
        layout, placement = store.layout, maps.placement
        found = placement.num_layers, placement.num_physical, layout.num_slots * topology.num_ranks, exchange.size
        expected = layout.num_layers, topology.num_physical, topology.num_physical, topology.num_ranks
        if found != expected:
            raise PlacementError(
                f"a placement of {found[0]} layers and {found[1]} slots, {found[2]} in the store, on {found[3]} ranks; "
                f"expected {expected[0]}, {expected[1]}, {expected[2]} and {expected[3]}"
            )
        self._exchange = exchange
        self._store = store
        self._maps = maps
        self._topology = topology
        self._timeout_s = timeout_s
        self._every = every
        self._checksums = checksums
        self._metrics = metrics
        self._tell = tell
        self._before_swap = before_swap
        self._clock = clock
        self._ledger = Ledger(layout.num_layers, layout.num_slots, topology.num_physical)
        self._ledger.generations[:] = standing.generations
        if checksums:
            for layer, tensors in enumerate(store.live):
                self._ledger.sums[layer] = [checksum(tensors, slot) for slot in range(layout.num_slots)]
        if store.device.type == "cuda":
            torch.cuda.synchronize(store.device)  # peers may read as soon as they are introduced
        self._landing = Buffer(landing_bytes(self._ledger, topology.num_ranks, layout.num_slots))
        regions = (
            Region(EXPERTS, store.memory),
            Region(STAGING, store.staging),
            Region(LEDGER, self._ledger.buffer),
            Region(LANDING, self._landing),
        )
        about = Introduction(layout, topology.num_physical, placement.num_logical, checksums, {})
        self._peers = Peers(exchange, make, regions, about)
        self._stager = Stager(store, self._ledger, self._peers, self._landing, exchange.rank, clock)

        self._machine = Rebalance(exchange.rank, exchange.size, clock, timeout_s)
        self._machine.resume(standing.attempt)
        self._num_steps = 0
        self._started = False
        self._lost = False
        self._undecided: int | None = None
        # Of the attempt: written by the thread that stages while the machine is busy, read by the engine's otherwise.
        self._plan = np.empty((0, 0), np.int32)
        self._layers: list[int] = []
        self._staged = Staged((), (), 0)
        self._committed = 0, 0, 0
        self._began_s = 0.0
        self._ready_s = 0.0
        self._detail = ""
        self._hand_over = CpuGpuEvent(store.device)
        self._consumed = CpuGpuEvent(store.device)
        self._owed = False
        """Whether the engine has consumed what was staged, and the thread has not seen it yet."""

        self._changed = threading.Condition()
        self._job: ReadPlan | Stage | End | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether an attempt is under way; between two boundaries the same on all ranks."""
        with self._changed:
            return self._machine.active

    def propose(self, placement: Placement) -> None:
        """Move to this placement, in the background. Rank 0 alone calls this, on any thread; does not wait.

        Raises:
            PlacementError: it is for another topology or model.
            CapacityError: an attempt is under way, or was a moment ago.
            IllegalTransition: this is not rank 0.
        """
        plan, now = placement.physical_to_logical, self._maps.placement
        if plan.shape != now.physical_to_logical.shape or placement.num_logical != now.num_logical:
            raise PlacementError(
                f"the plan is for {plan.shape[0]} layers, {plan.shape[1]} slots and {placement.num_logical} experts, "
                f"expected {now.num_layers}, {now.num_physical} and {now.num_logical}",
                fix="plan for the topology of the ranks that serve",
            )
        with self._changed:
            if self._lost or self._closing:
                raise CapacityError("the ranks are not together")
            if self._exchange.rank == Rebalance.LEADER and self._machine.phase:
                raise CapacityError(f"experts are being moved already: {self._machine.phase.name.lower()}")
            self._machine.offer(_digest(plan))
            self._ledger.plan[:] = plan
            self._began_s = self._clock.monotonic_s()

    def step_boundary(self) -> None:
        """Between two steps; see the module. Waits for the other ranks only if they are several steps behind.

        Raises:
            WorkerError: a rank did not take part. No step may follow.
            RuntimeError: CUDA's; likewise.
        """
        self._num_steps += 1
        if self._num_steps % self._every:
            return
        if self._lost:
            raise WorkerError("experts: the ranks are not together", fix="reconcile them, as `eplb.migrate` says")
        begin_s = self._clock.monotonic_s()
        try:
            words = [Word.unpack(part) for part in self._exchange.finish()] if self._started else []
            with self._changed:
                instructions = self._machine.decide(words) if words else []
            for instruction in instructions:
                self._follow(instruction)
            with self._changed:
                withdrawn = self._machine.withdraw()
                word = self._machine.say()
            if withdrawn is not None:
                self._follow(withdrawn)
            self._exchange.start(word.pack())
            self._started = True
        except WorkerError as error:
            self._leave(Reason.PEER_LOST, str(error))
            raise
        if self._metrics is not None:
            self._metrics.stall_s.observe(self._clock.monotonic_s() - begin_s)

    def standing(self) -> Standing:
        """What this rank knows; after `close`, for `standing.reconcile`."""
        placement, layer = self._maps.placement, self._undecided
        return Standing(
            self._machine.attempt,
            self._ledger.generations.tolist(),
            placement.physical_to_logical.tolist(),
            placement.num_logical,
            layer,
            self._plan[layer].tolist() if layer is not None else [],
        )

    def settle(self, agreed: Standing) -> None:
        """After `close`: commit what this rank had promised, if others committed it. Blocks.

        Args:
            agreed: `standing.reconcile`'s answer to this rank's standing.
        """
        if self._store.device.type == "cuda":
            torch.cuda.synchronize(self._store.device)
        layer, self._undecided = self._undecided, None
        if layer is not None and agreed.generations[layer] != self._ledger.generations[layer]:
            self._swap_in(layer)

    def close(self) -> None:
        """End. The store and the maps stay as they are. Blocks until the thread has ended, for the time-out at most.

        Idempotent. Other ranks that still exchange find this one missing.
        """
        self._leave(Reason.CLOSED, "closed")
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._hand_over.close()
        self._consumed.close()
        self._stager.interrupt()
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            logger.error("experts: the thread that moves them did not end within %s s", self._timeout_s)

    # ---- the engine's thread ----------------------------------------------------------------------------------------

    def _follow(self, instruction: Instruction) -> None:
        match instruction:
            case ReadPlan():
                self._hand_over, self._consumed = CpuGpuEvent(self._store.device), CpuGpuEvent(self._store.device)
                self._committed, self._detail = (0, 0, 0), ""
                self._began_s = self._clock.monotonic_s()
                self._order(instruction)
            case Stage():
                self._order(instruction)
            case Commit():
                self._commit(self._layers[instruction.position - 1])
            case End():
                self._conclude(instruction)
                self._order(instruction)

    def _order(self, job: ReadPlan | Stage | End) -> None:
        with self._changed:
            self._job = job
            self._changed.notify_all()
        self._stager.interrupt()

    def _commit(self, layer: int) -> None:
        stream = torch.cuda.current_stream(self._store.device) if self._store.device.type == "cuda" else None
        if self._metrics is not None:
            self._metrics.stage_s.labels("hand_over").observe(self._clock.monotonic_s() - self._ready_s)
        self._hand_over.wait(stream, self._timeout_s)
        self._swap_in(layer)
        with self._changed:
            self._owed = True
        self._consumed.record(stream)
        num_layers, num_experts, num_bytes = self._committed
        self._committed = num_layers + 1, num_experts + len(self._staged.slots), num_bytes + self._staged.num_bytes
        if self._metrics is not None:
            self._metrics.moved.inc(len(self._staged.slots))
            self._metrics.moved_bytes.inc(self._staged.num_bytes)

    def _swap_in(self, layer: int) -> None:
        self._before_swap(layer)
        # Before the weights: a peer that reads the layer from now on finds that it is another.
        self._ledger.generations[layer] += 1
        self._store.swap_in(layer, self._staged.slots)
        self._ledger.sums[layer, list(self._staged.slots)] = self._staged.sums
        self._maps.swap_in(layer)

    def _conclude(self, end: End) -> None:
        layer = self._layers[end.position - 1] if end.reason and 0 < end.position <= len(self._layers) else None
        duration_s = self._clock.monotonic_s() - self._began_s
        outcome = Outcome(end.attempt, end.reason, end.rank, layer, *self._committed, duration_s, self._detail)
        if self._metrics is not None:
            self._metrics.attempts.labels(end.reason.name.lower()).inc()
        if end.reason is Reason.DONE:
            logger.info("experts: rebalance %d: %d layers in %.2f s", end.attempt, outcome.num_layers, duration_s)
        else:
            logger.warning(
                "experts: rebalance %d ended at layer %s, which %s: %s on rank %d%s",
                end.attempt, layer, "others may have" if self._undecided is not None else "stays as it was",
                end.reason.name.lower(), end.rank, f": {self._detail}" if self._detail else "",
            )  # fmt: skip
        self._tell(outcome)

    def _leave(self, reason: Reason, why: str) -> None:
        """Take no further part in exchanges."""
        if self._lost:
            return
        self._lost = True
        with self._changed:
            promised = self._machine.promised
            self._undecided = self._layers[promised - 1] if promised else None
            ends = self._machine.leave(reason)
            if ends:
                self._detail = why
        for end in ends:
            self._follow(end)

    # ---- the thread that stages -------------------------------------------------------------------------------------

    def _run(self) -> None:
        device = self._store.device
        stream = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                while True:
                    with self._changed:
                        self._changed.wait_for(lambda: self._job is not None or self._closing)
                        job, self._job = self._job, None
                        if self._closing:
                            return
                    assert job is not None
                    self._try(job, stream)
        finally:
            self._peers.close()
            self._ledger.buffer.close()
            self._landing.close()

    def _try(self, job: ReadPlan | Stage | End, stream: torch.cuda.Stream | None) -> None:
        """Do a job. Whatever goes wrong ends the attempt, not the thread."""

        def wanted() -> bool:
            with self._changed:
                return self._job is None and not self._closing

        began_s = self._clock.monotonic_s()
        try:
            match job:
                case ReadPlan():
                    self._read_plan(job, began_s + self._timeout_s, wanted)
                    stage, position = "plan", 0
                case Stage():
                    self._stage(job, began_s + self._timeout_s, wanted, stream)
                    stage, position = "stage", job.position
                case End():
                    self._let_go(stream)
                    with self._changed:
                        self._machine.freed(job.attempt)
                    return
            self._ready_s = self._clock.monotonic_s()
            if self._metrics is not None:
                self._metrics.stage_s.labels(stage).observe(self._ready_s - began_s)
            with self._changed:
                self._machine.ready(job.attempt, position, len(self._layers))
        except StageError as error:
            self._fail(job.attempt, error.reason, str(error))
        except PlacementError as error:
            self._fail(job.attempt, Reason.PLAN, str(error))
        except Exception as error:  # noqa: BLE001
            logger.exception("experts: the thread that moves them failed")
            self._fail(job.attempt, Reason.EXCEPTION, f"{type(error).__name__}: {error}")

    def _fail(self, attempt: int, reason: Reason, detail: str) -> None:
        with self._changed:
            if self._machine.attempt == attempt and self._machine.active:
                self._detail = detail
            self._machine.failed(attempt, reason)

    def _read_plan(self, job: ReadPlan, deadline_s: float, wanted: Callable[[], bool]) -> None:
        plan = self._stager.read_plan(Rebalance.LEADER, deadline_s, wanted)
        if _digest(plan) != job.digest:
            raise PlacementError(f"the leader's plan has the digest {_digest(plan):016x}, expected {job.digest:016x}")
        now = self._maps.placement
        Placement.from_physical(plan, now.num_logical)
        self._plan, self._layers = plan, changed_layers(now.physical_to_logical, plan)

    def _stage(
        self, job: Stage, deadline_s: float, wanted: Callable[[], bool], stream: torch.cuda.Stream | None
    ) -> None:
        self._let_go(stream)
        layer = self._layers[job.position - 1]
        moves = plan_moves(self._maps.placement.physical_to_logical[layer], self._plan[layer], self._topology)
        self._maps.stage(layer, self._plan[layer])
        self._staged = self._stager.stage(layer, moves[self._exchange.rank], self._checksums, deadline_s, wanted)
        self._hand_over.record(stream)

    def _let_go(self, stream: torch.cuda.Stream | None) -> None:
        """Return when nothing reads or writes the staging memory, or has yet to write what was committed."""
        with self._changed:
            owed, self._owed = self._owed, False
        if owed:
            self._consumed.wait(stream, self._timeout_s)
            if stream is not None:
                stream.synchronize()  # reads from peers know nothing of streams

        def open_() -> bool:
            with self._changed:
                return not self._closing

        self._stager.drain(open_)


def _digest(plan: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(plan).tobytes(), digest_size=8).digest(), "little")
