"""Tokens to the ranks of a host that have their experts, and back: each rank writes into its peers' memory.

For decode steps, whose few rows a library's all-to-all moves in more time than the wires need. Every rank lays the same
buffers open (`peer_memory`). `Exchange.dispatch` writes each token's row once to each rank that has one of its experts,
beside its weights and the experts' numbers there, and then tells everybody; what came lies where the experts' kernels
read it. `Exchange.combine` sums what a rank's experts say of a token, and writes the sum back where it came from. No
host waits, and launches depend on nothing but the number of rows, so that CUDA graphs can record them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .on_gpu import kernel, kernel_varying, next_power_of_2, tl

PROGRAMS = 128
"""That write at a time. Fewer than any GPU of interest has multiprocessors."""

_BLOCK = 2048
_FLAG_BYTES = 8
_ALIGNMENT = 128
POLLS = 20_000_000
"""How often a program looks for its peers before it gives up: some tens of seconds."""


class Buffers(NamedTuple):
    """Of what size the buffers are; equal on all ranks.

    Args:
        size: ranks.
        rows: tokens of a rank at a time, at most.
        hidden: numbers of a token.
        top_k: experts of a token.
        num_local: slots for experts of a rank: slot s is number s mod ``num_local`` of rank s div ``num_local``.
        dtype: of tokens.
    """

    size: int
    rows: int
    hidden: int
    top_k: int
    num_local: int
    dtype: torch.dtype

    @property
    def places(self) -> tuple[int, int, int, int, int]:
        """Where tokens, weights, experts' numbers, sums that come back, and flags begin, in bytes."""
        tokens = self.size * self.rows
        starts, at = [], 0
        for size in (
            tokens * self.hidden * self.dtype.itemsize,
            tokens * self.top_k * 4,
            tokens * self.top_k * 4,
            tokens * self.hidden * self.dtype.itemsize,
        ):
            starts.append(at)
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        return starts[0], starts[1], starts[2], starts[3], at

    @property
    def num_bytes(self) -> int:
        """Of what each rank lays open."""
        return self.places[-1] + 2 * self.size * _FLAG_BYTES


class Arrived(NamedTuple):
    """What came to a rank, in its own memory, until the next `Exchange.dispatch`. Of rank r come the r-th ``rows``."""

    x: Tensor
    """[ranks · rows, hidden]; undefined where nothing came."""
    weights: Tensor
    """[ranks · rows, top_k] float32"""
    ids: Tensor
    """[ranks · rows, top_k] int32, this rank's experts; −1 for others', and where nothing came."""


