"""Copies that a GPU makes beside its other work, in the order in which they were started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..kernels import copy_engine, gather
from .layout import Runs

_LARGE_BYTES = 1 << 20
"""Smaller ranges take copy engines longer to begin with than to copy."""


class Copy(Protocol):
    """A copy that was started; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it has ended. Raises RuntimeError when the device is lost."""
        ...

    def synchronize(self) -> None:
        """Wait for its end, asleep. Raises RuntimeError when the device is lost."""
        ...


class CopyPlans(NamedTuple):
    """What copies take of a GPU, which may compute steps meanwhile; `CopyQueue.start_runs` chooses for each copy."""

    idle: gather.Plan = gather.Plan()
    """When it starts while the GPU computes nothing: nobody is disturbed."""
    beside_steps: gather.Plan = gather.Plan()
    """When it starts while steps are computed, or wait to be."""
    engines_from: int = 0
    """Bytes: beside steps, ranges of which none is smaller are left to the copy engines, which take no processor. 0:
    none are."""
    priority: int = -1
    """Of the stream. −1: before steps, so that a token that waits for its KV waits for no other kernel's turn."""

    @classmethod
    def of(cls, programs: int) -> CopyPlans:
        """For ``kv.copy_programs``; `python -m tandem.bench.kv_gpu --parts sweep` measures others.

        Between two H200, while steps of 64 outputs of Qwen3-8B are computed, ranges of 1.2 MB: at 37 GB/s steps take
        2 % longer by sixteen programs, and 1 to 2 % by engines; as fast as it goes, 23 % at 269 GB/s, and 7 % at 327.
        """
        return cls(idle=gather.Plan(programs), beside_steps=gather.Plan(programs), engines_from=_LARGE_BYTES)

    @classmethod
    def always(cls, plan: gather.Plan) -> CopyPlans:
        """The same whether steps are computed or not."""
        return cls(idle=plan, beside_steps=plan)


class CopyQueue:
    """A stream of one GPU, owned by one thread; only `adopt_thread` is for another.

    A copy takes at most its plan's share of the GPU's processors whenever it runs. Work of the default stream does not
    wait for it, nor it for that: who starts a copy knows that its target is in nobody's use.

    Args:
        device: the GPU's number in this process.
        plans: of a copy at a time.
    """

    def __init__(self, device: int, plans: CopyPlans) -> None:
        self.device = device
        self._device = torch.device("cuda", device)
        self._plans = plans
        self._stream = torch.cuda.Stream(self._device, priority=plans.priority)

    def mark(self) -> torch.cuda.Event:
        """What stands for all that the calling thread has given the GPU so far, on its current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start_runs(self, source: int, target: int, runs: Runs, dtypes: tuple[str, str] = ("", "")) -> Copy:
        """Queue a copy of some ranges, by what `CopyPlans` says for this moment. Does not wait for it.

        Args:
            source: address that the GPU can read; a multiple of 16.
            target: address that it can write; a multiple of 16.
            runs: at least one.
            dtypes: source and target's, of `gather.DTYPES`, or both empty: bytes are copied as they are.

        Raises:
            RuntimeError, OSError: it could not be queued.
        """
        plans = self._plans
        # Steps are on the calling thread's stream, or, where another thread has them, on the same default one.
        beside = not torch.cuda.current_stream(self._device).query()
        if beside and not any(dtypes) and 0 < plans.engines_from <= int(runs.sizes.min()):
            return self.start_large(source, target, runs)
        rows = gather.lay_out(*runs, *dtypes)
        return self.start(source, target, rows, plan=plans.beside_steps if beside else plans.idle)

    def start(
        self,
        source: int,
        target: int,
        rows: gather.Rows,
        after: torch.cuda.Event | None = None,
        plan: gather.Plan | None = None,
    ) -> Copy:
        """Queue a copy. Does not wait for it.

        Args:
            source: address that the GPU can read; a multiple of 16.
            target: address that it can write; a multiple of 16.
            rows: of `gather.lay_out`.
            after: a `mark`: the GPU does that first, and all copies that are started later wait, too.
            plan: what it takes of the GPU; None: as beside steps.

        Raises:
            RuntimeError: it could not be queued.
        """
        with self._queue(after):
            # Pinned memory goes back to torch's cache at once, and torch gives it out again after the copy.
            pinned = torch.empty(rows.lists.shape, dtype=torch.int64, pin_memory=True)
            pinned.numpy()[:] = rows.lists
            lists = pinned.to(self._device, non_blocking=True)
            gather.fused(source, target, rows, lists, plan or self._plans.beside_steps)
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
            for plan in dict.fromkeys(self._plans[:2]):
                self.start(memory.data_ptr(), memory.data_ptr() + 4096, rows, plan=plan).synchronize()

    def adopt_thread(self) -> None:
        """Before a thread waits for copies: it belongs to this GPU, and needs nothing of any other."""
        torch.cuda.set_device(self._device)

    def synchronize(self) -> None:
        """Wait for all copies. Raises RuntimeError when the device is lost."""
        self._stream.synchronize()
