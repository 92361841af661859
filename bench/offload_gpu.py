"""`python -m tandem.bench.offload_gpu`: what a host tier gives and costs a worker on one GPU, in one process, with the
tier's keeper in another.

copies: see `offload_copies`. decode: times between a batch's tokens, alone and while blocks of others are loaded, or
stored, or both, as fast as they go, in turns. hit: time to the first token of a long prompt that is all in the tier,
in turns with computing it. misses: requests whose prompts the tier has never seen, served with the tier and without, in
turns.

Prints JSON lines, and then a table. A part that fails is a record, and the next comes all the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from ..core.errors import ConfigError, WorkerError
from ..core.units import parse_bytes
from ..kv_transfer.offload.device import DeviceBlocks
from ..kv_transfer.offload.keys import KEY_BYTES, TierKey
from .kernels import MODELS
from .kv_copies import percentiles
from .machine import describe
from .offload_copies import copy_records
from .tiered_worker import WAIT_S, Bench, Worker

PARTS = ("copies", "decode", "hit", "misses")
_LINE_BYTES_PER_S = 55e9
"""Of the link between a GPU and its host, PCIe 5.0 x16."""
_SKIPPED_STEPS = 3
"""At the beginning of a window, when copies start or end."""
_STORE_BLOCKS = 16
_LOAD_BLOCKS = 64
_JOBS = 2
"""In flight in each direction."""
_WAYS = {"alone": (), "loads": ("load",), "stores": ("store",), "both": ("load", "store")}


class Traffic:
    """Blocks that come and go beside an engine's steps, as fast as the tier takes them. Owned by the engine thread.

    Args:
        bench: whose tier, and whose cache.
    """

    def __init__(self, bench: Bench) -> None:
        self._stack, self._memory, self._pool = bench.tiers.stack, bench.tiers.memory, bench.engine.pool
        self._rng = np.random.default_rng(1)
        self._num_blocks = {"load": _LOAD_BLOCKS, "store": _STORE_BLOCKS}
        self._free: dict[str, list[list[int]]] = {"load": [], "store": []}
        self._known: deque[list[TierKey]] = deque(maxlen=_LOAD_BLOCKS // _STORE_BLOCKS)
        self._open: dict[int, tuple[str, list[int], list[TierKey]]] = {}
        self.num_blocks = {"load": 0, "store": 0}
        self.num_bad = 0
        for way, count in self._num_blocks.items():
            for _ in range(_JOBS):
                blocks = self._pool.allocate(count)
                assert blocks is not None, "no room for blocks that come and go"
                self._free[way].append(blocks)
        for _ in range(_LOAD_BLOCKS // _STORE_BLOCKS):
            self._start("store")
            self.end()

    def turn(self, ways: Sequence[str]) -> None:
        """Take in what has ended, and start anew."""
        for result in self._stack.poll():
            way, blocks, keys = self._open.pop(result.number)
            good = sum(result.good)
            self.num_blocks[way] += good
            self.num_bad += len(keys) - good
            self._free[way].append(blocks)
            if way == "store" and good == len(keys):
                self._known.append(keys)
        for way in ways:
            while self._free[way]:
                self._start(way)

    def end(self) -> None:
        """Wait for what is under way."""
        end_s = time.perf_counter() + WAIT_S
        while self._open:
            self.turn(())
            time.sleep(1e-4)
            if time.perf_counter() > end_s:
                raise WorkerError("copies did not end")

    def close(self) -> None:
        """Give the blocks back."""
        self.end()
        for lists in self._free.values():
            for blocks in lists:
                self._pool.release(blocks)

    def _start(self, way: str) -> None:
        blocks = self._free[way].pop()
        if way == "store":
            keys = [self._rng.bytes(KEY_BYTES) for _ in blocks]
            number = self._stack.store(keys, self._memory, blocks)
        else:
            keys = [key for known in self._known for key in known]
            memory = self._memory.ordered() if isinstance(self._memory, DeviceBlocks) else self._memory
            number = self._stack.load(keys, memory, blocks)
        self._open[number] = way, blocks, keys


def decode_records(bench: Bench) -> Iterator[dict[str, Any]]:
    """Times between a batch's tokens, in each company in turns."""
    options = bench.options
    worker, traffic = Worker(bench, tiers=False), Traffic(bench)
    output_tokens = len(_WAYS) * options.rounds * options.steps + 32
    replies = [worker.send(bench.prompt(options.context), output_tokens) for _ in range(options.batch)]
    worker.run(lambda: all(len(reply.tokens) > _SKIPPED_STEPS for reply in replies))
    times_s: dict[str, list[float]] = {name: [] for name in _WAYS}
    medians_s: dict[str, list[float]] = {name: [] for name in _WAYS}
    """Of each window: steps take longer from one to the next."""
    seconds: dict[str, float] = dict.fromkeys(_WAYS, 0.0)
    moved: dict[str, dict[str, int]] = {name: {"load": 0, "store": 0} for name in _WAYS}
    for number in range(options.rounds):
        # Contexts grow by every step: in as many rounds as there are companies, each comes once at every place.
        turn = number % len(_WAYS)
        for name, ways in [*_WAYS.items()][turn:] + [*_WAYS.items()][:turn]:
            before = dict(traffic.num_blocks)
            ends, begin_s = [], time.perf_counter()
            for _ in range(options.steps):
                traffic.turn(ways)
                worker.turn()
                ends.append(time.perf_counter())
            seconds[name] += ends[-1] - begin_s
            for way in moved[name]:
                moved[name][way] += traffic.num_blocks[way] - before[way]
            window = np.diff(ends)[_SKIPPED_STEPS:].tolist()
            times_s[name] += window
            medians_s[name].append(median(window))
            traffic.end()
    worker.close()
    traffic.close()
    alone = percentiles([1e3 * s for s in times_s["alone"]])
    for name in _WAYS:
        found = percentiles([1e3 * s for s in times_s[name]])
        yield {
            "bench": "offload-decode", "batch": options.batch, "context": options.context, "company": name,
            "itl_ms": found, "slower_p50": round(sum(medians_s[name]) / sum(medians_s["alone"]) - 1, 4),
            "slower_p99": round(found["p99"] / alone["p99"] - 1, 4), "bad_blocks": traffic.num_bad,
            **{
                f"{way}_gb_per_s": round(count * bench.block_bytes / seconds[name] / 1e9, 2)
                for way, count in moved[name].items()
            },
        }  # fmt: skip


