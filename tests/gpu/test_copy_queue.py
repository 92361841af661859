"""Copies that a GPU makes beside its steps: the plan of the moment is chosen, and the bytes are right by each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tandem.kernels import gather, on_gpu
from tandem.kv_transfer import copy_queue
from tandem.kv_transfer.copy_queue import CopyPlans, CopyQueue
from tandem.kv_transfer.layout import Runs

CUDA = torch.cuda.is_available()
SIZE = 8 << 20
_ABOUT_100_MS = 200_000_000
"""Cycles."""

pytestmark = pytest.mark.skipif(not CUDA or not on_gpu.AVAILABLE, reason="streams are a GPU's, and Triton's")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "beside steps"])
@pytest.mark.parametrize("engines_from", [0, 64 << 10, 1 << 20])
@pytest.mark.parametrize("priority", [-1, 0])
def test_a_copy_takes_what_there_is_to_take(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator, busy: bool, engines_from: int, priority: int
) -> None:
    idle, beside = gather.Plan(4, 8, 32 << 10), gather.Plan(2, 8, 16 << 10)
    taken: list[object] = []
    kernel, engines = gather.fused, copy_queue.copy_engine.copy_ranges
    copies = CopyQueue(0, CopyPlans(idle, beside, engines_from, priority))
    copies.warm_up()
    monkeypatch.setattr(gather, "fused", lambda *args: (taken.append(args[4]), kernel(*args))[1])
    monkeypatch.setattr(
        copy_queue.copy_engine, "copy_ranges", lambda *args: (taken.append("engines"), engines(*args))[1]
    )
    source = torch.randint(256, (SIZE,), dtype=torch.uint8, device="cuda", generator=rng)
    target = torch.zeros_like(source)
    starts = np.arange(0, SIZE, 256 << 10, dtype=np.int64)
    runs = Runs(starts[::-1].copy(), starts, np.full(len(starts), 128 << 10, np.int64))
    torch.cuda.synchronize()
    if busy:
        torch.cuda._sleep(_ABOUT_100_MS)
    copy = copies.start_runs(source.data_ptr(), target.data_ptr(), runs)
    copy.synchronize()
    torch.cuda.synchronize()
    by_engines = busy and 0 < engines_from <= 128 << 10
    assert taken == ["engines" if by_engines else beside if busy else idle]
    want = torch.zeros_like(source)
    for here, there, size in zip(*(column.tolist() for column in runs), strict=True):
        want[there : there + size] = source[here : here + size]
    assert target.equal(want)


def test_engines_change_no_types(rng: torch.Generator) -> None:
    copies = CopyQueue(0, CopyPlans(engines_from=1))
    source = torch.randn(1 << 16, device="cuda", generator=rng)
    target = torch.zeros(1 << 16, dtype=torch.float16, device="cuda")
    runs = Runs(*(np.array([value], np.int64) for value in (0, 0, 4 << 16)))
    torch.cuda.synchronize()
    torch.cuda._sleep(_ABOUT_100_MS)
    copies.start_runs(source.data_ptr(), target.data_ptr(), runs, ("float32", "float16")).synchronize()
    assert target.equal(source.half())
