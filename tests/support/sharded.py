"""What ranks do to compare a model that they share with the whole of it; each function is one rank's part."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tandem.core.errors import WorkerError
from tandem.core.hashing import root_hash
from tandem.core.messages import Child, Sampling
from tandem.engine.batch import Work
from tandem.engine.engine import Engine
from tandem.engine.kv_cache import KVCache
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import experts_spec
from tandem.engine.models.shard import local_kv_heads
from tandem.engine.models.spec import read_spec
from tandem.engine.runner import Runner
from tandem.engine.sequence import Sequence
from tandem.engine.tensor_parallel import Alone, Group, TorchGroup
from tandem.engine.weights import load_weights
from tandem.kernels.oracle import select
from tandem.kv_transfer.layout import KVLayout

from .checkpoints import make_checkpoint

# Eight query heads, so that they divide; two key and value heads, fewer than four ranks; a vocabulary of 131 does not.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4},
    "mistral": {"num_attention_heads": 8},
    "qwen2": {"num_attention_heads": 8, "head_dim": 8},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "qwen3_moe": {"num_attention_heads": 8, "moe_intermediate_size": 20},
    "mixtral": {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 8},
    "gpt_oss": {"num_attention_heads": 8, "intermediate_size": 20},
    "deepseek_v3": {"num_attention_heads": 8, "num_key_value_heads": 8},
}
BLOCK_TOKENS = 8


class Said(NamedTuple):
    """What a model made of the prompts."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    """Of each step, on the CPU."""
    last: tuple[Any, ...]
    """What the last step's forward pass was called with."""

    def digest(self) -> str:
        """Of the logits' bits."""
        together = hashlib.blake2b(digest_size=16)
        for logits in self.logits:
            together.update(logits.contiguous().numpy().tobytes())
        return together.hexdigest()


def make_checkpoints(folder: Path) -> None:
    """One folder a family."""
    for family, changes in FAMILIES.items():
        make_checkpoint(family, folder / family, **changes)


def engine_of(folder: Path, group: Group, device: torch.device) -> Engine:
    """An engine in float32 over a rank's part of a checkpoint."""
    spec = read_spec(folder)
    ops = select(device, torch.float32, experts=experts_spec(spec, torch.float32, group.size))
    model = Decoder(spec, 256, torch.float32, device, ops, group=group)
    load_weights(model, folder)
    heads = local_kv_heads(spec, group.size)
    places = max(len(kv.layers) for kv in model.groups)
    layout = KVLayout(places, heads, spec.head_dim, BLOCK_TOKENS, "float32", spec.num_kv_parts)
    cache = KVCache(layout, 64, device)
    return Engine(Runner(model, cache.tensor, [0]), cache, prefix_cache=False)


def say(engine: Engine, count: int) -> Said:
    """Two prompts in chunks of 20, beside each other, then ``count`` greedy tokens of each."""
    prompts = [[(7 * i * i + 13 * j) % 131 for j in range(length)] for i, length in enumerate((45, 9))]
    sequences = [
        Sequence(f"r{i}", prompt, len(prompt), [Child(0, i)], Sampling(), root_hash("ranks"))
        for i, prompt in enumerate(prompts)
    ]
    seen: list[torch.Tensor] = []
    last: tuple[Any, ...] = ()
    forward = engine.model.forward

    def keep(*arguments: Any) -> torch.Tensor:
        nonlocal last
        last = arguments
        logits = forward(*arguments)
        seen.append(logits.cpu().clone())
        return logits

    engine.model.forward = keep  # type: ignore[assignment,method-assign]
    for sequence in sequences:
        assert engine.reserve(sequence, sequence.num_tokens + count)
    while todo := [sequence for sequence in sequences if sequence.num_output_tokens < count]:
        plan = [Work(sequence, min(20, sequence.num_tokens - sequence.num_computed)) for sequence in todo]
        for outcome in engine.step(plan):
            if outcome.samples is not None:
                assert outcome.samples[0] is not None
                outcome.sequence.tokens.append(outcome.samples[0].token)
    for sequence in sequences:
        engine.pool.release(sequence.drop_blocks())
    engine.model.forward = forward  # type: ignore[method-assign]
    return Said([sequence.tokens[sequence.num_prompt_tokens :] for sequence in sequences], seen, last)


def difference(got: Said, want: Said) -> float:
    """The largest difference between two models' logits, in units of the largest logit, or one."""
    assert got.tokens == want.tokens
    assert [logits.shape for logits in got.logits] == [logits.shape for logits in want.logits]
    pairs = [(a, b) for a, b in zip(got.logits, want.logits, strict=True) if len(a)]
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)


def on_cpus(rank: int, size: int, folder: Path) -> dict[str, tuple[str, float]]:
    """Every family, shared over gloo: a digest of the logits and, on the first rank, their distance from the whole
    model's. Then the last rank leaves without a word."""
    cpu = torch.device("cpu")
    group = TorchGroup(rank, size, f"file://{folder / 'rendezvous'}{size}", cpu, timeout_s=60)
    assert group.all_reduce(torch.full((3,), rank + 1.0)).tolist() == [size * (size + 1) / 2] * 3
    gathered = group.all_gather(torch.tensor([[rank, 10 + rank], [20 + rank, 30 + rank]]))
    assert gathered.tolist() == [[n for r in range(size) for n in (tens + r, tens + 10 + r)] for tens in (0, 20)]
    found = {}
    for family in FAMILIES:
        said = say(engine_of(folder / family, group, cpu), 12)
        distance = difference(said, say(engine_of(folder / family, Alone(), cpu), 12)) if rank == 0 else 0.0
        found[family] = said.digest(), distance
        group.barrier()
    group.check()
    if rank == 0 and size == 2:
        with pytest.raises(WorkerError, match="rank 0 of 2"):  # the other is gone
            group.barrier()
        group.close()
        with pytest.raises(WorkerError, match="rank 0 of 2: joining the group failed"):
            TorchGroup(0, 2, f"file://{folder / 'nobody'}", cpu, timeout_s=1)
    elif size > 2:
        group.close()
    return found


def on_gpus(rank: int, size: int, folder: Path, direct: bool) -> dict[str, tuple[str, float]]:
    """`on_cpus` over NCCL and, where ``direct``, peers' memory; the last step again as a CUDA graph."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", rank)
    group = TorchGroup(rank, size, f"file://{folder / 'rendezvous'}{size}{direct}", device, direct=direct)
    assert not group.why_not_direct, group.why_not_direct
    found = {}
    for family in FAMILIES:
        engine = engine_of(folder / family, group, device)
        said = say(engine, 12)
        said.logits.append(recorded(engine, said))
        distance = 0.0
        if rank == 0:
            alone = say(engine_of(folder / family, Alone(), device), 12)
            alone.logits.append(alone.logits[-1])
            distance = difference(said, alone)
        found[family] = said.digest(), distance
        group.barrier()  # a sum that waits on the device while the first rank compiles kernels would give up
    group.check()
    group.close()
    return found


@torch.inference_mode()
def recorded(engine: Engine, said: Said) -> torch.Tensor:
    """The logits of the last step, of the tenth replay of a graph."""
    batch, cache = said.last[:2]
    graph = torch.cuda.CUDAGraph()
    # NCCL has a thread that asks after its events, which another mode of recording forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = engine.model.forward(batch, cache)
    for _ in range(10):
        logits.fill_(torch.nan)
        graph.replay()
    return logits.cpu()
