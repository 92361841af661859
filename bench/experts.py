"""`python -m tandem.bench.experts`: ranks of one host that have different experts. A process a GPU, without Ray.

exchange: dispatch and combine, through peers' memory and by NCCL's all-to-all: p50 and p99 over replays of a graph.
decode: steps of a model by ranks that share experts, and by ranks that share layers, with the same number of sequences.
Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ConfigError
from . import expert_exchange, expert_steps
from .kernels import MODELS
from .machine import describe

_PARTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "exchange": (expert_exchange.measure, expert_exchange.Task),
    "share_experts": (expert_steps.share_experts, expert_steps.Task),
    "share_layers": (expert_steps.share_layers, expert_steps.Task),
}
"""What a rank does, and with what."""


def on_ranks(size: int, part: str, task: Sequence[Any], *, interpreted: bool = False) -> list[Any]:
    """What the ranks found, each a process of its own. One that fails ends the others.

    Args:
        size: ranks.
        part: of `_PARTS`.
        task: what to measure.
        interpreted: Triton's kernels are, by CPUs.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        given = [part, json.dumps(task), folder, str(size)]
        sets = ["env", "TRITON_INTERPRET=1"] if interpreted else []
        ranks = [
            subprocess.Popen([*sets, sys.executable, "-m", "tandem.bench.experts", "rank", *given, str(rank)])
            for rank in range(size)
        ]
        try:
            while any(rank.poll() is None for rank in ranks):
                if any(rank.returncode for rank in ranks):
                    break
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks):
            raise ConfigError("a rank failed, see above")
        return [json.loads((Path(folder) / f"found-{rank}").read_text()) for rank in range(size)]


def be_rank(part: str, task: str, folder: str, size: str, rank: str) -> None:
    """One process of `on_ranks`."""
    measure, kind = _PARTS[part]
    found = measure(int(rank), int(size), kind(*json.loads(task)), folder)
    (Path(folder) / f"found-{rank}").write_text(json.dumps(found))


def exchange_records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The slowest rank's figures; blocks for about a minute."""
    task = expert_exchange.Task(
        options.device, options.tokens, options.hidden, options.experts, options.top_k, options.dtype, options.programs,
        options.rounds, options.replays,
    )  # fmt: skip
    found = on_ranks(options.ranks, "exchange", task, interpreted=options.device == "cpu")
    yield from (max(records, key=lambda record: record["p50_us"]) for records in zip(*found, strict=True))


def decode_records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both ways in turn, each in new processes, and how they compare; blocks for minutes."""
    model = json.dumps(MODELS[options.model]) if options.config is None else options.config.read_text()
    task = expert_steps.Task(options.device, model, options.batch, options.context, options.steps, options.chunk)
    best = {"experts": float("inf"), "layers": float("inf")}
    for _ in range(options.alternations):
        found = on_ranks(options.ranks, "share_experts", task)
        slowest = max(found, key=lambda record: record["step_s"])
        for record in (slowest, *on_ranks(1, "share_layers", task._replace(ranks=options.ranks))):
            best[record["sharing"]] = min(best[record["sharing"]], record["step_s"])
            seconds = record.pop("step_s")
            rate = round(options.batch / seconds, 1)
            yield record | {"step_ms": round(seconds * 1e3, 3), "tokens_per_s": rate}
    yield {"experts_against_layers": round(best["layers"] / best["experts"], 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print.

    Raises:
        ConfigError: too few GPUs, or they cannot read each other's memory.
    """
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.experts", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    exchange = parts.add_parser("exchange")
    exchange.add_argument("--tokens", type=int, default=128)
    exchange.add_argument("--hidden", type=int, default=7168)
    exchange.add_argument("--experts", type=int, default=256)
    exchange.add_argument("--top-k", type=int, default=8)
    exchange.add_argument("--dtype", default="bfloat16")
    exchange.add_argument("--programs", type=int, default=128)
    exchange.add_argument("--rounds", type=int, default=20)
    exchange.add_argument("--replays", type=int, default=100)
    decode = parts.add_parser("decode")
    decode.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    decode.add_argument("--config", type=Path, help="a config.json in its place")
    decode.add_argument("--batch", type=int, default=256, help="sequences of all ranks together")
    decode.add_argument("--context", type=int, default=512)
    decode.add_argument("--steps", type=int, default=128)
    decode.add_argument("--chunk", type=int, default=8192, help="tokens of a step with prompts")
    decode.add_argument("--alternations", type=int, default=1)
    for part in (exchange, decode):
        part.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
        part.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        raise ConfigError(
            f"{options.ranks} ranks need a GPU each, and {torch.cuda.device_count()} are here",
            fix="give --ranks, or --device cpu to see that it runs",
        )
    machine = describe()
    if options.device == "cuda":
        machine["device"] = torch.cuda.get_device_name(0)
    given = {name: value if value is None else str(value) for name, value in vars(options).items()}
    print(json.dumps({"bench": f"experts {options.part}", "options": given, "machine": machine}), flush=True)
    for record in (exchange_records if options.part == "exchange" else decode_records)(options):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["rank"]:
            be_rank(*sys.argv[2:])
        else:
            main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
