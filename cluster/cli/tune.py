"""`tandem tune` and `tandem trace`: compare offload tiers on a recorded load, in simulated time."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...bench.conversations import Conversations
from ...bench.plot_tuning import plot_tuning, require_matplotlib
from ...core.checkpoint import model_folder
from ...core.config import Config, ConfigSource
from ...core.errors import ConfigError
from ...core.log import logger
from ...core.units import format_bytes, parse_bytes
from ...kv_transfer.offload.replay import Model, Replay, plan_slots
from ...kv_transfer.offload.simulated import Cost
from ...kv_transfer.offload.sweep import Judged, best, check_budget, cost_of, expand, pareto, record
from ...kv_transfer.offload.trace import Trace, read_trace, write_trace

LINKS = {
    "host": Cost(latency_s=20e-6, load_bytes_per_s=20e9, store_bytes_per_s=20e9),
    "disk": Cost(latency_s=200e-6, load_bytes_per_s=6e9, store_bytes_per_s=4e9),
    "s3": Cost(latency_s=20e-3, load_bytes_per_s=1e9, store_bytes_per_s=1e9),
}
"""What a tier of each kind is taken for: a PCIe 4 link, an NVMe disk on one for each folder, objects behind 10 GbE."""

PRICES = {"host": 3.0, "disk": 0.1, "s3": 0.02}
"""Of a GiB of each kind, in whatever currency."""

_STEP = 64
_OVERLOADED = 0.95
_WIDEST_TABLE = 500


class Options(NamedTuple):
    """The command's options, see its help."""

    trace: Path
    trace_block_tokens: int
    trace_speed: float
    workers: int | None
    prefill_rate: float
    prefill_overhead_ms: float
    kv_bytes_per_token: str | None
    worker_cache: str | None
    links: list[str]
    prices: list[str]
    budget: float | None
    out: Path | None
    plot: bool


def tune(file: Path, overrides: list[str], options: Options, *, as_json: bool) -> None:
    """Replay the trace with every combination; a table, or JSON lines, on standard output, all of it in a folder.

    Raises:
        ConfigError: the file, the trace or an option is wrong.
    """
    if options.out is not None and options.plot:
        require_matplotlib()
    source = ConfigSource(file, overrides)
    alternatives = expand(source.tree)
    configs = [source.check(alternative.tree) for alternative in alternatives]
    links, prices = _links(options.links), _prices(options.prices)
    # Only the offload section differs between them.
    model = _model(configs[0], options, links)
    # What can be refused is refused before anything takes its time.
    for config in configs:
        plan_slots(config.offload, model, options.trace_block_tokens)
    costs = [cost_of(config.offload, prices) for config in configs]
    check_budget(costs, options.budget)
    trace = read_trace(options.trace, options.trace_block_tokens)
    judged = []
    console = Console(stderr=True, highlight=False)
    # What goes wrong in simulated time is counted, and told with the figures.
    logger.setLevel(logging.ERROR)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("requests", total=len(trace.requests) * len(configs))
        for alternative, config, cost in zip(alternatives, configs, costs, strict=True):
            bars.update(task, description=_named(alternative.choices))
            steps = _Steps(bars, task)
            started_s = time.perf_counter()
            outcome = Replay(trace, config.offload, model, steps.step).run()
            elapsed_s = time.perf_counter() - started_s
            steps.flush()
            judged.append(Judged(alternative.choices, cost, outcome, elapsed_s))
    front, chosen = pareto(judged), best(judged, options.budget)
    records = [
        {"name": _named(entry.choices), **record(entry), "pareto": number in front, "best": number == chosen}
        for number, entry in enumerate(judged)
    ]
    most_tokens, most_blocks = trace.without_limit()
    num_blocks = sum(len(request.hash_ids) for request in trace.requests)
    text = _best_yaml(alternatives[chosen].tree, records[chosen], options.trace.name)
    if as_json:
        sys.stdout.write(_lines(records))
    else:
        around = _around(trace, model, most_tokens / trace.prompt_tokens, most_blocks / num_blocks)
        told, table = Console(highlight=False, soft_wrap=True), _table(records, judged)
        told.width = max(told.width, told.measure(table, options=told.options.update(width=_WIDEST_TABLE)).maximum)
        told.print(around)
        told.print(table)
        told.print(f"\n{text}", markup=False)
    _warn(console, model, records)
    if options.out is not None:
        _write(options, records, text, most_tokens / trace.prompt_tokens)
        console.print(f"written: {options.out}/tune.jsonl, best.yaml" + (", tune.png" if options.plot else ""))


