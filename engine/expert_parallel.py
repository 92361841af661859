"""Ranks that have different experts of one model, and requests of their own (Lepikhin et al. 2020, arXiv:2006.16668).

Attention is each rank's own affair. In a layer with experts every token goes to the ranks that have the experts it was
routed to, and what they make of it comes back. This takes all ranks: before a step they agree whether there is one, and
who has nothing to compute in it takes part with no tokens.

There are three forms. Exact sends each token where it goes and nothing else, for which the hosts tell each other how
many rows to expect. Fixed sends everybody's tokens to everybody in buffers of one size: it costs more bytes, its shapes
depend on nothing, and no host waits. Direct stands in for fixed between GPUs that can write into each other's memory:
each token goes where it must, no host waits, and CUDA graphs record it (`kernels.expert_exchange`).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.config_experts import ExpertsConfig
from ..core.errors import ConfigError, WorkerError
from ..core.log import logger
from ..eplb.exchange import TorchExchange
from ..eplb.maps import ExpertMaps
from ..eplb.placement import Topology
from ..eplb.store import ExpertLayout, ExpertStore
from ..kernels import exchange_oracle
from ..kernels.device import describe
from ..kernels.expert_exchange import POLLS, Arrived, Buffers, Exchange
from ..kernels.expert_weights import ExpertWeights
from ..kernels.moe_oracle import KERNELS, ExpertsSpec, Kernel, select
from ..kernels.peer_memory import PeerMemory
from .batch import ladder
from .expert_balancer import Boundary, compare_placements, first_placement
from .models.spec import ModelSpec
from .tensor_parallel import TorchGroup

STALL_S = 25.0
"""A rank that has been waited for so long has failed."""

_START_S = 600.0
"""While ranks read and compile, they wait longer."""

# torch 2.13 renamed it.
_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class StepSize(IntEnum):
    """What a rank has to compute next; the ranks do the most that one of them asks for."""

    NOTHING = 0
    FEW = 1
    """At most as many tokens as a fixed buffer has rows."""
    MANY = 2


class ExpertPlace(NamedTuple):
    """A rank's place among those that share the experts of a model."""

    rank: int
    size: int
    meet: Callable[[], str]
    """Blocks until all ranks are about to join, and says where: a rendezvous for `ExpertGroup.join`."""
    ranks: TorchGroup | None = None
    """All ranks, where they have met already: some of them share layers, too."""
    learned: bytes = b""
    """What the group before this one left (`Learned`), the same for all ranks; empty: there was none."""


class Sent(NamedTuple):
    """Tokens that came here in the exact form, and what is needed to send the outcome back."""

    x: Tensor
    """[rows, hidden]"""
    weights: Tensor
    """[rows, top_k] float32"""
    ids: Tensor
    """[rows, top_k] int64, this rank's experts; −1 for others'."""
    tokens: Tensor
    """[sent rows] int64, which own token each row was that went out."""
    num_tokens: int
    sent: list[int]
    """Rows that went to each rank."""
    received: list[int]


class Placed(NamedTuple):
    """Tokens that came here in the fixed form, each expert's in rows of its own."""

    x: Tensor
    """[local experts, ranks · rows, hidden]"""
    counts: Tensor
    """[local experts] int64, how many of the rows are tokens."""
    places: Tensor
    """[local experts, ranks · rows] int64, the row that each token has if it is this expert's."""
    weights: Tensor
    """[local experts, ranks · rows] float32; 0 for tokens that are not this expert's."""
    num_tokens: int


