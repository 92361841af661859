"""How much of a GPU the KV cache may take: what is free once the largest steps have run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.errors import ConfigError
from ..core.hashing import root_hash
from ..core.messages import Child, Sampling
from ..core.units import format_bytes
from ..kv_transfer.layout import KVLayout, group_layers
from .batch import Work
from .engine import Engine
from .kv_cache import KVCache
from .models.decoder import Decoder
from .models.spec import ModelSpec
from .runner import Runner
from .sequence import Sequence

_MARGIN_BYTES = 1 << 30
"""For what no step shows: CUDA graphs and loaded kernels, and memory that lies between allocations."""


class DeviceMemory(NamedTuple):
    """Of one GPU, in bytes."""

    total: int
    free: int
    """With the weights loaded."""
    weights: int
    steps: int
    """What the largest prefill step and the largest decode step take."""

    @property
    def for_kv(self) -> int:
        """What the cache may take."""
        return self.free - self.steps - _MARGIN_BYTES


def profile_steps(
    model: Decoder,
    layout: KVLayout,
    max_batched_tokens: int,
    max_running: int,
    max_model_len: int,
    kept_layers: tuple[int, ...] = (),
) -> DeviceMemory:
    """Run the largest steps with a small cache, and see what they take. Blocks for seconds: kernels are compiled.

    Args:
        model: with its weights, on a GPU.
        layout: of the cache to be.
        max_batched_tokens: tokens of a step.
        max_running: sequences of a step.
        max_model_len: tokens of the longest sequence.
        kept_layers: whose outputs are kept for those who ask.

    Raises:
        torch.OutOfMemoryError: not even these fit.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    weights = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    length = min(max_batched_tokens, max_model_len - 1)
    lengths = [length] * (max_batched_tokens // length)
    num_blocks = len(model.groups) * max(sum(-(-(n + 1) // layout.block_tokens) for n in lengths), max_running)
    cache = KVCache(layout, num_blocks, model.device)
    runner = Runner(model, cache.tensor, (0,))
    runner.kept_layers = kept_layers
    engine = Engine(runner, cache, prefix_cache=False)
    before = torch.cuda.memory_allocated(model.device)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    peak = 0
    for batch in (lengths, [1] * max_running):
        sequences = [
            Sequence("profile", [0] * n, n, [Child(0, 0)], sampling, root_hash("profile"), -1, bool(kept_layers))
            for n in batch
        ]
        for sequence in sequences:
            engine.reserve(sequence, sequence.num_tokens)
        engine.step([Work(sequence, sequence.num_tokens) for sequence in sequences])
        for sequence in sequences:
            engine.discard(sequence)
        peak += torch.cuda.max_memory_allocated(model.device) - before
        torch.cuda.reset_peak_memory_stats(model.device)
    cache.close()
    del engine, cache
    torch.cuda.empty_cache()
    return DeviceMemory(total, free, weights, peak)


def lacking(
    spec: ModelSpec, layout: KVLayout, weights_bytes: int, known: DeviceMemory | None, total: int
) -> ConfigError:
    """The error that says what a GPU lacks memory for, and which keys help.

    Args:
        spec: of the model.
        layout: of the cache.
        weights_bytes: of the model on this GPU.
        known: what was measured, if it came to that.
        total: the GPU's memory in bytes.
    """
    thousand = format_bytes(len(group_layers(spec.windows)) * 1000 * layout.block_bytes // layout.block_tokens)
    steps = f"the largest steps and their graphs {format_bytes(known.steps + _MARGIN_BYTES)}, " if known else ""
    return ConfigError(
        f"out of device memory: of {format_bytes(total)}, {spec.architecture}'s weights take "
        f"{format_bytes(weights_bytes)}, {steps}and each 1,000 tokens of KV"
        f"{', within a window,' if any(spec.windows) else ''} {thousand}",
        fix="lower kv.capacity, model.max_model_len, pools.*.max_batched_tokens or pools.*.max_running, "
        "or use a larger GPU",
    )
