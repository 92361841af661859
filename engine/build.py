"""From a configuration to an engine that is ready to compute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import psutil
import torch

from ..core.bounds import MAX_CHILDREN
from ..core.checkpoint import model_folder
from ..core.config import Config
from ..core.errors import ConfigError
from ..core.hashing import root_hash
from ..core.messages import Child, Sampling
from ..kernels import copy_runs
from ..kernels.compiled import set_num_threads
from ..kernels.linear import MAX_COMPILED_WEIGHTS
from ..kernels.moe import MAX_COMPILED_EXPERT
from ..kernels.oracle import FUSED, REFERENCE, compiled, recordable, select
from ..kernels.prefill_attention import prepare
from ..kv_transfer.layout import KVLayout, group_layers, layer_groups
from .allocator import num_blocks_needed
from .batch import Work
from .engine import Engine
from .expert_parallel import ExpertGroup, ExpertPlace, make_group
from .graphs import DecodeGraphs
from .kv_cache import KV_DTYPES, TORCH_DTYPES, KVCache, plan_num_blocks
from .memory import DeviceMemory, lacking, profile_steps
from .models.decoder import Decoder
from .models.experts import experts_spec
from .models.shard import local_kv_heads
from .models.spec import ModelSpec, context_length, read_spec
from .row_state import RowState, RowTable
from .runner import Runner
from .sequence import Sequence
from .tensor_parallel import Alone, Group
from .weights import check_weights, fill_dummy, fingerprint, load_weights, num_bytes

Progress = Callable[[str, float], None]
"""Called with what is being done, and which share of it is."""


class Built(NamedTuple):
    """An engine and what others need to know about it."""

    engine: Engine
    fingerprint: str
    max_model_len: int


def build_engine(
    config: Config,
    max_running: int,
    device: torch.device,
    progress: Progress,
    max_batched_tokens: int = 2048,
    overlap: bool | None = None,
    group: Group = Alone(),
    agree: Callable[[int], int] = lambda num_blocks: num_blocks,
    place: ExpertPlace | None = None,
) -> Built:
    """Read the model and make the cache. Blocks for as long as reading takes.

    Args:
        config: model and kv sections are used.
        max_running: sequences at a time, for the cache's size.
        device: where to compute.
        progress: told what happens.
        max_batched_tokens: tokens of a step; KV groups with a window keep room for as many, and a GPU's memory for such
            a step.
        overlap: whether the host runs a step ahead of the device. Default: on a GPU.
        group: the ranks that share the model.
        agree: makes of the blocks that this rank has room for those that all have.
        place: among the ranks that share the experts, each with requests of its own; None: all experts are here. When
            the weights are there, blocks until the others have come.

    Raises:
        ConfigError: the model cannot be served as configured, or does not fit.
        WorkerError: a rank that shares the experts did not come.
    """
    # The thread that steps waits for others' Python 0.2 ms, not 5: tiers and transports have threads beside it.
    sys.setswitchinterval(2e-4)
    folder = model_folder(config, weights=config.model.load == "auto", progress=progress)
    spec = read_spec(folder)
    max_model_len = context_length(spec, config.model.max_model_len)
    kept_layers = config.hidden_states.layers
    if max(kept_layers, default=0) >= spec.num_layers:
        raise ConfigError(
            f"hidden_states.layers: there is no layer {max(kept_layers)}; the model has {spec.num_layers}, "
            "the first is 0"
        )
    dtype, kv_dtype = plan_dtypes(config, spec, device.type)
    shares = (1, place.size) if place else (group.size, 1)
    experts = experts_spec(spec, TORCH_DTYPES[dtype], *shares)
    expert_group: ExpertGroup | None = None
    if place is not None:
        expert_group = make_group(place, spec, experts, config.experts, device, max_running, group.size)
    scheme = spec.quantization.scheme if spec.quantization else None
    types = TORCH_DTYPES[dtype], KV_DTYPES[kv_dtype]
    ops = select(device, *types, config.model.kernels, experts, scheme, sinks=spec.sinks)
    # Half the bytes, the same numbers: compiled kernels widen bfloat16 as they read it.
    halved = config.model.dtype == "auto" and spec.dtype == "bfloat16" and compiled(ops) and _all_compiled(spec)
    matrix_dtype = torch.bfloat16 if halved else None
    groups = group_layers(spec.windows)
    layout = KVLayout(
        num_layers=max(len(group.layers) for group in groups),
        num_kv_heads=local_kv_heads(spec, group.size),
        head_dim=spec.head_dim,
        block_tokens=config.kv.block_tokens,
        dtype=kv_dtype,
        num_parts=spec.num_kv_parts,
    )
    meta = Decoder(spec, 16, TORCH_DTYPES[dtype], torch.device("meta"), REFERENCE, matrix_dtype, group, expert_group)
    check_weights(meta, None if config.model.load == "dummy" else folder)
    memory: DeviceMemory | None = None
    try:
        model = Decoder(spec, max_model_len, TORCH_DTYPES[dtype], device, ops, matrix_dtype, group, expert_group)
        if config.model.load == "dummy":
            fill_dummy(model, config.model.seed)
        else:
            load_weights(model, folder, lambda done, total: progress("weights", done / total))
        if expert_group is not None and place is not None:
            progress("waiting for those that share the experts", 0.0)
            if place.ranks is None:
                expert_group.join(place.meet(), device)
            else:
                expert_group.take(place.ranks, device)
        if device.type == "cuda":
            progress("largest steps (the first time compiles kernels)", 0.0)
            memory = profile_steps(model, layout, max_batched_tokens, max_running, max_model_len, kept_layers)
        available = psutil.virtual_memory().available // 4 if memory is None else memory.for_kv
        per_sequence = num_blocks_needed(groups, max_model_len, max_batched_tokens, layout.block_tokens)
        wanted = per_sequence * layout.block_bytes if config.kv.capacity == "auto" else config.kv.capacity
        if memory is not None and wanted > available:
            raise torch.OutOfMemoryError
        num_blocks = plan_num_blocks(layout, per_sequence, config.kv.capacity, max_running, max_model_len, available)
        cache = KVCache(layout, agree(num_blocks), device)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(device).total_memory
        raise lacking(spec, layout, num_bytes(meta), memory, total) from None
    table, runner = None, Runner(model, cache.tensor, layer_groups(spec.num_layers, config.kv.layer_groups))
    runner.kept_layers = kept_layers
    if device.type == "cuda" if overlap is None else overlap:
        # Outputs of one request may exceed the limit, when it is alone.
        num_rows, max_blocks = max_running + MAX_CHILDREN, -(-max_model_len // layout.block_tokens)
        table = RowTable(num_rows, max_blocks, len(groups))
        runner.state = RowState(num_rows, max_blocks, layout.block_tokens, device, ops, len(groups))
        together = expert_group is None or expert_group.direct is not None
        if device.type == "cuda" and recordable(ops) and together:
            runner.graphs = DecodeGraphs(model, cache.tensor, runner.state, max_running, table.spare)
    engine = Engine(runner, cache, config.kv.prefix_cache, table, max_batched_tokens)
    if config.kv.poison_freed:
        engine.pool.on_reuse = cache.poison
    return Built(engine, fingerprint(folder, config.model.load, dtype, config.model.seed), max_model_len)


def plan_dtypes(config: Config, spec: ModelSpec, device_type: str) -> tuple[str, str]:
    """Names of the types to compute with and to keep KV in.

    Raises:
        ConfigError: they do not go together on such a device.
    """
    # Half precision on a CPU is slower than float32, not faster.
    natural = spec.dtype if device_type != "cpu" and spec.dtype in TORCH_DTYPES else "float32"
    dtype = natural if config.model.dtype == "auto" else config.model.dtype
    kv_dtype = dtype if config.kv.dtype == "auto" else config.kv.dtype
    if device_type == "cpu" and dtype == "float32" and kv_dtype != "float32":
        raise ConfigError(
            f"kv.dtype: {kv_dtype} KV cannot be used by the float32 kernels of a CPU", fix="leave kv.dtype at auto"
        )
    return dtype, kv_dtype


def use_threads(engine: Engine, count: int) -> None:
    """Let one operation of the calling thread use ``count`` threads of the CPU.

    Torch's threads wait for each other at every operation; when all large work is in compiled kernels, which do not,
    torch gets one.
    """
    model = engine.model
    set_num_threads(count)
    torch.set_num_threads(1 if compiled(model.ops) and _all_compiled(model.spec) else count)


def _all_compiled(spec: ModelSpec) -> bool:
    """Whether every product of a model is small enough for a compiled kernel, and one serves its weights."""
    if spec.quantization is not None:
        return False
    heads, latent = spec.num_heads + 2 * spec.num_kv_heads, spec.latent
    head_dim = max(latent.query_dim, latent.value_dim, latent.row_dim) if latent else spec.head_dim
    sizes = [spec.vocab_size * spec.hidden, heads * head_dim * spec.hidden, 2 * spec.inner * spec.hidden]
    expert = 2 * spec.moe.inner * spec.hidden if spec.moe else 0
    return max(sizes) <= MAX_COMPILED_WEIGHTS and expert <= MAX_COMPILED_EXPERT


def warm_up(engine: Engine, max_batched_tokens: int, progress: Progress) -> None:
    """Run every kind of step once, so that the first request does not pay for compilation. Leaves no trace in the
    cache."""
    root = root_hash("warm-up")
    vocab = engine.model.spec.vocab_size
    prompt = min(max_batched_tokens, engine.cache.num_blocks * engine.block_tokens // len(engine.groups) // 4, 256)
    # One and several sequences, few tokens and many, new prompts beside sequences that decode.
    lengths = (prompt, 1, 5, 64, 5)
    batch: list[Sequence] = []
    for done, tokens in enumerate(lengths):
        # Before each: the first is the one that takes long.
        progress("warm-up (the first on a host compiles kernels)", done / len(lengths))
        sampling = Sampling(temperature=float(done % 2), top_p=0.9 if done == 3 else 1.0)
        ids = [(7 * done + i) % vocab for i in range(tokens)]
        sequence = Sequence("warm-up", ids, tokens, [Child(0, done)], sampling, root)
        if engine.reserve(sequence, tokens + 2 * len(lengths)):
            engine.step([Work(sequence, tokens), *(Work(other, 1) for other in batch)])
            batch.append(sequence)
            for other in batch:
                other.tokens.append(0)
            engine.step([Work(other, 1) for other in batch])
            for other in batch:
                other.tokens.append(0)
    for sequence in batch:
        engine.discard(sequence)
    model, local = engine.model, engine.model.local
    plain = local.latent is None and not local.sinks and engine.cache.tensor.dtype == model.dtype
    if model.ops.prefill_attention is FUSED.prefill_attention and plain:
        progress("attention plans", 0.0)
        longest = min(max_batched_tokens, local.max_positions)
        prepare(local.num_heads, local.num_kv_heads, local.head_dim, model.dtype, model.device, longest)
    engine.runner.capture(lambda done: progress("CUDA graphs", done))
    page = np.zeros(1, np.uint8)
    one = np.zeros(1, np.int64)
    copy_runs.native(page, page.copy(), one, one, one)