def reference_dispatch(x: Sequence[Tensor], weights: Sequence[Tensor], slots: Sequence[Tensor], rank: int,
                       rows: int, num_local: int) -> Arrived:  # fmt: skip
    """What comes to a rank.

    Args:
        x: [tokens, hidden], each rank's; at most ``rows`` tokens.
        weights: [tokens, top_k] float32 likewise.
        slots: [tokens, top_k] likewise.
        rank: which.
        rows: for which there is room.
        num_local: slots of a rank.
    """
    hidden, top_k = x[0].shape[1], slots[0].shape[1]
    arrived = Arrived(
        x[0].new_zeros(len(x), rows, hidden),
        weights[0].new_zeros(len(x), rows, top_k),
        torch.full((len(x), rows, top_k), -1, dtype=torch.int32, device=x[0].device),
    )
    for source, (tokens, shares, chosen) in enumerate(zip(x, weights, slots, strict=True)):
        ids = torch.where(chosen // num_local == rank, chosen % num_local, -1)
        comes = (ids >= 0).any(1, keepdim=True)
        arrived.x[source, : len(tokens)] = torch.where(comes, tokens, 0)
        arrived.weights[source, : len(tokens)] = shares
        arrived.ids[source, : len(tokens)] = ids
    return Arrived(*(part.flatten(0, 1) for part in arrived))


def reference_combine(parts: Sequence[Tensor], slots: Tensor, num_local: int) -> Tensor:
    """Add up what the ranks' experts say of some tokens: in float32, in the order of ranks.

    Args:
        parts: [tokens, hidden], of each rank, of the tokens that it has experts of; anything for others.
        slots: [tokens, top_k].
        num_local: slots of a rank.
    """
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for rank, part in enumerate(parts):
        has = (slots // num_local == rank).any(1, keepdim=True)
        total += torch.where(has, part, 0)
    return total.to(parts[0].dtype)


class Exchange:
    """A rank's end. Its operations run on one stream at a time; all ranks do the same ones in the same order, with the
    same number of rows.

    Args:
        rank: this one.
        addresses: where this process sees each rank's `Buffers.num_bytes`, in the order of ranks. They were zero when
            the last of them was mapped.
        own: [bytes] uint8, this rank's.
        buffers: of what size they are.
        programs: that write at a time; equal on all ranks.
        polls: how often to look for a peer before it is given up.

    Attributes:
        live: [1] int32, how many of this rank's tokens there are; rows beyond go nowhere. On the device, so that a
            recorded launch serves any number.
        polls: [1] int64, as given, likewise.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[int],
        own: Tensor,
        buffers: Buffers,
        programs: int = PROGRAMS,
        polls: int = POLLS,
    ) -> None:
        device = own.device
        self.rank = rank
        self.buffers = buffers
        self.programs = programs
        self.polls = torch.tensor([polls], dtype=torch.int64, device=device)
        self.live = torch.zeros(1, dtype=torch.int32, device=device)
        self.memory = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.told_so_far = torch.zeros(2, dtype=torch.int64, device=device)
        self.gave_up = torch.zeros(1, dtype=torch.int32, device=device)
        # The host reads this without waiting for the device.
        self.told = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._own = own

    def missing(self) -> list[int]:
        """The ranks for which this one waited in vain. From then on, what it combines is NaN."""
        bits = int(self.told[0])
        return [rank for rank in range(self.buffers.size) if bits >> rank & 1]

    def dispatch(self, x: Tensor, weights: Tensor, slots: Tensor, rows: int) -> Arrived:
        """Write tokens to their experts' ranks, and wait, on the device, for what comes here.

        A rank whose peers do not come gives up after ``polls`` looks; see `missing`.

        Args:
            x: [tokens, hidden], of which the first `live` go anywhere.
            weights: [tokens, top_k] float32, contiguous.
            slots: [tokens, top_k] integers, contiguous.
            rows: of every rank; at least its tokens, and at most as many as the buffers have room for.
        """
        size, most, hidden, top_k, num_local, dtype = self.buffers
        assert len(x) <= rows <= most and x.dtype == dtype and x.stride(1) == 1, "not what the buffers are made for"  # noqa: PT018
        block = min(_BLOCK, next_power_of_2(hidden))
        _dispatch_kernel[(self.programs,)](
            x, weights, slots, self.live, self.memory, self.told_so_far, self.gave_up, self.told, self.rank, self.polls,
            rows, hidden, x.stride(0), num_local, *self._constants(), block, num_warps=8,
        )  # fmt: skip
        tokens = size * rows
        at = self.buffers.places
        return Arrived(
            self._view(at[0], tokens, hidden, dtype),
            self._view(at[1], tokens, top_k, torch.float32),
            self._view(at[2], tokens, top_k, torch.int32),
        )

    def combine(self, out: Tensor, slots: Tensor, rows: int, loads: Tensor) -> Tensor:
        """Send what this rank's experts say of what came, and add up what the others' say of this rank's tokens.

        Args:
            out: [ranks · rows, hidden], or [ranks · rows, top_k, hidden] to be summed up; in both cases weighted, and
                anything where there is no expert.
            slots: as given to `dispatch`.
            rows: likewise.
            loads: [num_local] int64, to which what came for each of this rank's experts is added.

        Returns:
            [tokens, hidden]; zero beyond `live`, NaN after a rank was missed.
        """
        size, _, hidden, top_k, num_local, dtype = self.buffers
        assert out.is_contiguous() and out.dtype == dtype, "not what the buffers are made for"  # noqa: PT018
        block = min(_BLOCK, next_power_of_2(hidden))
        _combine_kernel[(self.programs,)](
            out, loads, self.memory, self.told_so_far, self.gave_up, self.told, self.rank, self.polls, rows, hidden,
            out.dim() == 3, *self._constants(), block, num_warps=8,
        )  # fmt: skip
        total = torch.empty(len(slots), hidden, dtype=dtype, device=out.device)
        if len(slots):
            _sum_kernel[(len(slots), -(-hidden // block))](
                total, slots, self.live, self._own, self.gave_up, rows, hidden, num_local, self.buffers.places[3],
                size, top_k, next_power_of_2(top_k), block, num_warps=4,
            )  # fmt: skip
        return total

    def _constants(self) -> tuple[int, ...]:
        size, top_k = self.buffers.size, self.buffers.top_k
        _, *at = self.buffers.places
        return size, next_power_of_2(size), top_k, next_power_of_2(top_k), *at, _FLAG_BYTES

    def _view(self, start: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self._own[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


# Why one buffer of each kind suffices, and no rank overwrites what another still reads. A rank writes in dispatch n
# when its combine n − 1 has ended, for which every peer had told of its own combine n − 1: each of a peer's programs
# tells all ranks when it has read everything that it reads of what came in dispatch n − 1, and the kernels between had
# ended before it began. A rank writes in combine n when its dispatch n has ended, for which every peer had told of its
# dispatch n, which began after it had added up what came in combine n − 1. So each exchange is the receipt of the one
# before, and recorded kernels find what came where it always lies.
@kernel
def _dispatch_kernel(  # type: ignore[no-untyped-def]
    x, weights, slots, live, memory, told_so_far, gave_up, told, rank, polls, rows, hidden, x_stride, num_local,
    SIZE: tl.constexpr, PEERS: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, WEIGHTS_AT: tl.constexpr,
    IDS_AT: tl.constexpr, SUMS_AT: tl.constexpr, FLAGS_AT: tl.constexpr, FLAG_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    element: tl.constexpr = x.dtype.element_ty
    # Who has given up falls silent: a peer that comes late must not take later data for that of its call.
    before = tl.load(gave_up)
    takes_part = before == 0
    peer, choice = tl.arange(0, PEERS), tl.arange(0, CHOICES)
    exists = peer < SIZE
    address = tl.load(memory + peer, mask=exists, other=0)
    alive = tl.load(live)
    parts = tl.cdiv(hidden, BLOCK)
    for item in range(program, tl.where(takes_part, rows * parts, 0), programs):
        row, part = item // parts, item % parts
        chosen = (choice < TOP_K) & (row < alive)
        slot = tl.load(slots + row * TOP_K + choice, mask=chosen, other=-1).to(tl.int32)
        owner = tl.where(slot >= 0, slot // num_local, -1)
        place = (rank * rows + row).to(tl.int64)
        if part == 0:
            share = tl.load(weights + row * TOP_K + choice, mask=chosen, other=0.0)
            own = tl.where(owner[None, :] == peer[:, None], (slot % num_local)[None, :], -1)
            at = address[:, None] + (place * TOP_K + choice)[None, :] * 4
            inside = exists[:, None] & (choice < TOP_K)[None, :]
            tl.store((at + IDS_AT).to(tl.pointer_type(tl.int32)), own, mask=inside)
            both = tl.broadcast_to(share[None, :], (PEERS, CHOICES))
            tl.store((at + WEIGHTS_AT).to(tl.pointer_type(tl.float32)), both, mask=inside)
        column = part * BLOCK + tl.arange(0, BLOCK)
        held = (column < hidden) & (row < alive)
        value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=held, other=0.0)
        for step in tl.static_range(SIZE):
            other = (rank + step) % SIZE  # not all to one rank at a time
            wanted = tl.sum((owner == other).to(tl.int32), axis=0) > 0
            target = tl.load(memory + other).to(tl.pointer_type(element))
            tl.store(tl.multiple_of(target, 16) + place * hidden + column, value, mask=held & wanted)
    _tell_and_wait(
        address, told_so_far, gave_up, told, before, rank, polls, FLAGS_AT, 0, SIZE, PEERS, FLAG_BYTES
    )  # fmt: skip


@kernel_varying("loads")
def _combine_kernel(  # type: ignore[no-untyped-def]
    out, loads, memory, told_so_far, gave_up, told, rank, polls, rows, hidden, EACH: tl.constexpr, SIZE: tl.constexpr,
    PEERS: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, WEIGHTS_AT: tl.constexpr, IDS_AT: tl.constexpr,
    SUMS_AT: tl.constexpr, FLAGS_AT: tl.constexpr, FLAG_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    element: tl.constexpr = out.dtype.element_ty
    before = tl.load(gave_up)
    takes_part = before == 0
    peer, choice = tl.arange(0, PEERS), tl.arange(0, CHOICES)
    address = tl.load(memory + peer, mask=peer < SIZE, other=0)
    ids = (tl.load(memory + rank) + IDS_AT).to(tl.pointer_type(tl.int32))
    parts = tl.cdiv(hidden, BLOCK)
    for item in range(program, tl.where(takes_part, SIZE * rows * parts, 0), programs):
        part = item % parts
        source, row = (item // parts + rank) % SIZE, item // parts // SIZE
        token = (source * rows + row).to(tl.int64)
        own = tl.load(ids + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
        tl.atomic_add(loads + own, tl.full((CHOICES,), 1, tl.int64), mask=(own >= 0) & (part == 0), sem="relaxed")
        if tl.max(own, axis=0) >= 0:
            column = part * BLOCK + tl.arange(0, BLOCK)
            held = column < hidden
            total = tl.zeros((BLOCK,), tl.float32)
            if EACH:
                for k in tl.static_range(TOP_K):
                    here = tl.max(tl.where(choice == k, own, -1), axis=0) >= 0
                    value = tl.load(out + (token * TOP_K + k) * hidden + column, mask=held & here, other=0.0)
                    total += value.to(tl.float32)
            else:
                total += tl.load(out + token * hidden + column, mask=held, other=0.0).to(tl.float32)
            target = (tl.load(memory + source) + SUMS_AT).to(tl.pointer_type(element))
            place = (rank * rows + row).to(tl.int64) * hidden
            tl.store(tl.multiple_of(target, 16) + place + column, total.to(element), mask=held)
    _tell_and_wait(
        address, told_so_far, gave_up, told, before, rank, polls, FLAGS_AT, 1, SIZE, PEERS, FLAG_BYTES
    )  # fmt: skip


@kernel
def _tell_and_wait(  # type: ignore[no-untyped-def]
    address, told_so_far, gave_up, told, before, rank, polls, FLAGS_AT: tl.constexpr, KIND: tl.constexpr,
    SIZE: tl.constexpr, PEERS: tl.constexpr, FLAG_BYTES: tl.constexpr,
):  # fmt: skip
    """Each program counts one up with every rank; the last one waits for as many from everybody. Those that are still
    to be started need no room that it takes, as it has come last."""
    peer = tl.arange(0, PEERS)
    exists = peer < SIZE
    takes_part = before == 0
    flags = FLAGS_AT + KIND * (SIZE * FLAG_BYTES)
    tl.debug_barrier()  # every thread's part is written before one of them tells of it
    theirs = (address + flags + rank * FLAG_BYTES).to(tl.pointer_type(tl.int64))
    one = tl.full((PEERS,), 1, tl.int64)
    tl.atomic_add(theirs, one, mask=exists & takes_part, sem="release", scope="sys")
    if tl.program_id(0) == tl.num_programs(0) - 1:
        # Counted here and not by the host: a recorded launch counts on when it is replayed.
        target = tl.load(told_so_far + KIND) + tl.num_programs(0)
        own = tl.sum(tl.where(peer == rank, address, 0), axis=0)
        ours = (own + flags).to(tl.pointer_type(tl.int64)) + peer
        waiting = tl.where(takes_part, (1 << SIZE) - 1, before)
        left = tl.where(takes_part, tl.load(polls), 0)
        while (waiting != 0) & (left > 0):
            seen = tl.atomic_add(ours, tl.zeros((PEERS,), tl.int64), mask=exists, sem="acquire", scope="sys")
            waiting = tl.sum(tl.where(exists & (seen < target), 1 << peer, 0), axis=0)
            left -= 1
        tl.store(told_so_far + KIND, target)
        if (waiting != 0) & takes_part:
            tl.store(gave_up, waiting)
            tl.store(told, waiting)


@kernel
def _sum_kernel(  # type: ignore[no-untyped-def]
    total, slots, live, own, gave_up, rows, hidden, num_local, SUMS_AT: tl.constexpr, SIZE: tl.constexpr,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column, choice = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, CHOICES)
    held = column < hidden
    chosen = (choice < TOP_K) & (row < tl.load(live))
    slot = tl.load(slots + row * TOP_K + choice, mask=chosen, other=-1).to(tl.int32)
    owner = tl.where(slot >= 0, slot // num_local, -1)
    element: tl.constexpr = total.dtype.element_ty
    sums = (own + SUMS_AT).to(tl.pointer_type(element), bitcast=True)
    value = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(SIZE):
        wanted = tl.sum((owner == other).to(tl.int32), axis=0) > 0
        place = (other * rows + row).to(tl.int64) * hidden
        value += tl.load(sums + place + column, mask=held & wanted, other=0.0).to(tl.float32)
    value = tl.where(tl.load(gave_up) == 0, value, float("nan"))
    tl.store(total + row.to(tl.int64) * hidden + column, value.to(element), mask=held)