def _warn(console: Console, model: Model, records: Sequence[Mapping[str, Any]]) -> None:
    """Say what makes the figures other than somebody expects."""
    busiest = max(entry["workers_busy"] for entry in records)
    if busiest > _OVERLOADED:
        console.print(
            f"the prefill workers, {model.num_workers}, are busy {busiest:.0%} of the time, so that requests queue up: "
            "see --workers, --prefill-rate and --trace-speed"
        )
    if any(causes for entry in records for causes in entry["failures"].values()):
        console.print(
            "some blocks were not stored or loaded within timeout_s: a link carries less than it is given; see --link"
        )


def synthesize(path: Path, conversations: Conversations) -> None:
    """Write a made-up trace, and say what a cache without limit would find in it.

    Raises:
        ConfigError: the file cannot be written.
    """
    count = write_trace(path, conversations.requests())
    trace = read_trace(path, conversations.block_tokens)
    tokens, _ = trace.without_limit()
    sys.stdout.write(
        f"{path}: {count} requests in {trace.requests[-1].timestamp / 1e3:.0f} s, {trace.prompt_tokens} prompt tokens, "
        f"{tokens / trace.prompt_tokens:.1%} of which came before\n"
    )


class _Steps:
    """Moves a progress bar, not for every request."""

    def __init__(self, bars: Progress, task: Any) -> None:
        self._bars = bars
        self._task = task
        self._count = 0

    def step(self) -> None:
        self._count += 1
        if self._count == _STEP:
            self.flush()

    def flush(self) -> None:
        self._bars.advance(self._task, self._count)
        self._count = 0


def _model(config: Config, options: Options, links: Mapping[str, Cost]) -> Model:
    role = "prefill" if config.pools.prefill is not None else "colocated"
    config, pool = config.of_pool(role), getattr(config.pools, role)
    workers = options.workers or pool.replicas
    if options.worker_cache is not None:
        cache_bytes = _size("--worker-cache", options.worker_cache)
    else:
        cache_bytes = 0 if config.kv.capacity == "auto" else config.kv.capacity * workers
    if options.kv_bytes_per_token is not None:
        token_bytes = _size("--kv-bytes-per-token", options.kv_bytes_per_token)
    else:
        token_bytes = _token_bytes(config)
    if not token_bytes:
        raise ConfigError("--kv-bytes-per-token: a token has at least one")
    return Model(
        token_bytes,
        config.kv.block_tokens,
        links,
        workers,
        options.prefill_rate,
        options.prefill_overhead_ms / 1e3,
        cache_bytes,
        options.trace_speed,
    )


def _token_bytes(config: Config) -> int:
    """Of the configured model, in all layers and ranks."""
    from ...engine.build import plan_dtypes
    from ...engine.models.spec import read_spec
    from ...kv_transfer.layout import DTYPE_BYTES

    spec = read_spec(model_folder(config))
    pool = config.pools.prefill or config.pools.colocated
    _, dtype = plan_dtypes(config, spec, "cuda" if pool is not None and pool.gpus_per_replica else "cpu")
    return spec.num_kv_parts * spec.num_layers * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[dtype]


def _links(given: Sequence[str]) -> dict[str, Cost]:
    links = dict(LINKS)
    for text in given:
        kind, value = _of_kind("--link", text, "host=20GB:20GB:0.02")
        try:
            load, store, latency_ms = value.split(":")
            cost = Cost(float(latency_ms) / 1e3, float(parse_bytes(load)), float(parse_bytes(store)))
        except ValueError:
            cost = Cost(-1.0, 0.0, 0.0)
        if not (cost.latency_s >= 0 and cost.load_bytes_per_s > 0 and cost.store_bytes_per_s > 0):
            raise ConfigError(
                f"--link {text}: expected KIND=LOAD:STORE:LATENCY_MS",
                fix="bytes a second, and milliseconds, for example --link disk=6GB:4GB:0.2",
            )
        links[kind] = cost
    return links