def hit_records(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time to the first token of a long prompt, computed and then loaded, in turns; the first round warms up."""
    options = bench.options
    worker = Worker(bench, tiers=True)
    found: dict[str, list[float]] = {"compute": [], "hit": [], "store": [], "load": []}
    stages_s: dict[str, list[float]] = {}
    same, loaded = 0, []
    for number in range(options.hits + 1):
        prompt = bench.prompt(options.prompt)
        bench.forget()
        computed = worker.send(prompt, 1)
        worker.run(lambda reply=computed: reply.finished)  # type: ignore[misc]
        begin_s = time.perf_counter()
        worker.run(lambda: not worker.offloader.num_open)
        stored_s = time.perf_counter() - begin_s
        bench.forget()
        before = worker.metrics.offload_tokens._value.get()
        hit = worker.send(prompt, 1)
        worker.run(lambda reply=hit: reply.finished)  # type: ignore[misc]
        tokens = int(worker.metrics.offload_tokens._value.get() - before)
        stages = dict(hit.stages)
        load_s = stages.get("decode.fetched", 0.0) - stages.get("decode.fetch", 0.0)
        if number == 0:
            yield {
                "bench": "offload-hit-first", "tokens": options.prompt, "loaded_tokens": tokens,
                "compute_ms": round(1e3 * (computed.first_s - computed.sent_s), 1),
                "hit_ms": round(1e3 * (hit.first_s - hit.sent_s), 1), "loads": worker.loads(),
            }  # fmt: skip
            continue
        for name, at_s in stages.items():
            stages_s.setdefault(name, []).append(at_s - stages["decode.received"])
        same += computed.tokens == hit.tokens
        loaded.append(tokens)
        for name, value in (
            ("compute", computed.first_s - computed.sent_s), ("hit", hit.first_s - hit.sent_s), ("store", stored_s),
            ("load", load_s),
        ):  # fmt: skip
            found[name].append(value)
    size = (options.prompt - 1) // bench.engine.block_tokens * bench.block_bytes
    worker.close()
    hit_s = median(found["hit"])
    yield {
        "bench": "offload-hit", "tokens": options.prompt, "bytes": size, "loaded_tokens": loaded,
        **{f"{name}_ms": percentiles([1e3 * value for value in values], 1) for name, values in found.items()},
        "sooner": round(median(found["compute"]) / hit_s, 2),
        "of_line": round(hit_s / (size / _LINE_BYTES_PER_S), 3),
        "load_gb_per_s": round(size / median(found["load"]) / 1e9, 2) if all(found["load"]) else None,
        "stages_ms": {name: round(1e3 * median(values), 1) for name, values in stages_s.items()},
        "same_first_tokens": same, "loads": worker.loads(),
    }  # fmt: skip


def miss_records(bench: Bench) -> Iterator[dict[str, Any]]:
    """Throughput of prompts that no tier has, with tiers and without, in turns."""
    options = bench.options
    rates: dict[str, list[float]] = {"off": [], "on": []}
    drains, stored = [], 0
    for number in range(options.pairs + 1):
        order = ("off", "on") if number % 2 else ("on", "off")
        for name in order:
            bench.forget()
            worker = Worker(bench, tiers=name == "on")
            prompts = [bench.prompt(options.miss_input) for _ in range(options.requests)]
            begin_s = time.perf_counter()
            replies = [worker.send(prompt, options.miss_output) for prompt in prompts]
            worker.run(lambda replies=replies: all(reply.finished for reply in replies))  # type: ignore[misc]
            seconds = time.perf_counter() - begin_s
            begin_s = time.perf_counter()
            worker.close()
            if number:  # the first pair warms up
                rates[name].append(options.requests * options.miss_output / seconds)
            if name == "on":
                drains.append(time.perf_counter() - begin_s)
                hits = int(worker.metrics.offload_tokens._value.get())
                stored = bench.tiers.stack.levels[0].tier.stats().stored
                if hits:
                    raise WorkerError(f"{hits} tokens came from the tier, of prompts that it cannot have")
    lost = [1 - on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    yield {
        "bench": "offload-misses", "requests": options.requests, "input_tokens": options.miss_input,
        "output_tokens": options.miss_output,
        **{f"{name}_tokens_per_s": [round(rate, 1) for rate in values] for name, values in rates.items()},
        "lost": round(1 - median(rates["on"]) / median(rates["off"]), 4), "lost_by_pair": [round(v, 4) for v in lost],
        "drain_s": round(median(drains), 3), "stored_blocks": stored,
    }  # fmt: skip


def records(options: argparse.Namespace, folder: Path, home: Path) -> Iterator[dict[str, Any]]:
    """Everything that is measured. Blocks for minutes."""
    end_s = time.perf_counter() + options.budget_s
    bench: Bench | None = None
    parts: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
        "decode": decode_records, "hit": hit_records, "misses": miss_records,
    }  # fmt: skip
    try:
        for part in options.parts:
            if time.perf_counter() > end_s:
                yield {"bench": f"offload-{part}", "skipped": "the budget is spent"}
                continue
            begin_s, failed = time.perf_counter(), False
            try:
                if part == "copies":
                    for record in copy_records([16 << 10, 32 << 10, 2 << 20], [8, 16, 32], 512 << 20):
                        yield {"bench": "offload-copies", **record}
                else:
                    if bench is None:
                        bench = Bench(options, folder, home)
                        yield bench.started
                    yield from parts[part](bench)
            except Exception as error:  # noqa: BLE001 - the other parts are measured all the same
                traceback.print_exc()
                yield {"bench": f"offload-{part}", "error": f"{type(error).__name__}: {error}"}
                failed = True
            if failed and bench is None and part != "copies":
                return
            if failed and bench is not None:
                # What it left open would disturb the next, and a GPU has no room for two engines.
                bench.close()
                bench = None
                gc.collect()
                if not options.cpu:
                    torch.cuda.empty_cache()
            yield {"bench": "offload-part", "part": part, "seconds": round(time.perf_counter() - begin_s, 1)}
    finally:
        if bench is not None:
            bench.close()


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The same for people."""
    lines = []
    for record in found:
        match record:
            case {"skipped": reason} | {"error": reason}:
                lines.append(f"{record['bench']}: {reason}")
            case {"bench": "offload-copies", "run_bytes": size}:
                best = {
                    way: max(v for k, v in record.items() if k.startswith(f"{way}_kernel"))
                    for way in ("h2d", "d2h", "both")
                }
                lines.append(
                    f"copies of {size >> 10:5} KiB: " + ", ".join(f"{way} {v:.1f} GB/s" for way, v in best.items())
                )
            case {"bench": "offload-decode", "itl_ms": itl}:
                lines.append(
                    f"decode {record['batch']} x {record['context']}, {record['company']:>6}: p50 {itl['p50']:.2f} ms "
                    f"({record['slower_p50']:+.1%}), p99 {itl['p99']:.2f} ({record['slower_p99']:+.1%}), loads "
                    f"{record['load_gb_per_s']:.1f} GB/s, stores {record['store_gb_per_s']:.1f}"
                )
            case {"bench": "offload-hit"}:
                lines.append(
                    f"hit of {record['tokens']} tokens: {record['hit_ms']['p50']:.1f} ms, computed "
                    f"{record['compute_ms']['p50']:.1f}: {record['sooner']} x sooner, {record['of_line']} x the line's"
                )
            case {"bench": "offload-misses", "lost": lost}:
                lines.append(f"misses: {lost:+.2%} of the throughput lost, by pair {record['lost_by_pair']}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print.

    Raises:
        ConfigError: no CUDA device is here, and none was excused.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tandem.bench.offload_gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--model", default="qwen3-8b", help=f"a folder with a config.json, or one of {', '.join(MODELS)}"
    )
    parser.add_argument("--cpu", action="store_true", help="without a GPU, to see that it runs")
    parser.add_argument(
        "--capacity", type=parse_bytes, default="16GiB", help="of the tier; three long prompts at least"
    )
    parser.add_argument("--kv-capacity", default="auto")
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="decode: of a prompt")
    parser.add_argument("--steps", type=int, default=80, help="decode: of a window")
    parser.add_argument(
        "--rounds", type=int, default=2 * len(_WAYS), help=f"decode: windows of each company; {len(_WAYS)}, 8, …"
    )
    parser.add_argument("--prompt", type=int, default=32768, help="hit: tokens")
    parser.add_argument("--hits", type=int, default=5, help="hit: prompts")
    parser.add_argument("--requests", type=int, default=128, help="misses: of a run")
    parser.add_argument("--miss-input", type=int, default=1024)
    parser.add_argument("--miss-output", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=4, help="misses: runs of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=240.0, help="parts that would begin later are left out")
    options = parser.parse_args(arguments)
    options.num_windows = len(_WAYS) * options.rounds
    if not (options.cpu or torch.cuda.is_available()):
        raise ConfigError("no CUDA device is here", fix="--cpu shows whether it runs, and no figures")
    begin_s = time.perf_counter()
    machine = describe() | {"host_memory": psutil.virtual_memory().total, "cuda": torch.version.cuda}
    if not options.cpu:
        machine["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({"bench": "offload-gpu", "options": vars(options), "machine": machine}), flush=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(options.model).expanduser()
        if options.model in MODELS:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(MODELS[options.model]))
        for record in records(options, folder, Path(name)):
            found.append(record)
            print(json.dumps(record), flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - begin_s, 1)}))
    print("\n".join(table(found)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
