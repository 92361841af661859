"""`python -m tandem.bench.kv_gpu`: KV between two GPUs: copies, what they cost decode steps, and whole handoffs.

Prints JSON lines, and then a table. With one GPU, both ends are on it, and figures tell of its memory, not of a link.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ConfigError
from ..kernels import on_gpu
from .kernels import MODELS
from .kv_copies import Owner, copy_records
from .kv_decode import (
    FULL,
    LEAST_IDLE_GB_PER_S,
    PACED,
    SWEEP_ROOM_TOKENS,
    Decoding,
    decode_records,
    lost_per_gb,
    sweep_records,
    ways,
)
from .kv_handoff import handoff_records
from .machine import describe

PARTS = ("copies", "decode", "handoffs")
LONG_PARTS = ("sweep",)
"""Only who names them gets them."""


def records(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Everything that is measured; blocks for some minutes."""
    count = torch.cuda.device_count()
    other = min(1, count - 1)
    if {"copies", "decode", "sweep"} & set(options.parts):
        owner = Owner(2 * options.mib << 20, other)
        try:
            if "copies" in options.parts:
                yield from copy_records(owner, options.mib << 20)
            if "decode" in options.parts:
                yield from decode_records(owner, folder, 64, 1024, options.steps)
                gc.collect()  # an engine refers to itself
            if "sweep" in options.parts:
                decoding = Decoding(folder, 64, 1024, SWEEP_ROOM_TOKENS, [PACED, FULL])
                yield from sweep_records(owner, decoding, ways(options.programs), [PACED, FULL], options.rounds)
                decoding.close()
        finally:
            owner.close()
        torch.cuda.empty_cache()
    if "handoffs" in options.parts:
        if count < 2:
            yield {"bench": "kv-handoff", "skipped": "two workers need two GPUs"}
            return
        for layer_groups in options.layer_groups:
            yield from handoff_records(folder, [1, 0], [2048, 8192, 32768], layer_groups, options.repeats)


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The same for people."""
    lines = []
    for record in found:
        match record:
            case {"skipped": reason}:
                lines.append(f"{record['bench']}: skipped: {reason}")
            case {"bench": "kv-copy"}:
                lines.append(
                    f"copy {record['case']:>20}: plain {record['plain_gb_per_s']:6.1f} GB/s, kernel "
                    f"{record['kernel_gb_per_s']:6.1f}, read {record['pull_gb_per_s']:6.1f}, best "
                    f"{record['best_gb_per_s']:6.1f} by {record['best_plan']}"
                    + (", WRONG BYTES" if record["correct"] is False else "")
                )
            case {"bench": "kv-pull-latency", "us": us}:
                lines.append(f"read of {record['bytes'] >> 10:6} KiB: {us['p50']:.0f} us, p99 {us['p99']:.0f}")
            case {"bench": "kv-decode", "alone_ms": alone, "while_pulling_ms": beside}:
                lines.append(
                    f"decode {record['batch']} x {record['context']}, {record['programs']:2} programs: "
                    f"alone {alone['p50']:.2f} ms (p99 {alone['p99']:.2f}), while {record['pulled_gb_per_s']:.0f} GB/s "
                    f"arrive {beside['p50']:.2f} ms (p99 {beside['p99']:.2f}): {record['slower']:+.1%}"
                )
            case {"bench": "kv-sweep", "alone_ms": alone, "while_pulling_ms": beside}:
                lines.append(
                    f"{record['load']:>5}, {record['way']:<42}: idle {record['idle_gb_per_s']:5.0f} GB/s; steps "
                    f"{alone['p50']:.2f} ms, {beside['p50']:.2f} (p99 {beside['p99']:.2f}) while "
                    f"{record['pulled_gb_per_s']:5.1f} GB/s arrive: {record['slower']:+6.1%}, "
                    f"{lost_per_gb(record):.2f} ms a GB"
                )
            case {"bench": "kv-handoff"}:
                lines.append(
                    f"handoff of {record['tokens']:5} tokens, {record['layer_groups']} groups: first token "
                    f"{record['first_token_ms']['p50']:.1f} ms, prefill {record['prefill_ms']['p50']:.1f}, then "
                    f"{record['transfer_after_prefill_ms']['p50']:.2f} for the rest of {record['bytes'] / 1e9:.2f} GB: "
                    f"{record['of_prefill']:.2%} of the prefill"
                )
    return lines + _choice(found)


def _choice(found: Sequence[dict[str, Any]]) -> list[str]:
    """What a sweep says should be written into `kv_transfer/copy_queue.py`."""
    swept = [record for record in found if record["bench"] == "kv-sweep"]
    lines = []
    for load in dict.fromkeys(record["load"] for record in swept):
        records = sorted((record for record in swept if record["load"] == load), key=lost_per_gb)
        lines.append(f"beside steps, {load}: least is lost to {records[0]['way']} ({records[0]['slower']:+.1%})")
    fast = [record for record in swept if record["idle_gb_per_s"] >= LEAST_IDLE_GB_PER_S]
    if fast:
        both = min(fast, key=lambda record: (record["load"] != PACED.name, lost_per_gb(record)))
        lines.append(
            f"of those that reach {LEAST_IDLE_GB_PER_S:.0f} GB/s when idle: {both['way']} ({both['slower']:+.1%})"
        )
    elif swept:
        lines.append(f"none reaches {LEAST_IDLE_GB_PER_S:.0f} GB/s when idle")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print.

    Raises:
        ConfigError: no CUDA device or Triton is here.
    """
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.kv_gpu", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS + LONG_PARTS, default=list(PARTS))
    parser.add_argument("--mib", type=int, default=1024, help="of a copy")
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-8b")
    parser.add_argument("--steps", type=int, default=480, help="decode steps for each number of programs")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way to copy in the sweep")
    parser.add_argument("--programs", type=int, nargs="+", default=[4, 6, 8, 12, 16, 32], help="tried by the sweep")
    parser.add_argument("--layer-groups", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5, help="prompts of each length")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not on_gpu.AVAILABLE:
        raise ConfigError("KV is copied between GPUs, and no CUDA device with Triton is here")
    start_s = time.perf_counter()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = describe() | {"gpus": gpus, "cuda": torch.version.cuda, "triton": on_gpu.triton.__version__}
    print(json.dumps({"bench": "kv-gpu", "options": vars(options), "machine": machine}), flush=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODELS[options.model]))
        for record in records(options, folder):
            found.append(record)
            print(json.dumps(record), flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - start_s, 1)}))
    print("\n".join(table(found)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
