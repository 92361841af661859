"""The sum of every rank's tensor, on every rank, in one launch: for the small tensors of a decode step.

A library's ring sends each byte on in steps that wait for each other, and for a few kilobytes the waiting is all. Here
each rank lays its tensor open in memory that its peers have mapped (`peer_memory`), tells them, and reads theirs: one
exchange, whatever the number of ranks. Large tensors, where every rank reading everything costs more than the waiting,
are not for this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .on_gpu import kernel, next_power_of_2, tl

MAX_BYTES = 1 << 19
"""Of a tensor that `fused` takes."""

_BLOCK_BYTES = 1 << 13
_PROGRAMS = MAX_BYTES // _BLOCK_BYTES
_FLAG_BYTES = 8
_POLLS = 20_000_000
"""How often a program looks for its peers before it gives up: some tens of seconds."""


def reference(parts: Sequence[Tensor]) -> Tensor:
    """Add the ranks' tensors, in the order of ranks: the same bits wherever it is done.

    Args:
        parts: one tensor a rank, of one shape and floating dtype.

    Returns:
        the sum, taken in float32, in the parts' shape and dtype.
    """
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part
    return total.to(parts[0].dtype)


def memory_bytes(size: int) -> int:
    """What each of ``size`` ranks lays open: two slots of `MAX_BYTES`, and a flag for each program and rank."""
    return 2 * MAX_BYTES + _PROGRAMS * size * _FLAG_BYTES


class Peers:
    """A rank's place among those that add their tensors. Its operations run on one stream at a time.

    Args:
        rank: this one.
        addresses: where this process sees each rank's `memory_bytes`, in the order of ranks. They were zero when the
            last of them was mapped.
        device: of this rank.
        polls: how often to look for a peer before it is given up.
    """

    def __init__(self, rank: int, addresses: Sequence[int], device: torch.device, polls: int = _POLLS) -> None:
        self.rank = rank
        self.size = len(addresses)
        self.polls = polls
        self.memory = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.calls = torch.zeros(_PROGRAMS, dtype=torch.int64, device=device)
        self.gave_up = torch.zeros(1, dtype=torch.int32, device=device)
        # The host reads this without waiting for the device.
        self.told = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def missing(self) -> list[int]:
        """The ranks for which this one waited in vain. From then on, its sums are NaN."""
        bits = int(self.told[0])
        return [rank for rank in range(self.size) if bits >> rank & 1]


def serves(x: Tensor) -> bool:
    """Whether `fused` takes a tensor; equal on all ranks for tensors of one shape and dtype."""
    return 0 < x.numel() * x.element_size() <= MAX_BYTES


def fused(x: Tensor, peers: Peers) -> Tensor:
    """`reference` over the ranks' ``x``, on a GPU each. Overwrites ``x``, and returns it.

    All ranks call it equally often, with equal shapes and dtypes. A rank whose peers do not come gives up after
    ``peers.polls`` looks: its sum is NaN, `Peers.missing` names them, and by the next call the others miss it in turn.
    """
    block = _BLOCK_BYTES // x.element_size()
    _all_reduce_kernel[(-(-x.numel() // block),)](
        x, peers.memory, peers.calls, peers.gave_up, peers.told, x.numel(), peers.rank, peers.polls,
        peers.size, next_power_of_2(peers.size), block, _BLOCK_BYTES, MAX_BYTES, _FLAG_BYTES, num_warps=8,
    )  # fmt: skip
    return x


# Why two slots suffice. Program p of a rank has its own part of each slot, its own flags and its own count of calls, so
# that p need only agree with p of the other ranks. Its calls on one rank follow each other (one stream), and the n-th
# writes slot n mod 2. It may overwrite there what a peer still has to read of call n − 2. But before it began, call
# n − 1 had seen that peer's flag of n − 1, which the peer raised in its own call n − 1, after its call n − 2 had ended
# and with it all reads of that slot. With one slot, call n would overwrite what slower peers read in call n − 1.
@kernel
def _all_reduce_kernel(  # type: ignore[no-untyped-def]
    x, memory, calls, gave_up, told, count, rank, polls,
    SIZE: tl.constexpr, PEERS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    at = program * BLOCK + within
    inside = at < count
    element: tl.constexpr = x.dtype.element_ty
    # Counted here and not by the host: a recorded launch counts on when it is replayed.
    call = tl.load(calls + program) + 1
    # Who has given up falls silent: a peer that comes late must not take later data for that of its call.
    before = tl.load(gave_up)
    takes_part = before == 0
    left = tl.where(takes_part, polls, 0)
    peer = tl.arange(0, PEERS)
    exists = peer < SIZE
    address = tl.load(memory + peer, mask=exists, other=0)
    own = tl.sum(tl.where(peer == rank, address, 0), axis=0)
    offset = (call % 2) * SLOT_BYTES + program * BLOCK_BYTES
    slot = tl.multiple_of((own + offset).to(tl.pointer_type(element)), 16)
    tl.store(slot + within, tl.load(x + at, mask=inside, other=0.0), mask=inside & takes_part)
    tl.debug_barrier()  # every thread's part is written before one of them tells of it

    flags = 2 * SLOT_BYTES + program * (SIZE * FLAG_BYTES)
    theirs = (address + flags + rank * FLAG_BYTES).to(tl.pointer_type(tl.int64))
    raised = tl.zeros((PEERS,), tl.int64) + call
    tl.atomic_xchg(theirs, raised, mask=exists & takes_part, sem="release", scope="sys")
    ours = (own + flags).to(tl.pointer_type(tl.int64)) + peer
    waiting = tl.where(takes_part, (1 << SIZE) - 1, before)
    while (waiting != 0) & (left > 0):
        seen = tl.atomic_add(ours, tl.zeros((PEERS,), tl.int64), mask=exists, sem="acquire", scope="sys")
        waiting = tl.sum(tl.where(exists & (seen < call), 1 << peer, 0), axis=0)
        left -= 1
    tl.debug_barrier()  # some threads saw the flags, and all read what these tell of

    total = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(SIZE):
        start = tl.sum(tl.where(peer == other, address, 0), axis=0) + offset
        slot = tl.multiple_of(start.to(tl.pointer_type(element)), 16)
        total += tl.load(slot + within, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(waiting == 0, total, float("nan"))
    tl.store(x + at, total.to(element), mask=inside)
    tl.store(calls + program, call)
    if (waiting != 0) & takes_part:
        tl.store(gave_up, waiting)
        tl.store(told, waiting)
