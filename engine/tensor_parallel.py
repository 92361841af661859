"""How the ranks of a tensor-parallel group add and gather what each has computed.

One process a rank. A decoder asks for two sums a layer, and for the logits' gathering at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.environment import prepare_collectives
from ..core.errors import ConfigError, WorkerError
from ..kernels import all_reduce
from ..kernels.peer_memory import PeerMemory

# torch 2.13 renamed it.
_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group(Protocol):
    """Ranks that compute one model together. All of them call the same operations in the same order."""

    rank: int
    """Of this process, in 0 … ``size`` − 1."""
    size: int
    """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bit for bit the same on all.

        Args:
            x: contiguous, of the same shape and floating dtype on all ranks; may be overwritten.

        Raises:
            WorkerError: a rank did not take part.
        """

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, side by side in the order of ranks.

        Args:
            x: [rows, columns], contiguous, of the same shape and dtype on all ranks.

        Returns:
            [rows, size · columns].

        Raises:
            WorkerError: a rank did not take part.
        """

    def barrier(self) -> None:
        """Wait until all ranks are here; the devices' work may still run.

        Raises:
            WorkerError: a rank did not come.
        """

    def check(self) -> None:
        """Does not wait. To be asked when a step's results are there.

        Raises:
            WorkerError: on the device, a rank did not take part in a sum; what was computed since is NaN.
        """

    def close(self) -> None:
        """Leave the group, all ranks together. CUDA graphs that recorded its operations must be gone."""


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def barrier(self) -> None:
        """Nobody is waited for."""

    def check(self) -> None:
        """Nobody is missed."""

    def close(self) -> None:
        """Nothing is held."""


class _Collectives:
    """The operations of `Group` over torch.distributed: gloo between CPUs, NCCL between GPUs; small sums between GPUs
    that can read each other's memory go through `kernels.all_reduce`.

    Its operations on a GPU can be recorded in CUDA graphs, and run on one stream at a time.

    Args:
        rank: of this process.
        size: how many there are.
        device: of this rank, a GPU with its index.
        group: of torch's; None: all of its ranks.
    """

    def __init__(self, rank: int, size: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._group = group
        self._memory: PeerMemory | None = None
        self._peers: all_reduce.Peers | None = None
        self.why_not_direct = ""
        """Why small sums on GPUs do not go through peers' memory, where they were to."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group`. Overwrites ``x``."""
        if self._peers is not None and all_reduce.serves(x):
            return all_reduce.fused(x, self._peers)
        try:
            dist.all_reduce(x, group=self._group)
        except RuntimeError as error:
            raise self._broken("a sum", error) from error
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group`."""
        rows, columns = x.shape
        parts = torch.empty(self.size * rows, columns, dtype=x.dtype, device=x.device)
        try:
            _gather(parts, x, group=self._group)
        except RuntimeError as error:
            raise self._broken("a gathering", error) from error
        return parts.view(self.size, rows, columns).transpose(0, 1).reshape(rows, self.size * columns)

    def barrier(self) -> None:
        """See `Group`."""
        self.exchange(b"\0")

    def check(self) -> None:
        """See `Group`."""
        missing = self._peers.missing() if self._peers is not None else []
        if missing:
            raise WorkerError(
                f"rank {self.rank} of {self.size} waited in vain for rank {', '.join(map(str, missing))}",
                fix="start all ranks anew; the missing rank's own log says what happened to it",
            )

    def close(self) -> None:
        """See `Group`. After an error a process should end instead: a rank that is gone cannot be waited for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._peers = None
        if self._memory is not None:
            # A peer that is gone may have left its mapping behind; then the memory stays until this process ends.
            with contextlib.suppress(WorkerError):
                self._memory.close()
            self._memory = None
        dist.destroy_process_group(self._group)

    def _connect(self, direct: bool) -> None:
        if self._device.type == "cuda":
            # NCCL connects the ranks at its first call, which no graph may record.
            self.all_gather(torch.zeros(1, 1, device=self._device))
            dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)
            if direct:
                self._share_memory()
        self.barrier()

    def _share_memory(self) -> None:
        try:
            self._memory = PeerMemory(all_reduce.memory_bytes(self.size), self.rank, self._device, self.exchange)
        except ConfigError as error:
            self.why_not_direct = str(error)
        else:
            self._peers = all_reduce.Peers(self.rank, self._memory.addresses, self._device)

    def exchange(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, equally many from each, through the CPUs.

        Raises:
            WorkerError: a rank did not take part.
        """
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(parts, mine, group=self._group)
        except RuntimeError as error:
            raise self._broken("an exchange", error) from error
        return [part.numpy().tobytes() for part in parts]

    def _broken(self, what: str, error: Exception) -> WorkerError:
        reason = str(error).strip().splitlines()
        return WorkerError(
            f"rank {self.rank} of {self.size}: {what} failed: {reason[0] if reason else type(error).__name__}",
            fix="all ranks must be alive and do the same; start them anew together",
        )


class TorchGroup(_Collectives):
    """A group that forms by itself. Blocks until all ranks have come. One at a time in a process.

    Args:
        rank: of this process.
        size: how many there are.
        rendezvous: "file:///…", a path of which nothing exists yet but the folder, for ranks of one host; or
            "tcp://host:port", where rank 0 listens on every address of its host.
        device: of this rank, a GPU with its index, which becomes the calling thread's current device; other threads
            that use the group choose it themselves.
        timeout_s: how long a rank waits for the others, here and in each operation. On a GPU, NCCL ends a process that
            has waited longer.
        direct: whether small sums may go through peers' memory.

    Raises:
        ConfigError: the rendezvous is neither kind of address.
        WorkerError: a rank did not come.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        rendezvous: str,
        device: torch.device,
        timeout_s: float = 120,
        direct: bool = True,
    ) -> None:
        if not rendezvous.startswith(("file://", "tcp://")):
            raise ConfigError(
                f"rendezvous {rendezvous}: expected an address that begins with file:// or tcp://",
                fix="for ranks of one host, file:// and a path in a folder of this user",
            )
        super().__init__(rank, size, device, None)
        prepare_collectives(one_host=rendezvous.startswith(("file://", "tcp://127.0.0.1:", "tcp://localhost:")))
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                init_method=rendezvous,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            raise self._broken("joining the group", error) from error
        self._connect(direct)

    def part(self, size: int, *, direct: bool = True) -> TorchPart:
        """Those ``size`` neighbours among the ranks to which this one belongs, as a group; they divide the ranks. All
        ranks call it together, and close what it returns before this group.

        Raises:
            WorkerError: a rank did not take part.
        """
        first = self.rank // size * size
        try:
            groups = {start: dist.new_group(range(start, start + size)) for start in range(0, self.size, size)}
        except (RuntimeError, ValueError) as error:
            raise self._broken("forming a part of the group", error) from error
        return TorchPart(self.rank - first, size, self._device, groups[first], direct)


class TorchPart(_Collectives):
    """Some ranks of a `TorchGroup`, which makes it."""

    def __init__(
        self, rank: int, size: int, device: torch.device, group: dist.ProcessGroup | None, direct: bool
    ) -> None:
        super().__init__(rank, size, device, group)
        self._connect(direct)
