"""Tiers of workers whose KV is in a GPU's memory: bytes go where they belong, and tokens stay what they were. Where there
is no GPU, the host's memory and Triton's interpreter take its part.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support import host_as_gpu
from support.checkpoints import make_checkpoint
from support.gpu_memory import prepare
from support.offloading import block_bytes, check, config_of, prompt_of, real, until_ready, value
from support.pair import Pair
from support.tiers import end
from tandem.bench import offload_copies
from tandem.core.config import Config
from tandem.engine.kv_cache import KVCache
from tandem.engine.models.shard import kv_heads_of
from tandem.kernels import cuda_memory, on_gpu
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.memory import DeviceBuffer
from tandem.kv_transfer.offload import device
from tandem.kv_transfer.offload.build import start_host_tier
from tandem.kv_transfer.offload.device import DeviceBlocks, RankMemory
from tandem.kv_transfer.offload.split import RankBlocks, SplitBlocks
from tandem.kv_transfer.transports.inproc import InprocTransport

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
LAYOUT = KVLayout(num_layers=3, num_kv_heads=4, head_dim=8, block_tokens=16, dtype="float16")
NUM_BLOCKS = 12


@pytest.fixture(autouse=True)
def gpu() -> None:
    prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3_moe", "qwen3_mixed"):
        make_checkpoint(family, folder / family)
    return folder


class Memory:
    """Some of a GPU's."""

    def __init__(self, content: np.ndarray) -> None:
        self._buffer = DeviceBuffer(len(content), 0)
        if CUDA:
            self._buffer.tensor().copy_(torch.from_numpy(content))
            torch.cuda.synchronize()
        else:
            self._buffer.memory.array[:] = content  # type: ignore[union-attr]
        self.address = self._buffer.address

    def get(self) -> np.ndarray:
        found: np.ndarray = self._buffer.tensor().cpu().numpy() if CUDA else self._buffer.memory.array  # type: ignore
        return found


