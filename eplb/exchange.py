"""How ranks show each other a few bytes, all at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.errors import WorkerError


class Exchange(Protocol):
    """All ranks call the same operations in the same order, on one thread each. Others use other exchanges."""

    rank: int
    size: int

    def start(self, data: bytes) -> None:
        """Show the others this. Does not wait. Ends with `finish`, before the next.

        Args:
            data: as long on all ranks, and each time.
        """

    def finish(self) -> list[bytes]:
        """What all ranks showed, in the order of ranks. Blocks until all have, or the time is over.

        Raises:
            WorkerError: a rank did not. Nothing can be exchanged any more.
        """

    def gather(self, data: bytes) -> list[bytes]:
        """What all ranks show, of any length. Blocks.

        Raises:
            WorkerError: a rank did not take part.
        """


class TorchExchange:
    """See `Exchange`. Over a torch.distributed group of its own, gloo's: nothing else may use the group.

    Args:
        group: whose ranks these are.
        timeout_s: how long a rank waits for the others: as long as the engine does within a step, for a rank that
            stands still holds steps up, too.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)
        self._work: dist.Work | None = None
        self._mine = torch.empty(0, dtype=torch.uint8)
        self._parts: list[Tensor] = []

    def start(self, data: bytes) -> None:
        """See `Exchange`."""
        assert self._work is None, "the last exchange was not finished"
        self._mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._parts = [torch.empty_like(self._mine) for _ in range(self.size)]
        try:
            self._work = dist.all_gather(self._parts, self._mine, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._broken(error) from error

    def finish(self) -> list[bytes]:
        """See `Exchange`."""
        assert self._work is not None, "no exchange was started"
        work, self._work = self._work, None
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._broken(error) from error
        return [part.numpy().tobytes() for part in self._parts]

    def gather(self, data: bytes) -> list[bytes]:
        """See `Exchange`."""
        self.start(len(data).to_bytes(8, "little"))
        lengths = [int.from_bytes(part, "little") for part in self.finish()]
        self.start(data.ljust(max(1, *lengths), b"\0"))
        return [part[:length] for part, length in zip(self.finish(), lengths, strict=True)]

    def _broken(self, error: Exception) -> WorkerError:
        reason = str(error).strip().splitlines()
        return WorkerError(
            f"rank {self.rank} of {self.size}: an exchange about experts failed: "
            f"{reason[0] if reason else type(error).__name__}",
            fix="a rank is gone or stands still: its own log says why; bring the ranks together again",
        )
