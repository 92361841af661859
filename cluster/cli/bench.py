"""`tandem bench`: start what is to be compared, load it, and write down what was seen."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...bench.client import Server
from ...bench.engine import records
from ...bench.eplb import records as eplb_records
from ...bench.expert_serving import serving_records, shape_of
from ...bench.kv import CASES
from ...bench.kv import records as kv_records
from ...bench.machine import describe
from ...bench.plot import plot
from ...bench.serve import Arm, Load, ServedArm, TransformersArm, colocated, compare, verdict, warm_up_jobs
from ...bench.summary import Slo
from ...bench.workload import Job, Lengths, Synthetic, read_trace
from ...core.checkpoint import model_folder
from ...core.config import Config, load_config
from ...core.environment import prepare_local_ray
from ...core.errors import ConfigError, WorkerError
from ...engine.models.spec import ModelSpec, context_length, read_spec
from .progress import Progress as LaunchProgress
from .progress import show_launch

_READY_TIMEOUT_S = 60.0
_ROUNDS, _STEPS = 5, 100


class Options(NamedTuple):
    """The command's options, see its help."""

    url: str | None
    api_key: str
    baseline: str
    rate: float | None
    concurrency: int | None
    requests: int
    inputs: str
    outputs: str
    long_share: float
    long_inputs: str
    long_outputs: str
    trace: Path | None
    trace_speed: float
    repeats: int
    slo: Slo
    seed: int
    out: Path
    plot: bool


def bench_engine(file: Path | None, overrides: list[str], out: Path, *, profile: bool) -> None:
    """Run the engine's benchmark; JSON lines on standard output and in a file."""
    config = load_config(file, overrides)
    out.mkdir(parents=True, exist_ok=True)
    with (out / time.strftime("engine-%Y%m%d-%H%M%S.jsonl", time.gmtime())).open("w") as lines:
        for record in records(config, out if profile else None):
            line = json.dumps(record)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            lines.write(line + "\n")
            if "profile" in record:
                Console(stderr=True).print(_profile_table(record))


def bench_kv(transports: list[str], block_kib: list[int], region_mib: int, repeats: int, out: Path) -> bool:
    """Run the transports' benchmark; JSON lines on standard output and in a file. Says whether all were fast enough."""
    for name in transports:
        if name not in {case.transport for case in CASES}:
            known = ", ".join(sorted({case.transport for case in CASES}))
            raise ConfigError(f"bench kv: there is no case of {name}", fix=f"choose of {known}")
    cases = [case for case in CASES if not transports or case.transport in transports]
    enough = True
    out.mkdir(parents=True, exist_ok=True)
    with (out / time.strftime("kv-%Y%m%d-%H%M%S.jsonl", time.gmtime())).open("w") as lines:
        for record in kv_records(cases, [size << 10 for size in block_kib], region_mib << 20, repeats):
            line = json.dumps(record)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            lines.write(line + "\n")
            enough &= record.get("enough", True)
    return enough


def bench_eplb(num_loads: int, repeats: int, seed: int, out: Path, device: str, ranks: int) -> bool:
    """Run the placements' benchmark; JSON lines on standard output and in a file. Says whether all was good enough."""
    enough = True
    out.mkdir(parents=True, exist_ok=True)
    with (out / time.strftime("eplb-%Y%m%d-%H%M%S.jsonl", time.gmtime())).open("w") as lines:
        serving = serving_records(shape_of(device, ranks), _ROUNDS, _STEPS, seed)
        for record in itertools.chain(eplb_records(num_loads, repeats, seed), serving):
            line = json.dumps(record, ensure_ascii=False)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            lines.write(line + "\n")
            enough &= record.get("enough", True)
    return enough