class Ranks:
    """As many ranks' blocks, on the GPU, and the same in the host's memory: what is right."""

    def __init__(self, size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        heads = [kv_heads_of(SPEC, rank, size) for rank in range(size)]
        whole = rng.integers(0, 256, (NUM_BLOCKS, 6, 4, LAYOUT.layer_bytes // 8), dtype=np.uint8)
        arrays = [np.ascontiguousarray(whole[:, :, h.start : h.stop]).reshape(-1) for h in heads]
        self.memories = [Memory(array) for array in arrays]
        self.arrays = arrays
        self.right = SplitBlocks(LAYOUT, [RankBlocks(*rank) for rank in zip(heads, arrays, strict=True)])
        addresses = [memory.address for memory in self.memories]
        self.blocks = DeviceBlocks(LAYOUT, [RankMemory(*rank) for rank in zip(heads, addresses, strict=True)], 0, 4)

    def check(self) -> None:
        for memory, array in zip(self.memories, self.arrays, strict=True):
            assert np.array_equal(memory.get(), array)


class SPEC:
    num_kv_heads = 4


@pytest.mark.parametrize("by_engine", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_bytes(size: int, pinned: bool, by_engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_LARGE_BYTES", 0 if by_engine else 1 << 60)
    ranks = Ranks(size, size)
    host = np.zeros(NUM_BLOCKS * LAYOUT.block_bytes + 64, np.uint8)
    # Neither the memory nor a block in it need begin at a page.
    places = host[16 : 16 + NUM_BLOCKS * LAYOUT.block_bytes].reshape(NUM_BLOCKS, -1)
    unpin = ranks.blocks.pin(host) if pinned else None
    wanted = np.zeros_like(places)
    ranks.blocks.read([7, 0, 11], [places[2], places[9], places[3]])
    ranks.right.read([7, 0, 11], [wanted[2], wanted[9], wanted[3]])
    assert np.array_equal(places, wanted)
    assert not host[:16].any()
    assert not host[-48:].any()
    places[:] = np.random.default_rng(0).integers(0, 256, places.shape, dtype=np.uint8)
    ranks.blocks.ordered().write([1, 4], [places[5], places[0]])
    ranks.right.write([1, 4], [places[5], places[0]])
    ranks.check()
    if unpin is not None:
        unpin()


@pytest.mark.parametrize("by_engine", [True, False])
def test_both_directions_at_once(by_engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, as tiers have them: each batch is whole."""
    monkeypatch.setattr(device, "_LARGE_BYTES", 0 if by_engine else 1 << 60)
    ranks = Ranks(1, 3)
    before = [array.copy() for array in ranks.arrays]
    host = np.random.default_rng(1).integers(0, 256, (NUM_BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)
    unpin = ranks.blocks.pin(host.reshape(-1))
    out = np.zeros((4, 3, LAYOUT.block_bytes), np.uint8)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                if number % 2:
                    ranks.blocks.write([6 + number], [host[number]])
                else:
                    ranks.blocks.read([0, 2, 4], list(out[number]))
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for number in (1, 3):
        ranks.right.write([6 + number], [host[number]])
    ranks.check()
    for number in (0, 2):
        assert np.array_equal(out[number], before[0].reshape(NUM_BLOCKS, -1)[[0, 2, 4]])
    unpin()  # what takes its pages next could not be pinned


@pytest.mark.skipif(not CUDA, reason="no CUDA device is here, and the order of its work is what this looks at")
def test_a_load_comes_after_what_the_gpu_was_given() -> None:
    ranks = Ranks(1, 4)
    host = np.full(LAYOUT.block_bytes, 7, np.uint8)
    unpin = ranks.blocks.pin(host)
    block = ranks.memories[0]._buffer.tensor()[: LAYOUT.block_bytes]
    for _ in range(5):
        torch.cuda._sleep(20_000_000)
        block.fill_(1)  # as a block is cleared that was freed
        ranks.blocks.ordered().write([0], [host])
        assert bool((block == 7).all())
    unpin()


def test_what_is_measured_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    total, run = 8 << 10, 1 << 10
    source = np.random.default_rng(0).integers(0, 256, 2 * total, dtype=np.uint8)
    gpu, host = Memory(source), mmap.mmap(-1, 2 * total)
    array = np.frombuffer(host, np.uint8)
    array[:] = source[::-1]
    cuda_memory.register_host(array.ctypes.data, 2 * total, 0)
    before = array.copy()
    if not CUDA:
        monkeypatch.setattr(offload_copies, "CopyQueue", host_as_gpu.CopyQueue)
        monkeypatch.setattr(offload_copies, "memcpy", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: mock.Mock())
    record = offload_copies.measure(offload_copies.Ends(gpu.address, array.ctypes.data), run, [1], total)
    assert {f"{way}_{how}_gb_per_s" for way in ("h2d", "d2h", "both") for how in ("kernel_1", "memcpy_each")} < set(
        record
    )
    found = gpu.get()
    h2d, d2h = offload_copies.scattered(run, total, 0), offload_copies.scattered(run, total, total)
    if not CUDA:  # else copies of everything at once come last
        for here, there, size in zip(*h2d, strict=True):
            assert np.array_equal(found[there : there + size], before[here : here + size])
        for here, there, size in zip(*d2h, strict=True):
            assert np.array_equal(array[there : there + size], source[here : here + size])
    cuda_memory.unregister_host(array.ctypes.data, 0)


@pytest.mark.parametrize("write", ["write_through", "write_back"])
@pytest.mark.parametrize(("family", "num_blocks"), [("qwen3_moe", 20), ("qwen3_mixed", 50)])
def test_what_the_pool_lost_comes_back(folder: Path, tmp_path: Path, family: str, num_blocks: int, write: str) -> None:
    folder = folder / family
    size = block_bytes(folder)
    tiers = [
        {"kind": "host", "capacity": 60 * (size + 256), "policy": "lru", "write": write},
        {"kind": "disk", "capacity": 800 * (size + 8192), "policy": "lru", "path": str(tmp_path / "disk")},
    ]
    keeper = start_host_tier(Config.model_validate({"offload": {"tiers": tiers}}).offload, size, tmp_path)
    assert keeper is not None
    pools: dict[str, Any] = {"colocated": {"max_batched_tokens": 32}}
    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")

    def transport_of(cache: KVCache) -> InprocTransport:
        if not CUDA:
            cache.blocks = host_as_gpu.adopt(cache.blocks)  # type: ignore[arg-type]
        return InprocTransport(lambda: None)

    plain = Pair(config_of(folder, 800, pools), True, device_of=lambda role: device)
    golden = [plain.generate([prompt_of(number, 90)], max_tokens=12) for number in range(4)]
    plain.close()
    config = config_of(folder, num_blocks, pools, tiers)
    pair = Pair(config, True, device_of=lambda role: device, transport_of=transport_of, tiers_of=real(tmp_path))
    until_ready(pair)
    for _ in range(2):
        for number in range(4):
            assert pair.generate([prompt_of(number, 90)], max_tokens=12) == golden[number]
    assert value(pair.decode, "tandem_offload_loads_total", outcome="loaded") >= 3
    assert value(pair.decode, "tandem_offload_tokens_total") >= 3 * 40
    check(pair)
    pair.close()
    end(keeper)
