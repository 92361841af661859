"""What ranks that share experts do to be compared with one that has all; each function is one rank's part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from tandem.core.clock import SystemClock
from tandem.core.config import Config
from tandem.core.config_experts import BalanceConfig, ExpertsConfig
from tandem.core.errors import WorkerError
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.core.metrics import ExpertMetrics
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.engine.batch import Work
from tandem.engine.build import warm_up
from tandem.engine.engine import Engine
from tandem.engine.expert_balancer import Balancer, first_placement
from tandem.engine.expert_parallel import STALL_S, ExpertGroup, ExpertPlace, StepSize, meet
from tandem.engine.kv_cache import KVCache
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import experts_spec
from tandem.engine.models.shard import local_kv_heads
from tandem.engine.models.spec import ModelSpec, read_spec
from tandem.engine.open_balancer import open_balancer
from tandem.engine.rank_wire import PeerAccess
from tandem.engine.ranks import build_on_ranks
from tandem.engine.runner import Runner
from tandem.engine.sequence import Sequence
from tandem.engine.tensor_parallel import Alone, Group
from tandem.engine.weights import load_weights
from tandem.eplb.maps import ExpertMaps
from tandem.eplb.store import checksum
from tandem.kernels.device import describe
from tandem.kernels.expert_exchange import Buffers, Exchange
from tandem.kernels.moe_oracle import KERNELS
from tandem.kernels.moe_oracle import select as select_experts
from tandem.kernels.oracle import select
from tandem.kv_transfer.layout import KVLayout
from tandem.kv_transfer.transports.shm import ShmTransport

CPU = torch.device("cpu")
ROOT = root_hash("experts")
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 8, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {},
}
# Prompts of each rank, by their lengths; what is beyond a rank's turn it spends idle.
PROMPTS = ((45, 9), (), (33,), (1, 2, 3))
NUM_OUTPUT = 6
NUM_TOKENS = 24
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


def engine_of(folder: Path, group: ExpertGroup | None, device: torch.device = CPU, layers: Group = Alone()) -> Engine:
    """An engine in float32 with a rank's experts, or all, and its part of the layers."""
    spec = read_spec(folder)
    size = 1 if group is None else group.size
    ops = select(device, torch.float32, experts=experts_spec(spec, torch.float32, 1, size))
    model = Decoder(spec, 256, torch.float32, device, ops, group=layers, experts=group)
    load_weights(model, folder)
    places = max(len(kv.layers) for kv in model.groups)
    layout = KVLayout(places, local_kv_heads(spec, layers.size), spec.head_dim, 8, "float32", spec.num_kv_parts)
    cache = KVCache(layout, 64, device)
    return Engine(Runner(model, cache.tensor, [0]), cache, prefix_cache=False)