def _profile_table(record: dict[str, Any]) -> Table:
    """Where a row's time goes."""
    found = record["profile"]
    title = f"{record['kind']} {record['batch']} × {record['context']}: {found['span_ms']} ms a step"
    table = Table(title=title, caption=f"idle {found['idle_us']} µs, of which {found['between_us']} µs between steps")
    for heading in ("kernel", "ms", "share", "calls"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", overflow="ellipsis", no_wrap=True)
    for kernel in found["kernels"]:
        share = kernel["ms"] / found["span_ms"] if found["span_ms"] else 0.0
        table.add_row(kernel["name"], f"{kernel['ms']:.4f}", f"{share:.1%}", f"{kernel['calls']:g}")
    return table


def bench_serve(file: Path | None, overrides: list[str], options: Options) -> None:
    """Run the benchmark; JSON lines on standard output and in a file, a plot beside it."""
    console = Console(stderr=True, highlight=False)
    config = load_config(file, overrides)
    spec = read_spec(model_folder(config))
    loads = [_load(options, spec, config, repeat) for repeat in range(options.repeats)]
    told = options._asdict() | {"slo": options.slo._asdict(), "trace": options.trace.name if options.trace else None}
    for private in ("api_key", "out", "plot"):
        del told[private]
    header = {
        "bench": "serve",
        "load": told,
        "config": config.model_dump(mode="json", exclude={"gateway": {"api_keys"}}) if options.url is None else None,
        "machine": describe(),
    }
    ray: Any = None
    clusters: list[Any] = []
    arms: list[Arm] = []
    try:
        if options.url is not None:
            arms.append(ServedArm("served", Server(options.url, options.api_key)))
        else:
            configs = {"disaggregated" if config.pools.prefill else "colocated": _on_free_port(config)}
            if options.baseline == "colocated":
                configs["colocated"] = _on_free_port(colocated(config))
            prepare_local_ray()
            from ..ray_cluster import LocalRay
            from ..tandem_cluster import Cluster, default_log_folder

            progress = LaunchProgress(console)
            ray = LocalRay(*configs.values())
            for name, wanted in configs.items():
                progress.show(f"starting {name}")
                folder = default_log_folder() / time.strftime(f"%Y%m%d-%H%M%S-{name}")
                cluster = Cluster.launch(wanted, folder, name=f"bench-{name}")
                clusters.append(cluster)
                show_launch(cluster, progress)
                server = Server(f"http://{wanted.gateway.host}:{wanted.gateway.port}", _key(wanted))
                asyncio.run(_wait_ready(server))
                arms.append(ServedArm(name, server))
            progress.done("ready")
        if options.baseline == "transformers":
            arms.append(TransformersArm(config, psutil.cpu_count() or 1))
        _measure(arms, loads, header, options, spec, console)
    finally:
        for arm in arms:
            if isinstance(arm, TransformersArm):
                arm.close()
        for cluster in clusters:
            cluster.stop(grace_s=0)
        if ray is not None:
            ray.stop()


def _measure(
    arms: list[Arm], loads: list[Load], header: dict[str, Any], options: Options, spec: ModelSpec, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        warm = Load(warm_up_jobs(spec.vocab_size, 8, options.seed), 4, options.slo)
        compare(arms, [warm], lambda *_: None)
        tasks = {arm.name: bars.add_task(arm.name, total=sum(len(load.jobs) for load in loads)) for arm in arms}
        finished = dict.fromkeys(tasks, 0)

        def step(name: str, done: int, total: int) -> None:
            bars.update(tasks[name], completed=finished[name] + done)
            if done == total:
                finished[name] += total

        records = compare(arms, loads, step)
    lines = [header, *records, {"verdict": verdict(records)}]
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / time.strftime("serve-%Y%m%d-%H%M%S")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    stem.with_suffix(".jsonl").write_text(text)
    sys.stdout.write(text)
    if options.plot:
        title = f"{header['machine']['device']}, {header['machine']['cores']} cores, {header['machine']['date']}"
        plot([record for record in records if "ttft_s" in record] or records, title, stem.with_suffix(".png"))
    console.print(f"written: {stem}.jsonl" + (f" and {stem}.png" if options.plot else ""))


def _load(options: Options, spec: ModelSpec, config: Config, repeat: int) -> Load:
    if options.rate is not None and options.concurrency is not None:
        raise ConfigError("--rate is an open loop and --concurrency a closed one", fix="give one of them")
    max_model_len = context_length(spec, config.model.max_model_len)
    jobs: list[Job]
    if options.trace is not None:
        jobs = read_trace(options.trace, options.requests, options.trace_speed, spec.vocab_size, max_model_len)
    else:
        # Fresh prompts each time: no repetition finds an earlier one's in the prefix cache.
        jobs = Synthetic(
            options.requests,
            options.rate,
            Lengths.parse(options.inputs),
            Lengths.parse(options.outputs),
            options.long_share,
            Lengths.parse(options.long_inputs),
            Lengths.parse(options.long_outputs),
            spec.vocab_size,
            options.seed + 1000 * repeat,
        ).jobs()
    longest = max(len(job.prompt) + job.output_tokens for job in jobs)
    if longest > max_model_len:
        raise ConfigError(f"a request of {longest} tokens is more than the context of {max_model_len}")
    concurrency = options.concurrency
    if concurrency is None and options.rate is None and options.trace is None:
        concurrency = 16
    return Load(jobs, concurrency, options.slo)


def _on_free_port(config: Config) -> Config:
    """The same on a port that nobody uses, so that several clusters fit side by side."""
    with socket.create_server((config.gateway.host, 0)) as probe:
        port = probe.getsockname()[1]
    return config.model_copy(update={"gateway": config.gateway.model_copy(update={"port": port})})


def _key(config: Config) -> str:
    return config.gateway.api_keys[0] if config.gateway.api_keys else ""


async def _wait_ready(server: Server) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while True:
        status, text = await server.get("/readyz")
        if status == 200:
            return
        if time.monotonic() > deadline_s:
            raise WorkerError(f"not ready after {_READY_TIMEOUT_S:g} s: {text}")
        await asyncio.sleep(0.1)
