"""Prefill and decode workers that hand KV over between GPUs, or between two places of one: the tokens are those of a
worker that does both. Where there is no GPU, workers compute on the CPU, and its memory takes the GPU's part: copies and
layers then end some time after they were started, as on a GPU.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import host_as_gpu
from support.checkpoints import FAMILIES, make_checkpoint
from support.gpu_memory import prepare
from support.pair import Pair
from tandem.core.config import Config
from tandem.core.messages import BlocksReady, Message, Prefilled
from tandem.decode.stream import StreamState
from tandem.engine.kv_cache import KVCache
from tandem.engine.watermarks import Watermarks
from tandem.kernels import on_gpu
from tandem.kv_transfer.transports import Read
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from tandem.prefill.worker import PrefillWorker

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

GPUS = torch.cuda.device_count()
PROMPTS = [[(7 * i * i + j * 13) % 131 for j in range(length)] for i, length in enumerate((1, 9, 50, 51, 130))]


class Bench:
    """Makes pairs, and looks at the end whether anything leaked."""

    def __init__(self, num_gpus: int) -> None:
        self._devices = {"prefill": 0, "decode": num_gpus - 1, "colocated": 0}
        self._pairs: list[Pair] = []

    def pair(self, folder: Path, **sections: dict[str, object]) -> Pair:
        base: dict[str, object] = {
            "model": {"path": str(folder), "max_model_len": 256},
            "kv": {"block_tokens": 8, "capacity": "4MiB"} | sections.pop("kv", {}),
            "routing": {"local_prefill": "never"},
        }

        def device_of(role: str) -> torch.device:
            return torch.device("cuda", self._devices[role]) if GPUS else torch.device("cpu")

        def transport_of(cache: KVCache) -> CudaIpcTransport:
            if not GPUS:
                cache.blocks = host_as_gpu.adopt(cache.blocks)  # type: ignore[arg-type]
            return CudaIpcTransport(lambda: None, cache.blocks.device, 16)  # type: ignore[union-attr]

        pair = Pair(Config.model_validate(base | sections), True, device_of=device_of, transport_of=transport_of)
        if not GPUS and "prefill-0#1" in pair.nodes:
            assert isinstance(pair.prefill.worker, PrefillWorker)
            pair.prefill.worker._watermarks = Watermarks(torch.device("cuda", 0))
        self._pairs.append(pair)
        return pair

    def close(self) -> None:
        for pair in self._pairs:
            pair.run()
            for node in pair.nodes.values():
                node.check_idle()
                assert node.worker.drained()
                if isinstance(node.worker, PrefillWorker):
                    node.worker.close()
                    node.worker.close()
            pair.close()


@pytest.fixture(params=[1, 2], ids=["one GPU", "two GPUs"])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    if request.param > max(GPUS, 1):
        pytest.skip(f"{GPUS} CUDA devices are here, and this needs {request.param}")
    if not GPUS:
        prepare()
        monkeypatch.setattr(torch.cuda, "Event", host_as_gpu.Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    bench = Bench(request.param)
    yield bench
    bench.close()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_tokens_are_those_of_a_colocated_worker(bench: Bench, family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    want = bench.pair(tmp_path, pools={"colocated": {}}).generate(PROMPTS, max_tokens=24)
    pools: dict[str, object] = {"prefill": {"max_batched_tokens": 48}, "decode": {"max_running": 4}}
    pair = bench.pair(tmp_path, pools=pools)
    assert pair.generate(PROMPTS, max_tokens=24) == want
    assert pair.generate(PROMPTS, max_tokens=24) == want  # with prefixes that both sides have
    assert pair.decode.connector.transport_of("prefill-0#1") == "cuda_ipc"
    received = pair.decode.metrics.transfer_bytes.labels("cuda_ipc", "prefill-0")._value.get()
    engine = pair.decode.engine
    # Of a window only the last travels.
    needed = [n - max(group.first_needed(n) for group in engine.groups) for n in map(len, PROMPTS)]
    assert received >= sum(needed) * engine.cache.layout.token_bytes
    assert pair.decode.metrics.load_failures._metrics == {}, "a load failed"


@pytest.mark.parametrize("layer_groups", [1, 2])
def test_checksums_are_of_what_was_computed(bench: Bench, layer_groups: int, tmp_path: Path) -> None:
    """Chunks that are summed behind the layers that compute them, prefixes that both sides have, windows; then ranges
    that land in each other's places."""
    make_checkpoint("gpt_oss", tmp_path)
    want = bench.pair(tmp_path, pools={"colocated": {}}).generate(PROMPTS, max_tokens=12)
    pools: dict[str, object] = {"prefill": {"max_batched_tokens": 24}, "decode": {"max_running": 4}}
    pair = bench.pair(tmp_path, pools=pools, kv={"checksums": True, "layer_groups": layer_groups})
    for _ in range(2):
        assert pair.generate(PROMPTS, max_tokens=12) == want
    failures = pair.decode.metrics.load_failures.labels("checksum")._value
    assert pair.decode.connector.terms("prefill-0#1").sum_tokens == 8
    assert failures.get() == 0
    transport, turned = pair.decode.transport, 0
    submit = transport.submit

    def turn(read: Read) -> int:
        nonlocal turned
        runs = read.runs
        if read.source == "blocks" and not turned and len(runs.sizes) > 1 and len(set(runs.sizes.tolist())) == 1:
            turned += 1
            read = read._replace(runs=runs._replace(source_offsets=np.roll(runs.source_offsets, 1)))
        return submit(read)

    transport.submit = turn  # type: ignore[method-assign]
    others = [[(token + 1) % 131 for token in prompt] for prompt in PROMPTS]
    alone = bench.pair(tmp_path, pools={"colocated": {}}).generate(others, max_tokens=12)
    assert pair.generate(others, max_tokens=12) == alone
    assert turned
    assert failures.get() == 1


