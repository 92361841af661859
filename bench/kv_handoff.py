"""Whole handoffs between two workers, each a process with a GPU of its own: what a prompt's KV takes beyond it."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.mesh import Mesh
from ..core.config import Config
from ..core.errors import WorkerError
from ..core.messages import Child, Generate, Message, Refused, Sampling, Stopping, Update, Usage
from .kv_copies import percentiles
from .worker_process import Workers

_TIMEOUT_S = 300.0
_PEERS = {"prefill": "prefill-0#1", "decode": "decode-0#1"}


def handoff_config(folder: Path, layer_groups: int, gpus: bool, longest: int) -> Config:
    """One prefill and one decode worker that leaves all prompts to it."""
    pool = {"gpus_per_replica": int(gpus)}
    model = {"path": str(folder), "max_model_len": longest + 64}
    return Config.model_validate(
        {
            "model": model | ({"load": "dummy"} if gpus else {}),
            "pools": {
                "prefill": pool | {"max_batched_tokens": 8192, "max_running": 4},
                "decode": pool | {"max_running": 8},
            },
            "kv": {"layer_groups": layer_groups, "prefix_cache": False},
            "routing": {"local_prefill": "never"},
        }
    )


def handoff_records(
    folder: Path, gpus: Sequence[int], lengths: Sequence[int], layer_groups: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """For each length: time to the first token, of the prefill, and from its end until the KV was there, verified.

    Args:
        folder: of the model.
        gpus: of prefill and of decode; empty: CPUs.
        lengths: of prompts, in tokens.
        layer_groups: in which KV is handed over.
        repeats: prompts of each length.

    Raises:
        WorkerError: a worker did not come, or refused a prompt.
    """
    config = handoff_config(folder, layer_groups, bool(gpus), max(lengths))
    inbox: queue.Queue[Message] = queue.Queue()
    workers = Workers(list(_PEERS.values()), config, gpus, lambda _, message: inbox.put(message))
    mesh = workers.mesh
    try:
        rng = np.random.default_rng(0)
        _await_link(mesh, inbox)
        ticket = 10_000
        for length in lengths:
            found = []
            for _ in range(repeats + 1):
                ticket += 1
                found.append(_ask(mesh, inbox, ticket, rng.integers(200, size=length).tolist()))
            seconds, usages = zip(*found[1:], strict=True)
            moved = usages[-1].transferred_bytes
            yield {
                "bench": "kv-handoff", "tokens": length, "layer_groups": layer_groups, "bytes": moved,
                "first_token_ms": percentiles([1e3 * s for s in seconds], 2),
                "prefill_ms": percentiles([1e3 * u.prefill_s for u in usages], 2),
                "transfer_after_prefill_ms": percentiles([1e3 * u.transfer_s for u in usages], 3),
                "of_prefill": round(float(np.median([u.transfer_s / u.prefill_s for u in usages])), 4),
                "bytes_per_unhidden_s": round(moved / float(np.median([u.transfer_s for u in usages])) / 1e9, 1),
            }  # fmt: skip
    finally:
        workers.close()


def _await_link(mesh: Mesh, inbox: queue.Queue[Message]) -> None:
    """Until decode reads from prefill: before, it computes prompts itself."""
    for ticket in range(1000):
        if _ask(mesh, inbox, ticket, [1] * 40)[1].transferred_bytes:
            return
        time.sleep(0.02)
    raise WorkerError("decode does not read from prefill")


def _ask(mesh: Mesh, inbox: queue.Queue[Message], ticket: int, tokens: list[int]) -> tuple[float, Usage]:
    """One prompt, two tokens: seconds to the first, and what the worker tells of it."""
    start_s = time.monotonic()
    request = Generate(
        ticket, f"r{ticket}", tokens, len(tokens), [Child(0, 0)], Sampling(), Stopping(2, []), prefill=_PEERS["prefill"]
    )
    mesh.send(_PEERS["decode"], request)
    first_s, usage, finished = 0.0, None, False
    while not finished or usage is None:
        message = inbox.get(timeout=_TIMEOUT_S)
        if isinstance(message, Refused):
            raise WorkerError(message.message)
        if isinstance(message, Update):
            for child in message.children:
                first_s = first_s or time.monotonic() - start_s
                finished |= child.finish is not None
            usage = next(iter(message.usages), usage)
    return first_s, usage