def _prices(given: Sequence[str]) -> dict[str, float]:
    prices = dict(PRICES)
    for text in given:
        kind, value = _of_kind("--price", text, "host=3")
        try:
            prices[kind] = float(value)
        except ValueError:
            prices[kind] = -1.0
        if not 0 <= prices[kind] < float("inf"):
            raise ConfigError(f"--price {text}: expected KIND=PRICE of a GiB", fix="for example --price disk=0.1")
    return prices


def _of_kind(option: str, text: str, example: str) -> tuple[str, str]:
    kind, _, value = text.partition("=")
    if kind not in LINKS:
        raise ConfigError(f"{option} {text}: expected a kind of tier, {', '.join(LINKS)}", fix=f"{option} {example}")
    return kind, value


def _size(option: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _named(choices: Mapping[str, Any]) -> str:
    return " ".join(f"{key.removeprefix('tiers.')}={value}" for key, value in choices.items()) or "as it is"


def _around(trace: Trace, model: Model, most: float, most_blocks: float) -> str:
    cache = format_bytes(model.worker_cache_bytes) if model.worker_cache_bytes else "no"
    return (
        f"{len(trace.requests)} requests, {trace.prompt_tokens} prompt tokens; without limit {most:.2%} of the tokens "
        f"and {most_blocks:.2%} of the blocks would be found\n"
        f"{model.num_workers} prefill workers of {model.prefill_tokens_per_s:g} tokens/s with {cache} cache of their "
        f"own; {format_bytes(model.token_bytes)} of KV a token\n"
    )


def _table(records: Sequence[Mapping[str, Any]], judged: Sequence[Judged]) -> Table:
    table = Table(show_edge=False, pad_edge=False, caption="* on the Pareto front of cost and TTFT p90")
    keys = list(dict.fromkeys(key for entry in judged for key in entry.choices))
    tiers = list(dict.fromkeys(name for entry in records for name in entry["hit_rate_by_tier"]))
    for key in keys:
        table.add_column(key.removeprefix("tiers."), no_wrap=True)
    for heading in ("hit rate", *tiers, "loaded", "stored", "TTFT p50", "p90", "busy", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for entry, told in zip(records, judged, strict=True):
        moved = entry["bytes_moved_by_tier"].values()
        failed = sum(sum(causes.values()) for causes in entry["failures"].values())
        notes = ["best"] if entry["best"] else ["*"] if entry["pareto"] else []
        notes += [f"{failed} failed"] if failed else []
        table.add_row(
            *(str(told.choices.get(key, "")) for key in keys),
            f"{entry['hit_rate']:.2%}",
            *(f"{entry['hit_rate_by_tier'].get(name, 0):.2%}" for name in tiers),
            format_bytes(sum(tier["loaded"] for tier in moved)),
            format_bytes(sum(tier["stored"] for tier in moved)),
            f"{entry['ttft_p50_s']:.3f} s",
            f"{entry['ttft_p90_s']:.3f} s",
            f"{entry['workers_busy']:.0%}",
            f"{entry['cost']:.2f}",
            " ".join(notes),
        )
    return table


def _best_yaml(tree: Mapping[str, Any], entry: Mapping[str, Any], trace: str) -> str:
    return (
        f"# The best of what was compared on {trace}: {entry['hit_rate']:.2%} of prompt tokens found,\n"
        f"# TTFT p50 {entry['ttft_p50_s']:.3f} s and p90 {entry['ttft_p90_s']:.3f} s predicted, "
        f"capacity for {entry['cost']:.2f}.\n"
    ) + yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in records)


def _write(options: Options, records: Sequence[dict[str, Any]], text: str, most: float) -> None:
    folder = options.out
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tune.jsonl").write_text(_lines(records), encoding="utf-8")
        (folder / "best.yaml").write_text(text, encoding="utf-8")
        if options.plot:
            plot_tuning(records, most, options.trace.name, folder / "tune.png")
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}") from None