def test_kv_is_read_while_later_chunks_compute(bench: Bench, tmp_path: Path) -> None:
    """Watermarks come in order, from the thread that waits for layers, and all before the prompt's end; what they tell
    of can be read before that."""
    make_checkpoint("llama", tmp_path)
    pools: dict[str, object] = {"prefill": {"max_batched_tokens": 16}, "decode": {}}
    pair = bench.pair(tmp_path, pools=pools, kv={"layer_groups": 3})
    ready: list[tuple[int, int]] = []
    threads = set()
    read_before_the_end = 0.0
    post = pair.post

    def noted(sender: str, to: str, message: Message) -> None:
        if isinstance(message, BlocksReady):
            threads.add(threading.current_thread().name)
        post(sender, to, message)

    def deliver(sender: str, to: str, message: Message) -> bool:
        nonlocal read_before_the_end
        if isinstance(message, BlocksReady):
            ready.append((message.layer_group, message.num_tokens))
        if isinstance(message, Prefilled):
            while pair.decode.connector.num_pulls:
                with pair.decode.here():
                    pair.decode.worker.step()
            read_before_the_end = pair.decode.metrics.transfer_bytes.labels("cuda_ipc", "prefill-0")._value.get()
        return True

    pair.post = noted  # type: ignore[method-assign]
    pair.deliver = deliver
    pair.submit(list(range(1, 51)), max_tokens=4)
    pair.run()
    assert ready == [(group, tokens) for tokens in (16, 32, 48, 50) for group in range(3)]
    assert threads == {"watermarks"}
    assert read_before_the_end == 7 * pair.decode.engine.cache.layout.block_bytes


def test_aborts_in_every_state(bench: Bench, tmp_path: Path) -> None:
    """After each, both sides are back where they were; neighbours say what they would have said."""
    make_checkpoint("qwen3", tmp_path)
    rng = random.Random(0)
    pools: dict[str, object] = {
        "prefill": {"max_batched_tokens": 16}, "decode": {"max_running": 4, "max_batched_tokens": 16},
    }  # fmt: skip
    pair = bench.pair(tmp_path, pools=pools, kv={"capacity": "1MiB"})
    prompt = list(range(1, 51))
    neighbour = pair.generate([prompt], max_tokens=20)[0]
    seen: Counter[StreamState] = Counter()
    wanted = {StreamState.WAITING, StreamState.LOADING, StreamState.PREFILLING, StreamState.RUNNING}
    rounds = 0
    while rounds < (60 if GPUS else 10) or (not wanted <= set(seen) and rounds < 300):
        rounds += 1
        kept = pair.submit(prompt, max_tokens=20)
        doomed = [
            pair.submit(
                [rng.randrange(131) for _ in range(rng.randrange(1, 120))],
                max_tokens=rng.randrange(1, 30),
                seeds=list(range(rng.choice([1, 1, 1, 3]))),
                prefill="" if rng.random() < 0.2 else None,
            )
            for _ in range(4)
        ]
        for ticket in doomed:
            for _ in range(rng.choice((0, 1, 2, 4, 8, 16, 64, 256))):
                pair.turn()
            for stream in pair.decode.worker._scheduler:  # type: ignore[union-attr]
                if stream.request.ticket == ticket:
                    seen[stream.state] += 1
            pair.abort(ticket)
        pair.run()
        assert pair.outputs[kept].tokens[0] == neighbour
        for node in pair.nodes.values():
            node.check_idle()
    assert wanted <= set(seen), seen


def test_prefill_dies_while_it_is_read(bench: Bench, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    want = bench.pair(tmp_path, pools={"colocated": {}}).generate(PROMPTS, max_tokens=12)
    for turns in range(2, 9) if GPUS else (3, 5):
        pair = bench.pair(tmp_path, pools={"prefill": {"max_batched_tokens": 32}, "decode": {}})
        tickets = [pair.submit(prompt, max_tokens=12) for prompt in PROMPTS]
        for _ in range(turns):
            pair.turn()
        node = pair.nodes["prefill-0#1"]
        pair.remove("prefill-0#1")
        assert isinstance(node.worker, PrefillWorker)
        node.worker.close()
        pair.run()
        assert [pair.outputs[ticket].tokens[0] for ticket in tickets] == want, turns