def logits_of(engine: Engine, lengths: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Compute prompts in chunks of 20, beside each other, then greedy tokens: the logits after each step."""
    prompts = [[(11 * i * i + 13 * j + n) % 131 for j in range(n)] for i, n in enumerate(lengths)]
    sequences = [
        Sequence(f"r{i}", prompt, len(prompt), [Child(0, i)], Sampling(logprobs=1), ROOT)
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
            direct = form == "direct"
            group = _group_of(rank, size, folder / family, num_redundant, form != "exact", device, direct=direct)
            engine = engine_of(folder / family, group, device)
            group.join(f"file://{folder / 'rendezvous'}-{family}-{size}-{form}", device)
            if direct and device_type == "cpu":
                share_memory(group, read_spec(folder / family), folder / f"{family}-{size}")
            group.serve()
            assert not direct or group.direct is not None, group.why_not_direct
            told[f"{family} {form}"] = _compare(engine, group, want, PROMPTS[rank])
            group.close()
    return told


def share_both(rank: int, size: int, folder: Path, tensor_parallel: int, families: tuple[str, ...]) -> dict[str, Told]:
    """Layers among neighbours, and experts among all, on CPUs."""
    told = {}
    worker = rank // tensor_parallel
    for family in families:
        want = list(logits_of(engine_of(folder / family, None), PROMPTS[worker]))
        ranks = meet(rank, size, f"file://{folder / 'rendezvous'}-{family}-{size}-both", CPU)
        layers = ranks.part(tensor_parallel)
        group = _group_of(rank, size, folder / family, 0, False, CPU, tensor_parallel)
        engine = engine_of(folder / family, group, CPU, layers)
        group.take(ranks, CPU)
        group.serve()
        told[family] = _compare(engine, group, want, PROMPTS[worker])
        layers.close()
        group.close()
    return told


def _compare(engine: Engine, group: ExpertGroup, want: list[torch.Tensor], lengths: tuple[int, ...]) -> Told:
    """A rank's prompts, and then the others'."""
    got = list(logits_of(engine, lengths))
    num_idle = 0
    while engine.accompany():
        num_idle += 1
    assert [logits.shape for logits in got] == [logits.shape for logits in want]
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if len(a)]
    differences = [float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs]
    same = all(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs)
    return Told(max(differences, default=0.0), same, num_idle, group.loads.tolist())


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


def on_graphs(rank: int, size: int, folder: Path, family: str) -> tuple[list[list[int]], bool]:
    """On GPUs, as workers are built: decode steps are graphs over peers' memory, and an idle rank replays them, too.

    Returns:
        (output tokens of one with all experts, with logits that were not numbers as −1; whether ranks say the same).
    """
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = _config(folder / family, {"gpus_per_replica": 1})
    alone = _say(config, PROMPTS[rank], None)
    place = ExpertPlace(rank, size, lambda: f"file://{folder / 'rendezvous'}-{family}-{size}-graphs")
    return alone, _say(config, PROMPTS[rank], place) == alone


def as_workers(worker: int, size: int, folder: Path, family: str) -> tuple[list[list[int]], bool]:
    """On CPUs, as workers are built, of two processes each, between all of which experts move; as `on_graphs`."""
    alone = _say(_config(folder / family, {}), PROMPTS[worker], None)
    several = {"tensor_parallel": 2, "replicas": size, "expert_parallel": size}
    often = {"when": "interval", "interval_steps": 4, "window_steps": 4, "exchange_steps": 1, "checksums": True}
    experts = {"redundant": 4, "balance": often | {"enabled": True}}
    config = _config(folder / family, several, experts)
    place = ExpertPlace(worker, size, lambda: f"file://{folder / 'rendezvous'}-{family}-workers")
    return alone, _say(config, PROMPTS[worker], place) == alone


def _config(folder: Path, pool: dict[str, int], experts: dict[str, Any] | None = None) -> Config:
    limits = {"max_running": 4, "max_batched_tokens": 32}
    return Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32", "max_model_len": 128},
            "kv": {"capacity": "8MB"},
            "pools": {"colocated": limits | pool},
            "experts": experts or {},
        }
    )


def _say(config: Config, lengths: tuple[int, ...], place: ExpertPlace | None) -> list[list[int]]:
    """Greedy tokens of a worker, until the others have done theirs."""
    pool = config.pools.colocated
    assert pool is not None
    built, others = build_on_ranks(config, pool, 1, lambda *_: None, place)
    engine, experts = built.engine, built.engine.model.experts
    warm_up(engine, pool.max_batched_tokens, lambda *_: None)
    engine.runner.serve()
    balancer = None
    if experts is not None and others is not None and config.experts.balanced:
        access = PeerAccess(make_cluster_keys(), "127.0.0.1")
        others.balance(access)
        metrics = ExpertMetrics(CollectorRegistry())
        balancer = open_balancer(
            experts, config, SecureContext(access.keys), access.address, str, metrics, SystemClock()
        )  # fmt: skip
        assert balancer is not None
    if pool.gpus_per_replica:
        assert engine.runner.graphs is not None
        assert experts is None or experts.direct is not None, experts.why_not_direct
    said = []
    for _ in range(1 if balancer is None else NUM_ROUNDS):
        said.append(_say_once(engine, lengths))
        for _ in range(0 if balancer is None else NUM_EMPTY):  # nobody has work; what is being moved goes on
            assert not engine.accompany()
            time.sleep(0.002)
    assert all(one == said[0] for one in said)
    if balancer is not None:
        assert not balancer.leads or balancer.report().total_moved > 0  # type: ignore[union-attr]
        balancer.close()
    if others is not None:
        others.close()
    if pool.gpus_per_replica and experts is not None:
        torch.cuda.synchronize()
        experts.check()
        engine.runner.graphs = None
        experts.close()
    return said[0]


def _say_once(engine: Engine, lengths: tuple[int, ...]) -> list[list[int]]:
    sequences = [
        Sequence(f"r{i}", [(11 * j * j + 13 * i + n) % 131 for j in range(n)], n, [Child(0, i)], Sampling(), ROOT)
        for i, n in enumerate(lengths)
    ]
    for sequence in sequences:
        assert engine.reserve(sequence, sequence.num_tokens + NUM_TOKENS)
    while todo := [sequence for sequence in sequences if sequence.num_output_tokens < NUM_TOKENS]:
        plan = [Work(sequence, min(20, sequence.num_tokens - sequence.num_computed)) for sequence in todo]
        for outcome in engine.step(plan):
            if outcome.samples is not None:
                outcome.sequence.tokens.append(-1 if outcome.samples[0] is None else outcome.samples[0].token)
    while engine.accompany():
        pass
    tokens = [sequence.tokens[sequence.num_prompt_tokens :] for sequence in sequences]
    for sequence in sequences:
        engine.free(sequence)
    return tokens


def share_and_leave(rank: int, size: int, folder: Path, num_redundant: int) -> dict[str, Told]:
    """`share`; then, of two, the second leaves in the middle of a step. On CPUs: NCCL waits for those who are gone."""
    told = share(rank, size, folder, num_redundant)
    if size == 2:
        _leave(rank, folder)
    return told


def check(found: list[dict[str, Told]], tensor_parallel: int = 1) -> None:
    """What all ranks found is what one finds; so many neighbours had the same prompts."""
    for case in found[0]:
        for rank, told in enumerate(found):
            print(f"{case}, rank {rank}: {told[case].difference:.1e}, idle {told[case].num_idle}")
            assert told[case].difference < 1e-5
            assert told[case].same_tokens
        # Every choice of every token counts in one place, and nothing else does.
        prompts = PROMPTS[: len(found) // tensor_parallel]
        num_tokens = sum(length + NUM_OUTPUT - 1 for lengths in prompts for length in lengths)
        top_k = 2 if case.startswith(("mixtral", "gpt_oss")) else 3
        for layer in zip(*(told[case].loads for told in found), strict=True):
            assert sum(map(sum, layer)) == num_tokens * top_k
        # The longest prompt takes three chunks, with the last of which comes the first token.
        assert found[tensor_parallel][case].num_idle == NUM_OUTPUT + 2


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
    rank: int,
    size: int,
    folder: Path,
    num_redundant: int,
    fixed: bool,
    device: torch.device = CPU,
    tensor_parallel: int = 1,
    *,
    direct: bool = False,
    learned: bytes = b"",
) -> ExpertGroup:
    spec = read_spec(folder)
    wanted = experts_spec(spec, torch.float32, 1, size)
    assert spec.moe is not None
    assert wanted is not None
    config = ExpertsConfig(redundant=num_redundant)
    placement, topology = first_placement(len(spec.moe_layers), spec.moe.num_experts, size, config, 1, learned)
    maps = ExpertMaps(placement, topology, rank, device)
    batched = KERNELS[select_experts(wanted._replace(format="batched"), describe(device)).backend]
    buffers = None
    if device.type == "cuda" and direct:
        buffers = Buffers(size, 4, spec.hidden, spec.moe.top_k, maps.num_local, torch.float32)
    return ExpertGroup(
        rank,
        topology,
        maps,
        movable=config.balanced,
        fixed_rows=4 if fixed else 0,
        batched=batched,
        buffers=buffers,
        tensor_parallel=tensor_parallel,
    )


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
        kept: list[bytes] = []
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
            keep=kept.append,
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
        exchange = group.exchange()
        while b"moving" in exchange.gather(_state(balancer)):
            assert not engine.accompany()
            time.sleep(0.001)
        balancer.close()
        [learned, *_] = exchange.gather(kept[-1] if balancer.leads else b"")
        _go_on(rank, size, folder, family, group, learned)
    return told


def _state(balancer: Balancer) -> bytes:
    report = balancer.report()
    return b"" if report is None else report.state.encode()


def _go_on(rank: int, size: int, folder: Path, family: str, before: ExpertGroup, learned: bytes) -> None:
    """The group that takes its place reads each expert where it was moved to, to the bit, and says the same."""
    assert before.store is not None
    moved = [[checksum(tensors, slot) for slot in range(before.maps.num_local)] for tensors in before.store.live]
    group = _group_of(rank, size, folder / family, 2, fixed=False, learned=learned)
    engine = engine_of(folder / family, group)
    assert group.store is not None
    read = [[checksum(tensors, slot) for slot in range(group.maps.num_local)] for tensors in group.store.live]
    assert read == moved
    first = first_placement(len(read), group.maps.placement.num_logical, size, ExpertsConfig(redundant=2), 1)[0]
    assert not np.array_equal(group.maps.placement.physical_to_logical, first.physical_to_logical)
    before.close()
    group.join(f"file://{folder / 'rendezvous'}-{family}-going-on", CPU)
    group.serve()
    want = list(logits_of(engine_of(folder / family, None), PROMPTS[rank]))
    for got, wanted in zip(logits_of(engine, PROMPTS[rank]), want, strict=True):
        assert bool((got.argmax(-1) == wanted.argmax(-1)).all())
    while engine.accompany():
        pass
    group.close()
