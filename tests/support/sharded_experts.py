"""What ranks that share experts do to be compared with one that has all; each function is one rank's part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from tandem.core.clock import SystemClock
from tandem.core.config_experts import BalanceConfig, ExpertsConfig
from tandem.core.errors import WorkerError
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.core.metrics import ExpertMetrics
from tandem.engine.batch import Work
from tandem.engine.engine import Engine
from tandem.engine.expert_balancer import Balancer, first_placement
from tandem.engine.expert_parallel import STALL_S, ExpertGroup, StepSize
from tandem.engine.kv_cache import KVCache
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import experts_spec
from tandem.engine.models.spec import ModelSpec, read_spec
from tandem.engine.runner import Runner
from tandem.engine.sequence import Sequence
from tandem.engine.weights import load_weights
from tandem.eplb.maps import ExpertMaps
from tandem.kernels.device import describe
from tandem.kernels.expert_exchange import Buffers, Exchange
from tandem.kernels.moe_oracle import KERNELS
from tandem.kernels.moe_oracle import select as select_experts
from tandem.kernels.oracle import select
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.transports.shm import ShmTransport

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 8, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {},
}
# Prompts of each rank, by their lengths; what is beyond a rank's turn it spends idle.
PROMPTS = ((45, 9), (), (33,), (1, 2, 3))
NUM_OUTPUT = 6
NUM_ROUNDS = 4
NUM_EMPTY = 50


class Told(NamedTuple):
    """What a rank found."""

    difference: float
    """Of its logits from those of a rank alone, in units of the largest, or one."""
    same_tokens: bool
    num_idle: int
    """Steps that others had and it had not."""
    loads: list[list[int]]
    """[layers, local experts]"""


def engine_of(folder: Path, group: ExpertGroup | None, device: torch.device = CPU) -> Engine:
    """An engine in float32 with a rank's experts, or all."""
    spec = read_spec(folder)
    size = 1 if group is None else group.size
    ops = select(device, torch.float32, experts=experts_spec(spec, torch.float32, 1, size))
    model = Decoder(spec, 256, torch.float32, device, ops, experts=group)
    load_weights(model, folder)
    places = max(len(kv.layers) for kv in model.groups)
    layout = KVLayout(places, spec.num_kv_heads, spec.head_dim, 8, "float32", spec.num_kv_parts)
    cache = KVCache(layout, 64, device)
    return Engine(Runner(model, cache.tensor, [0]), cache, prefix_cache=False)


