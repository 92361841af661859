"""What goes to a GPU and comes from it, also while copy engines have much to do."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from tandem.engine.upload import download, upload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")

CUDA = torch.device("cuda")


def test_all_types_there_and_back(rng: torch.Generator) -> None:
    arrays = {
        "words": np.arange(1000, dtype=np.int64).reshape(4, 250),
        "halves": np.linspace(-1, 1, 77, dtype=np.float32),
        "none": np.empty(0, np.int64),
        "bytes": np.arange(5, dtype=np.uint8),
    }
    there = upload(arrays, CUDA)
    back = {name: download(tensor) for name, tensor in there.items()}
    torch.cuda.synchronize()
    for name, array in arrays.items():
        assert (back[name].numpy() == array).all(), name


@pytest.mark.parametrize("shape", [(1,), (256,), (3, 5), (300_000,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_what_comes_is_what_was_there(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = torch.randn(*shape, 3, device=CUDA).to(dtype)
    for tensor in (whole, whole[..., 1], whole.reshape(-1)[1:]):
        got = download(tensor)
        torch.cuda.synchronize()
        assert torch.equal(got, tensor.cpu())


def test_memory_is_kept_while_the_gpu_uses_it() -> None:
    """The GPU comes late, and meanwhile as much pinned memory is asked for again and again."""
    expected, got = [], []
    torch.cuda._sleep(200_000_000)
    for number in range(200):
        there = upload({"x": np.full(512, number, np.int64)}, CUDA)["x"]
        got.append(download(there + 1))
        expected.append(number + 1)
        if number % 50 == 0:
            torch.cuda._sleep(20_000_000)
    torch.cuda.synchronize()
    assert [part.unique().tolist() for part in got] == [[value] for value in expected]


def test_small_things_do_not_wait_for_large_ones() -> None:
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
    beside = torch.cuda.Stream()

    def seconds() -> float:
        torch.cuda.current_stream().synchronize()
        start_s = time.perf_counter()
        download(upload({"x": np.ones(1024, np.int64)}, CUDA)["x"])
        torch.cuda.current_stream().synchronize()
        return time.perf_counter() - start_s

    seconds()
    torch.cuda.synchronize()
    for source, target in ((host, there), (there, host)):
        with torch.cuda.stream(beside):
            begin_s = time.perf_counter()
            target.copy_(source, non_blocking=True)
        taken_s = [seconds() for _ in range(20)]
        small_s = time.perf_counter() - begin_s
        beside.synchronize()
        whole_s = time.perf_counter() - begin_s
        assert small_s < whole_s, "nothing was under way"
        assert sorted(taken_s)[10] < 0.1 * whole_s, taken_s
