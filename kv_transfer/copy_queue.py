"""Copies that a GPU makes beside its other work, in the order in which they were started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from ..kernels import copy_engine, gather
from .layout import Runs


class Copy(Protocol):
    """A copy that was started; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it has ended. Raises RuntimeError when the device is lost."""
        ...

    def synchronize(self) -> None:
        """Wait for its end, asleep. Raises RuntimeError when the device is lost."""
        ...


class CopyQueue:
    """A stream of one GPU, owned by one thread; only `adopt_thread` is for another.

    The stream has priority: a copy takes at most the plan's share of the GPU's processors whenever it runs, and a token
    that waits for its KV waits for no other kernel's turn. Work of the default stream does not wait for it, nor it for
    that: who starts a copy knows that its target is in nobody's use.

    Args:
        device: the GPU's number in this process.
        plan: of a copy at a time.
    """

    def __init__(self, device: int, plan: gather.Plan) -> None:
        self.device = device
        self._device = torch.device("cuda", device)
        self._plan = plan
        self._stream = torch.cuda.Stream(self._device, priority=-1)

    def mark(self) -> torch.cuda.Event:
        """What stands for all that the calling thread has given the GPU so far, on its current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self, source: int, target: int, rows: gather.Rows, after: torch.cuda.Event | None = None) -> Copy:
        """Queue a copy. Does not wait for it.

        Args:
            source: address that the GPU can read; a multiple of 16.
            target: address that it can write; a multiple of 16.
            rows: of `gather.lay_out`.
            after: a `mark`: the GPU does that first, and all copies that are started later wait, too.

        Raises:
            RuntimeError: it could not be queued.
        """
        with self._queue(after):
            # Pinned memory goes back to torch's cache at once, and torch gives it out again after the copy.
            pinned = torch.empty(rows.lists.shape, dtype=torch.int64, pin_memory=True)
            pinned.numpy()[:] = rows.lists
            lists = pinned.to(self._device, non_blocking=True)
            gather.fused(source, target, rows, lists, self._plan)
            return self._ended()

    def start_large(self, source: int, target: int, runs: Runs, after: torch.cuda.Event | None = None) -> Copy:
        """`start` for ranges that the GPU's copy engines move as fast as the link goes, without its processors: of
        about a mebibyte and more.

        Raises:
            OSError: it could not be queued.
        """
        with self._queue(after):
            copy_engine.copy_ranges(source, target, *runs, self._stream)
            return self._ended()

    @contextlib.contextmanager
    def _queue(self, after: torch.cuda.Event | None) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            yield

    def _ended(self) -> torch.cuda.Event:
        ended = torch.cuda.Event(blocking=True)  # its waiter sleeps
        ended.record()
        return ended

    def warm_up(self) -> None:
        """Compile the kernel for all kinds of ranges that keep their type. Blocks for some seconds the first time."""
        start = np.zeros(1, np.int64)
        memory = torch.empty(2 * 4096, dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()
        for size in (4096, 512, 16, 1):
            rows = gather.lay_out(start, start, start + size)
            self.start(memory.data_ptr(), memory.data_ptr() + 4096, rows).synchronize()

    def adopt_thread(self) -> None:
        """Before a thread waits for copies: it belongs to this GPU, and needs nothing of any other."""
        torch.cuda.set_device(self._device)

    def synchronize(self) -> None:
        """Wait for all copies. Raises RuntimeError when the device is lost."""
        self._stream.synchronize()
