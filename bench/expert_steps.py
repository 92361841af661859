"""Decode steps of a model by ranks that share experts, and by ranks that share layers, on as many GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core.config import Config
from ..engine.expert_parallel import ExpertPlace
from .engine import EngineBench


class Task(NamedTuple):
    """What is to be measured.

    Args:
        device: "cuda" or "cpu".
        model: a config.json's text; weights are made up.
        batch: sequences of all ranks together.
        context: tokens of a prompt.
        steps: of a generation.
        chunk: tokens of a step with prompts.
        ranks: that share layers; those that share experts are counted by who starts them.
    """

    device: str
    model: str
    batch: int
    context: int
    steps: int
    chunk: int
    ranks: int = 1


def share_experts(rank: int, size: int, task: Task, folder: str) -> dict[str, Any]:
    """One rank's part, with its share of the sequences."""
    if task.device == "cuda":
        torch.cuda.set_device(rank)
    batch = task.batch // size
    place = ExpertPlace(rank, size, lambda: f"file://{folder}/rendezvous")
    config = _config(task, folder, batch, rank, {"expert_parallel": size, "replicas": size})
    pool = config.pools.colocated
    assert pool is not None
    bench = EngineBench(config, pool, torch.device(task.device), place)
    experts = bench.engine.model.experts
    assert experts is not None
    direct = "peer memory" if experts.direct is not None else experts.why_not_direct or "no"
    graphs = bench.engine.runner.graphs is not None
    seconds = bench.decode_step_s(batch, task.context, task.steps)
    bench.engine.runner.graphs = None
    experts.close()
    return {"sharing": "experts", "direct": direct, "graphs": graphs, "batch_a_rank": batch, "step_s": seconds}


def share_layers(_: int, __: int, task: Task, folder: str) -> dict[str, Any]:
    """The whole of it: the first rank starts the others."""
    config = _config(task, folder, task.batch, 0, {"tensor_parallel": task.ranks})
    pool = config.pools.colocated
    assert pool is not None
    bench = EngineBench(config, pool, torch.device(task.device))
    graphs = bench.engine.runner.graphs is not None
    seconds = bench.decode_step_s(task.batch, task.context, task.steps)
    bench.close()
    return {"sharing": "layers", "graphs": graphs, "batch_a_rank": task.batch, "step_s": seconds}


def _config(task: Task, folder: str, batch: int, rank: int, pool: dict[str, int]) -> Config:
    model = Path(folder) / f"model-{rank}"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(task.model)
    limit = min(int(json.loads(task.model)["max_position_embeddings"]), task.context + task.steps + 64)
    gpus = pool.get("tensor_parallel", 1) if task.device == "cuda" else 0
    limits = {"max_running": batch, "max_batched_tokens": task.chunk, "gpus_per_replica": gpus}
    return Config.model_validate(
        {
            "model": {"path": str(model), "load": "dummy", "max_model_len": limit},
            "pools": {"colocated": pool | limits},
            "kv": {"prefix_cache": False},
        }
    )