class ExpertGroup:
    """A rank's end. Every operation from `join` on blocks until all ranks have called it, in the same order.

    Args:
        rank: of this process, in 0 … ``size`` − 1.
        topology: of the slots; says how many share the experts.
        maps: who has what.
        movable: whether experts may come to lie elsewhere; then they are kept in memory that peers can read.
        fixed_rows: tokens of a rank that a fixed buffer holds; 0: there is no fixed form.
        batched: computes what comes in the fixed form.
        buffers: for the direct form, where it is wanted.
        tensor_parallel: so many neighbours among the ranks share layers, and so have the same tokens, of which each
            sends off a part.

    Attributes:
        loads: [layers, local experts] int64, tokens that came to each, which nobody sets back here.
        fixed: whether the step has the fixed form, or the direct one.
        rows: of every rank, in such a step.
        direct: a rank's end of the direct form, where it serves.
        why_not_direct: why it does not, where it was wanted.
        store: the experts, where they are movable and have been made.
        boundary: called between two steps, empty ones too, with whether the next has work for any rank.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        maps: ExpertMaps,
        *,
        movable: bool = False,
        fixed_rows: int = 0,
        batched: Kernel | None = None,
        buffers: Buffers | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        self.rank, self.size = rank, topology.num_ranks
        self.topology = topology
        self.maps = maps
        self.movable = movable
        self.store: ExpertStore | None = None
        self.boundary: Boundary = lambda has_work: None
        self.fixed_rows = fixed_rows
        self.batched = batched
        self.buffers = buffers
        self.tensor_parallel = tensor_parallel
        self.fixed = False
        self.rows = 0
        self.direct: Exchange | None = None
        self.why_not_direct = ""
        self._memory: PeerMemory | None = None
        self.loads = torch.zeros(
            maps.placement.num_layers, maps.num_local, dtype=torch.int64, device=maps.choices.device
        )
        self._ranks: TorchGroup | None = None
        self._hosts: dist.ProcessGroup | None = None
        self._group: dist.ProcessGroup | None = None

    def join(self, rendezvous: str, device: torch.device) -> None:
        """Meet the others; see `TorchGroup`. Ranks may now be late by minutes: they compile.

        Raises:
            WorkerError: a rank did not come.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.take(meet(self.rank, self.size, rendezvous, device), device)

    def take(self, ranks: TorchGroup, device: torch.device) -> None:
        """`join` those who have met."""
        self._ranks = ranks
        if self.buffers is not None and device.type == "cuda":
            try:
                self._memory = PeerMemory(self.buffers.num_bytes, self.rank, device, self._ranks.exchange)
            except ConfigError as error:
                self.why_not_direct = str(error)
                logger.warning("experts' tokens are not exchanged through peers' memory: %s", error)
            else:
                # Meanwhile others compile kernels.
                polls = POLLS * int(_START_S / STALL_S)
                self.direct = Exchange(self.rank, self._memory.addresses, self._memory.own(), self.buffers, polls=polls)

    def serve(self) -> None:
        """From now on a rank that does not come within `STALL_S` has failed.

        Raises:
            ConfigError: a rank places the experts otherwise.
            WorkerError: a rank did not come.
        """
        assert self._ranks is not None, "nobody has been met"
        self._ranks.barrier()
        if self.direct is not None:
            self.direct.polls.fill_(POLLS)
        self._hosts = dist.new_group(timeout=timedelta(seconds=STALL_S), backend="gloo")
        if self.loads.device.type == "cpu":  # NCCL has connected the GPUs, and watches over them itself
            self._group = self._hosts
        compare_placements(self.exchange(), self.maps.placement)

    def exchange(self) -> TorchExchange:
        """Another way to tell each other something; all ranks make theirs together, once they `serve`."""
        group = dist.new_group(timeout=timedelta(seconds=STALL_S), backend="gloo")
        assert group is not None
        return TorchExchange(group, STALL_S)

    def house(self, layers: Sequence[ExpertWeights]) -> list[ExpertWeights]:
        """Memory for the experts of all layers, where peers can read it.

        Args:
            layers: as they are to be, on no device ("meta").

        Raises:
            ConfigError: layers have experts of different kinds.
        """
        layouts = {ExpertLayout.of(weights.tensors(), len(layers)) for weights in layers}
        if len(layouts) > 1:
            raise ConfigError(
                "experts.balance: the experts of some layers are quantised otherwise than those of others, and cannot "
                "be moved",
                fix="experts.balance.enabled: false leaves them where they are",
            )
        self.store = ExpertStore(layouts.pop(), self.loads.device)
        return [weights.over(live) for weights, live in zip(layers, self.store.live, strict=True)]

    def part(self, num_tokens: int) -> slice:
        """Which of its tokens a rank routes and sends off; others that share its layers have the rest."""
        each = -(-num_tokens // self.tensor_parallel)
        first = min(self.rank % self.tensor_parallel * each, num_tokens)
        return slice(first, min(first + each, num_tokens))

    def work_of(self, num_tokens: int) -> StepSize:
        """How a step of so many tokens is announced."""
        return StepSize.FEW if num_tokens <= self.fixed_rows else StepSize.MANY

    def agree(self, work: StepSize, num_tokens: int = 0) -> StepSize:
        """What all do next; this rank's part of it is of so many tokens.

        Raises:
            WorkerError: a rank did not take part.
        """
        most = torch.tensor([int(work), num_tokens])
        self._do("agreeing on a step", lambda: dist.all_reduce(most, dist.ReduceOp.MAX, group=self._hosts))
        agreed = StepSize(int(most[0]))
        self.fixed = agreed is StepSize.FEW
        if self.fixed:
            self.rows = next(size for size in ladder(self.fixed_rows) if int(most[1]) <= size)
            if self.direct is not None:
                own = self.part(num_tokens)
                self.direct.live.fill_(own.stop - own.start)
        self.boundary(agreed is not StepSize.NOTHING)
        return agreed

    def record(self, rows: int, slots: Tensor) -> None:
        """A graph of a step of so many rows is being recorded, or prepared.

        Args:
            rows: of every rank.
            slots: [rows] int64, negative where a row is no token but fills up.
        """
        assert self.direct is not None, "no other form can be recorded"
        self.fixed, self.rows = True, rows
        own = self.part(rows)
        self.direct.live.copy_((slots[own] >= 0).sum(0, keepdim=True))

    def check(self) -> None:
        """Does not wait. To be asked when a step's results are there.

        Raises:
            WorkerError: on the device, a rank did not take part; what was computed since is NaN.
        """
        missing = self.direct.missing() if self.direct is not None else []
        if missing:
            raise WorkerError(
                f"rank {self.rank} of {self.size} that share experts waited in vain for rank "
                f"{', '.join(map(str, missing))}",
                fix="the rank that failed says why in its own log; all of them start anew",
            )

    def dispatch(self, layer: int, x: Tensor, weights: Tensor, ids: Tensor) -> Sent:
        """Send tokens to their experts' ranks, once to each, and take what comes here.

        Args:
            layer: number among those with experts.
            x: [tokens, hidden].
            weights: [tokens, top_k] float32.
            ids: [tokens, top_k] experts.

        Raises:
            WorkerError: a rank did not take part.
        """
        slots = self.maps.slots(layer, ids)
        owners, num_local = slots // self.maps.num_local, self.maps.num_local
        every = torch.arange(self.size, device=x.device)
        goes = (owners.unsqueeze(0) == every.view(-1, 1, 1)).any(-1)
        to, tokens = goes.nonzero(as_tuple=True)
        own = torch.where(owners[tokens] == to.unsqueeze(1), slots[tokens] % num_local, -1)
        rows = _pack(x[tokens], weights[tokens], own)
        counts = goes.sum(1)
        arriving = torch.empty_like(counts)
        self._do("counting rows", lambda: dist.all_to_all_single(arriving, counts, group=self._group))
        sent, received = counts.tolist(), arriving.tolist()
        came = self._exchange(rows, sent, received)
        got, got_weights, got_ids = _unpack(came, x.shape[1], ids.shape[1], x.dtype)
        self._count(layer, got_ids)
        return Sent(got, got_weights, got_ids, tokens, len(x), sent, received)

    def combine(self, out: Tensor, sent: Sent) -> Tensor:
        """Send each row's weighted sum over this rank's experts back, and add up what comes: [tokens, hidden].

        Args:
            out: [rows, hidden], of the rows that `dispatch` brought.
            sent: what it told.

        Raises:
            WorkerError: a rank did not take part.
        """
        back = self._exchange(_bytes(out), sent.received, sent.sent).view(out.dtype)
        total = torch.zeros(sent.num_tokens, out.shape[1], dtype=out.dtype, device=out.device)
        return total.index_add_(0, sent.tokens, back)

    def dispatch_fixed(self, layer: int, x: Tensor, weights: Tensor, ids: Tensor) -> Placed:
        """`dispatch` in the fixed form, for at most ``fixed_rows`` tokens. Shapes depend on nothing but that.

        Raises:
            WorkerError: a rank did not take part.
        """
        num_tokens, top_k = ids.shape
        rows = _pack(x, weights, self.maps.slots(layer, ids))
        # Nobody's slot is negative.
        mine = torch.full((self.fixed_rows, rows.shape[1]), 0xFF, dtype=torch.uint8, device=x.device)
        mine[:num_tokens] = rows
        every = torch.empty(self.size * self.fixed_rows, rows.shape[1], dtype=torch.uint8, device=x.device)
        self._do("sending tokens", lambda: _gather(every, mine, group=self._group))
        got, got_weights, slots = _unpack(every, x.shape[1], top_k, x.dtype)
        first, num_local = self.rank * self.maps.num_local, self.maps.num_local
        local = torch.where((slots >= first) & (slots < first + num_local), slots - first, -1)
        self._count(layer, local)
        each = local.unsqueeze(0) == torch.arange(num_local, device=x.device).view(-1, 1, 1)
        theirs = each.any(-1)
        places = (theirs.cumsum(1) - 1).clamp(min=0)
        order = theirs.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        share = torch.where(each, got_weights.unsqueeze(0), 0.0).sum(-1)
        return Placed(got[order], theirs.sum(1), places, share, num_tokens)

    def combine_fixed(self, out: Tensor, placed: Placed) -> Tensor:
        """`combine` in the fixed form; ``out`` [local experts, ranks · rows, hidden], not weighted.

        Raises:
            WorkerError: a rank did not take part.
        """
        places = placed.places.unsqueeze(-1).expand(-1, -1, out.shape[2])
        share = placed.weights.unsqueeze(-1).to(out.dtype)
        # Rows that are no tokens hold anything, even what is not a number.
        partial = torch.where(share != 0, out.gather(1, places) * share, 0.0).sum(0, dtype=out.dtype)
        back = torch.empty_like(partial)
        source, target = _bytes(partial), back.view(torch.uint8)
        self._do("sending tokens back", lambda: dist.all_to_all_single(target, source, group=self._group))
        return back.view(self.size, self.fixed_rows, -1).sum(0)[: placed.num_tokens]

    def dispatch_direct(
        self, direct: Exchange, layer: int, x: Tensor, weights: Tensor, ids: Tensor
    ) -> tuple[Arrived, Tensor]:
        """`dispatch` in the direct form: what came, and what `combine_direct` needs to know of this rank's tokens. A
        rank that does not take part is told by `check`."""
        slots = self.maps.slots(layer, ids)
        return direct.dispatch(x, weights, slots, self._rank_rows), slots

    def combine_direct(self, direct: Exchange, layer: int, out: Tensor, slots: Tensor) -> Tensor:
        """`combine` in the direct form; ``out`` as `Exchange.combine` takes it."""
        return direct.combine(out, slots, self._rank_rows, self.loads[layer])

    def close(self) -> None:
        """Leave, all ranks together. After an error a process should end instead."""
        self.direct = None
        if self._memory is not None:
            torch.cuda.synchronize()
            with contextlib.suppress(WorkerError):
                self._memory.close()
            self._memory = None
        if self._ranks is not None:
            self._ranks.close()

    @property
    def _rank_rows(self) -> int:
        return -(-self.rows // self.tensor_parallel)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        came = torch.empty(sum(received), rows.shape[1], dtype=rows.dtype, device=rows.device)
        self._do("exchanging rows", lambda: dist.all_to_all_single(came, rows, received, sent, group=self._group))
        return came

    def _count(self, layer: int, ids: Tensor) -> None:
        """Of this rank's experts; rows that only fill a buffer up, and others' experts, count for nobody."""
        flat = ids.flatten()
        self.loads[layer].index_add_(0, flat.clamp(min=0), (flat >= 0).to(torch.int64))

    def _do(self, what: str, operation: Callable[[], object]) -> None:
        try:
            operation()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            raise WorkerError(
                f"rank {self.rank} of {self.size} that share experts: {what} failed: "
                f"{reason[0] if reason else type(error).__name__}",
                fix="the rank that failed says why in its own log; all of them start anew",
            ) from error


def open_rendezvous(address: str) -> str:
    """Where others may join a group whose first rank is this process, which listens when it joins.

    Args:
        address: of this host.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def meet(rank: int, size: int, rendezvous: str, device: torch.device) -> TorchGroup:
    """All ranks that share experts, which may be late by minutes: they read weights, and compile.

    Raises:
        WorkerError: a rank did not come.
    """
    return TorchGroup(rank, size, rendezvous, device, timeout_s=_START_S, direct=False)


def make_group(
    place: ExpertPlace,
    spec: ModelSpec,
    experts: ExpertsSpec | None,
    config: ExpertsConfig,
    device: torch.device,
    rows: int,
    tensor_parallel: int = 1,
) -> ExpertGroup:
    """A rank's end for a model, which has not met the others yet.

    Args:
        place: of this rank.
        spec: of the model.
        experts: what it asks of its kernel.
        config: slots beyond one for each expert, and whether they change hands.
        device: of this rank.
        rows: tokens of a rank that a fixed buffer is to hold, where the device computes in that form.
        tensor_parallel: neighbouring ranks that share layers.

    Raises:
        ConfigError: the model has no experts, or they cannot be divided.
    """
    if spec.moe is None or experts is None:
        raise ConfigError(
            f"experts.parallel: {place.size} workers are to share experts, and {spec.architecture} has none",
            fix="leave out experts.parallel",
        )
    numbers = len(spec.moe_layers), spec.moe.num_experts, place.size
    placement, topology = first_placement(*numbers, config, spec.moe.num_groups, place.learned)
    maps = ExpertMaps(placement, topology, place.rank, device)
    movable = config.balanced
    if device.type == "cpu":  # bytes cost more than waiting
        return ExpertGroup(place.rank, topology, maps, movable=movable, tensor_parallel=tensor_parallel)
    batched = KERNELS[select(experts._replace(format="batched"), describe(device)).backend]
    each = -(-rows // tensor_parallel)
    buffers = Buffers(place.size, each, spec.hidden, spec.moe.top_k, maps.num_local, experts.dtype)
    wanted = exchange_oracle.select(experts, describe(device)).backend == "peer_memory"
    return ExpertGroup(
        place.rank,
        topology,
        maps,
        movable=movable,
        fixed_rows=rows,
        batched=batched,
        buffers=buffers if wanted else None,
        tensor_parallel=tensor_parallel,
    )


def _pack(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """[rows, bytes] uint8: a message a row."""
    return torch.cat([_bytes(part) for part in (x, weights, ids.to(torch.int32))], dim=1)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of each row. Torch views no tensor without rows whose strides are another library's."""
    if not len(x):
        return torch.empty(0, x.shape[1] * x.element_size(), dtype=torch.uint8, device=x.device)
    return x.contiguous().view(torch.uint8)


def _unpack(rows: Tensor, hidden: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, weights, ids = rows.split([hidden * dtype.itemsize, 4 * top_k, 4 * top_k], dim=1)
    return (
        x.contiguous().view(dtype),
        weights.contiguous().view(torch.float32),
        ids.contiguous().view(torch.int32).to(torch.int64),
    )
