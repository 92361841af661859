"""Sums of a cache's elements by a GPU, against those of the host: the same numbers for the same elements.

On a GPU the kernel runs as it is; elsewhere Triton's interpreter runs the same source, and the host's memory takes the
GPU's part.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from tandem.kernels import element_sums, on_gpu
from tandem.kernels.gather import DTYPES
from tandem.kv_transfer.checksums import Checksums, Held
from tandem.kv_transfer.layout import KVLayout, group_layers
from tandem.kv_transfer.sum_queue import SumQueue

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NUM_BLOCKS = 24


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


@pytest.mark.parametrize("row_bytes", [256, 16, 24, 12, 10, 5])
@pytest.mark.parametrize(("block_tokens", "unit"), [(4, 4), (3, 6), (4, 6), (16, 16), (16, 64)])
def test_the_kernel_is_the_reference(rng: np.random.Generator, row_bytes: int, block_tokens: int, unit: int) -> None:
    """Rows of every kind of word, units that begin inside blocks, planes of a rank in the middle of the model's."""
    places, planes, layers = 3, np.array([1, 2, 5, 6]), np.array([5, 9])
    cache = rng.integers(0, 256, 8 * places * len(planes) * block_tokens * row_bytes, np.uint8)
    blocks = rng.permutation(8)[:5].astype(np.int64)
    positions = (2 + np.arange(5)) * block_tokens
    starts = np.maximum(positions, 2 * block_tokens + 1)
    stops = np.minimum(positions + block_tokens, positions[-1] + 1)
    first_unit = int(starts[0]) // unit
    want = np.full(int(stops[-1]) // unit - first_unit + 2, 3, np.uint64)
    shape = 1, places, planes, 8, block_tokens, row_bytes, unit, first_unit
    element_sums.native(cache, want, blocks, starts, stops, layers, *shape)
    memory, sums = on_device(cache), on_device(np.full(len(want), 3, np.int64))
    parts = element_sums.lay_out(blocks, starts, stops, block_tokens, unit, first_unit)
    element_sums.fused(
        memory.data_ptr(), sums, on_device(parts), on_device(layers), 1, places, on_device(planes), 8, block_tokens,
        row_bytes, unit,
    )  # fmt: skip
    np.testing.assert_array_equal(sums.cpu().numpy().view(np.uint64), want)


def make_queue(news: list[str]) -> SumQueue:
    if CUDA:
        return SumQueue(0, lambda: news.append("news"))
    from support import host_as_gpu

    return host_as_gpu.SumQueue(0, lambda: news.append("news"))  # type: ignore[return-value]


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "float16"), ("float16", "float32")])
@pytest.mark.parametrize("wide", [False, True], ids=["", "bfloat16 and fp8"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_gpu_and_the_host_sum_alike(
    rng: np.random.Generator, dtypes: tuple[str, str], wide: bool, ranks: int
) -> None:
    """Of a prompt with a window, in several ranks, in the reader's dtype: what a GPU holds, and what the host does."""
    if wide and not CUDA:
        pytest.skip("Triton's interpreter converts this wrongly")
    ours, wanted = (
        ({"float32": "bfloat16", "float16": "fp8_e4m3"}[name] for name in dtypes) if wide else dtypes
    )  # fmt: skip
    num_heads, per_rank = 4, max(4 // ranks, 1)
    groups = group_layers([0, 5, 0, 5])
    layout = KVLayout(2, per_rank, 8, 4, ours)
    values = torch.from_numpy(rng.standard_normal((4, NUM_BLOCKS * layout.block_bytes // DTYPES[ours].itemsize)))
    kept = [(rank * per_rank) % num_heads for rank in range(ranks)]
    hosts, memories, held = [], [], []
    for first in kept:
        array = (30 * values[first // per_rank]).to(DTYPES[ours]).view(torch.uint8).numpy().copy()
        heads = range(first, first + per_rank)
        hosts.append(Held(heads, array))
        memories.append(on_device(array))
        held.append(Held(heads, memories[-1].data_ptr()))
    news: list[str] = []
    queue = make_queue(news)
    on_host, on_gpu_ = Checksums(hosts, layout, num_heads, groups), Checksums(held, layout, num_heads, groups, queue)
    tables = [rng.permutation(NUM_BLOCKS)[:7].tolist() for _ in groups]
    for layers, tokens, unit in (
        (range(4), range(3, 26), 4),
        (range(1, 3), range(8, 17), 8),
        (range(3), range(25), 12),
    ):
        where = tables, layers, tokens, [2, 9], unit, wanted
        for copies in (False, True):
            want = on_host.start(*where, copies=copies, behind_steps=False).result()
            for behind_steps in (False, True) if CUDA else (copies,):
                got = on_gpu_.start(*where, copies=copies, behind_steps=behind_steps)
                np.testing.assert_array_equal(got.result(), want)
                assert got.query()
    assert on_gpu_.right(want, on_gpu_.total(want)).all()
    queue.close()
    if CUDA:
        assert len(news) == 6  # of those that were not put behind steps


@pytest.mark.skipif(not CUDA, reason="it would take the interpreter for ever")
def test_a_prompt_of_a_large_model(rng: np.random.Generator) -> None:
    """Offsets beyond 32 bits, and a change of one bit anywhere in 5 GB."""
    layout = KVLayout(36, 8, 128, 16, "bfloat16")
    memory = torch.randint(-(1 << 62), 1 << 62, (2200 * layout.block_bytes // 8,), device=DEVICE)
    queue = make_queue([])
    sums = Checksums([Held(range(8), memory.data_ptr())], layout, 8, group_layers([0] * 36), queue)
    where = [rng.permutation(2200)[:2048].tolist()], range(36), range(32768), [0], 16, "bfloat16"

    def value() -> np.ndarray:
        torch.cuda.synchronize()
        return sums.total(sums.start(*where, copies=False, behind_steps=False).result())

    good = value()
    assert len(set(good.tolist())) == 2048
    for unit in rng.integers(0, 2048, 5).tolist():
        at = (where[0][0][unit] * layout.block_bytes + int(rng.integers(0, layout.block_bytes))) // 8
        memory[at] ^= 1 << int(rng.integers(0, 62))
        changed = value()
        assert (changed != good).nonzero()[0].tolist() == [unit]
        good = changed
    # The same as the host's, for one block.
    unit = 2047
    block = where[0][0][unit]
    words = memory[block * layout.block_bytes // 8 : (block + 1) * layout.block_bytes // 8].cpu().numpy()
    host = Checksums([Held(range(8), words.view(np.uint8))], layout, 8, group_layers([0] * 36))
    table = [[-1] * unit + [0]]
    tokens = range(unit * 16, (unit + 1) * 16)
    [want] = host.total(
        host.start(table, range(36), tokens, [0], 16, "bfloat16", copies=False, behind_steps=True).result()
    )
    assert good[unit] == want
    queue.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this needs two CUDA devices")
def test_the_first_rank_sums_what_lies_on_another_gpu(rng: np.random.Generator) -> None:
    """Through the mapping that a worker's first rank has of its other ranks' memory."""
    from support.gpu_memory import OwnerProcess, RemoteOwner
    from tandem.kernels import cuda_memory
    from tandem.kv_transfer.transports.cuda_ipc import _Descriptor

    layout = KVLayout(2, 2, 64, 16, "float16")
    content = rng.integers(0, 256, 9 * layout.block_bytes, np.uint8)
    process = OwnerProcess(1, alone=True)
    try:
        owner = RemoteOwner(process, len(content))
        owner[:] = content
        region = msgspec.msgpack.decode(owner.descriptor(), type=_Descriptor).device_regions["blocks"]
        address = cuda_memory.open_handle(region.handle, 0)
        queue, own = make_queue([]), on_device(content)
        groups, where = group_layers([0, 0]), ([[7, 2, 0]], range(2), range(40), [0], 16, "float16")
        found = [
            Checksums([Held(range(2), place)], layout, 2, groups, place_queue)
            .start(*where, copies=True, behind_steps=True)
            .result()
            .tolist()
            for place, place_queue in ((address, queue), (own.data_ptr(), queue), (content, None))
        ]
        assert found[0] == found[1] == found[2]
        queue.close()
        cuda_memory.close_handle(address, 0)
    finally:
        process.kill()