def logits_of(engine: Engine, lengths: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Compute prompts in chunks of 20, beside each other, then greedy tokens: the logits after each step."""
    prompts = [[(11 * i * i + 13 * j + n) % 131 for j in range(n)] for i, n in enumerate(lengths)]
    sequences = [
        Sequence(f"r{i}", prompt, len(prompt), [Child(0, i)], Sampling(logprobs=1), root_hash("experts"))
        for i, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        assert engine.reserve(sequence, sequence.num_tokens + NUM_OUTPUT)
    forward, seen = engine.model.forward, []
    engine.model.forward = lambda *given: seen.append(forward(*given)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    while todo := [sequence for sequence in sequences if sequence.num_output_tokens < NUM_OUTPUT]:
        plan = [Work(sequence, min(20, sequence.num_tokens - sequence.num_computed)) for sequence in todo]
        for outcome in engine.step(plan):
            if outcome.samples is not None and outcome.samples[0] is not None:
                outcome.sequence.tokens.append(outcome.samples[0].token)
        yield seen.pop().cpu()
    for sequence in sequences:
        engine.free(sequence)
    engine.model.forward = forward  # type: ignore[method-assign]


def share(
    rank: int,
    size: int,
    folder: Path,
    num_redundant: int,
    device_type: str = "cpu",
    families: tuple[str, ...] = tuple(FAMILIES),
    forms: tuple[str, ...] = ("exact", "fixed"),
) -> dict[str, Told]:
    """Every checkpoint in both forms, with prompts of each rank's own, until nobody has anything to compute."""
    device = CPU
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    told = {}
    for family in families:
        want = list(logits_of(engine_of(folder / family, None, device), PROMPTS[rank]))
        for form in forms:
            group = _group_of(rank, size, folder / family, num_redundant, form != "exact", device)
            engine = engine_of(folder / family, group, device)
            group.join(f"file://{folder / 'rendezvous'}-{family}-{size}-{form}", device)
            if form == "direct" and device_type == "cpu":
                share_memory(group, read_spec(folder / family), folder / f"{family}-{size}")
            group.serve()
            got = list(logits_of(engine, PROMPTS[rank]))
            num_idle = 0
            while engine.accompany():
                num_idle += 1
            assert [logits.shape for logits in got] == [logits.shape for logits in want]
            pairs = [(a, b) for a, b in zip(got, want, strict=True) if len(a)]
            differences = [float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs]
            same = all(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs)
            told[f"{family} {form}"] = Told(max(differences, default=0.0), same, num_idle, group.loads.tolist())
            group.close()
    return told


def share_memory(group: ExpertGroup, spec: ModelSpec, path: Path) -> None:
    """Let ranks on CPUs write into each other's memory, which is a file's, by interpreted kernels."""
    assert spec.moe is not None
    buffers = Buffers(group.size, 4, spec.hidden, spec.moe.top_k, group.maps.num_local, torch.float32)
    memories = [
        torch.from_file(f"{path}-memory-{rank}", shared=True, size=buffers.num_bytes, dtype=torch.uint8)
        for rank in range(group.size)
    ]
    addresses = [memory.data_ptr() for memory in memories]
    group.direct = Exchange(group.rank, addresses, memories[group.rank], buffers, programs=2, polls=10_000_000)
    group.memories = memories  # type: ignore[attr-defined] # mapped as long as it is used


def share_directly(rank: int, size: int, folder: Path, families: tuple[str, ...]) -> dict[str, Told]:
    """`share` in the direct form, on CPUs."""
    os.environ["TRITON_INTERPRET"] = "1"
    return share(rank, size, folder, 0, "cpu", families, ("direct",))


def share_and_leave(rank: int, size: int, folder: Path, num_redundant: int) -> dict[str, Told]:
    """`share`; then, of two, the second leaves in the middle of a step. On CPUs: NCCL waits for those who are gone."""
    told = share(rank, size, folder, num_redundant)
    if size == 2:
        _leave(rank, folder)
    return told


def check(found: list[dict[str, Told]]) -> None:
    """What all ranks found is what one finds."""
    for case in found[0]:
        for rank, told in enumerate(found):
            print(f"{case}, rank {rank}: {told[case].difference:.1e}, idle {told[case].num_idle}")
            assert told[case].difference < 1e-5
            assert told[case].same_tokens
        # Every choice of every token counts in one place, and nothing else does.
        num_tokens = sum(length + NUM_OUTPUT - 1 for lengths in PROMPTS[: len(found)] for length in lengths)
        top_k = 2 if case.startswith(("mixtral", "gpt_oss")) else 3
        for layer in zip(*(told[case].loads for told in found), strict=True):
            assert sum(map(sum, layer)) == num_tokens * top_k
        # The longest prompt takes three chunks, with the last of which comes the first token.
        assert found[1][case].num_idle == NUM_OUTPUT + 2


def _leave(rank: int, folder: Path) -> None:
    """The second rank agrees to a step and ends; the first fails with a clear error, and soon."""
    group = _group_of(rank, 2, folder / "mixtral", 0, False)
    group.join(f"file://{folder / 'rendezvous'}-left", CPU)
    group.serve()
    if rank == 1:
        group.agree(StepSize.MANY)
        return
    started_s = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 0 of 2 that share experts: .* failed"):
        next(logits_of(engine_of(folder / "mixtral", group), (5,)))
    assert time.monotonic() - started_s < STALL_S


def _group_of(
    rank: int, size: int, folder: Path, num_redundant: int, fixed: bool, device: torch.device = CPU
) -> ExpertGroup:
    spec = read_spec(folder)
    wanted = experts_spec(spec, torch.float32, 1, size)
    assert spec.moe is not None
    assert wanted is not None
    config = ExpertsConfig(redundant=num_redundant)
    placement, topology = first_placement(len(spec.moe_layers), spec.moe.num_experts, size, config, 1)
    maps = ExpertMaps(placement, topology, rank, device)
    batched = KERNELS[select_experts(wanted._replace(format="batched"), describe(device)).backend]
    return ExpertGroup(rank, topology, maps, movable=config.balanced, fixed_rows=4 if fixed else 0, batched=batched)


def share_and_move(rank: int, size: int, folder: Path, families: tuple[str, ...], checksums: bool) -> dict[str, Told]:
    """`share` in the exact form, several times over, while experts move whenever anything would, and in idle steps."""
    told = {}
    for family in families:
        plain = engine_of(folder / family, None)
        want = [list(logits_of(plain, PROMPTS[rank])) for _ in range(NUM_ROUNDS)]
        group = _group_of(rank, size, folder / family, 2, fixed=False)
        engine = engine_of(folder / family, group)
        group.join(f"file://{folder / 'rendezvous'}-{family}-moving", CPU)
        group.serve()
        assert group.store is not None
        balancer = Balancer(
            group.loads,
            group.store,
            group.maps,
            group.topology,
            (group.exchange(), group.exchange()),
            lambda notify: {"shm": ShmTransport(notify)},
            BalanceConfig(when="interval", interval_steps=4, window_steps=4, exchange_steps=1, checksums=checksums),
            family,
            ExpertMetrics(CollectorRegistry()),
            SystemClock(),
        )
        group.boundary = balancer.boundary
        first = group.maps.placement.physical_to_logical
        difference, same, num_idle, num_moved = 0.0, True, 0, 0
        for wanted in want:
            got = list(logits_of(engine, PROMPTS[rank]))
            pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if len(a)]
            difference = max(
                [difference, *(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)]
            )
            same = same and all(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs)
            while engine.accompany():
                num_idle += 1
            for _ in range(NUM_EMPTY):  # nobody has work; what is being moved goes on
                assert not engine.accompany()
                time.sleep(0.001)
            num_moved += not np.array_equal(first, group.maps.placement.physical_to_logical)
        told[family] = Told(difference, same, num_idle, [[num_moved]])
        balancer.close()
        group.close()
    return told
