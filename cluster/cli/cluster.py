"""`tandem up`, `down` and `status`: Tandem on a Ray cluster that is there already."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from ...core.checkpoint import model_folder, model_name, pinned
from ...core.config import load_config
from ...core.environment import join_local_ray, prepare_ray, ray_address
from ...engine.models.spec import context_length, read_spec
from ..controller import WorkerStatus
from ..gateway.listener import gateway_url
from .expert_table import print_experts
from .kv_table import print_kv
from .progress import Interrupted, Progress, show_launch, watch_signals

_GRACE_S = 30.0
_RATE_PERIOD_S = 1.0
_TABLE_WIDTH = 140


def up(file: Path | None, overrides: list[str], address: str | None) -> None:
    """Launch, wait, print where it serves. Raises ConfigError before anything was started; a signal ends what was."""
    console = Console(highlight=False)
    stop = threading.Event()
    watch_signals(stop)
    config = pinned(load_config(file, overrides))
    context_length(read_spec(model_folder(config)), config.model.max_model_len)
    prepare_ray()
    from ..ray_cluster import connect_ray, disconnect_ray
    from ..tandem_cluster import Cluster, default_log_folder

    connect_ray(address or ray_address())
    try:
        watch_signals(stop)  # Ray has put a handler of its own in place
        progress = Progress(console, stop.is_set)
        cluster = Cluster.launch(config, default_log_folder() / time.strftime("%Y%m%d-%H%M%S"))
        try:
            show_launch(cluster, progress)
        except Interrupted:
            progress.done("stopping")
            cluster.stop(grace_s=0)
            console.print("stopped: nothing is left on the Ray cluster")
            raise SystemExit(130) from None
        except BaseException:
            cluster.stop(grace_s=0)
            raise
        progress.done("ready")
        _print_table(console, cluster.status(), {})
        console.print(f"\n[bold green]serving {model_name(config)} at {gateway_url(config)}/v1[/bold green]")
        console.print("look: tandem status   stop: tandem down", style="dim")
    finally:
        disconnect_ray()


def down(address: str | None) -> None:
    """Stop what `up` started."""
    prepare_ray()
    from ..ray_cluster import connect_ray, disconnect_ray
    from ..tandem_cluster import Cluster

    connect_ray(address or ray_address())
    try:
        Cluster.find().stop(_GRACE_S)
    finally:
        disconnect_ray()
    Console().print("stopped")


def status(address: str | None, *, kv: bool, experts: bool, as_json: bool) -> None:
    """Print the workers, their KV or their experts: of the cluster named, or of this machine's `tandem serve`."""
    prepare_ray()
    where = address or ray_address() or join_local_ray()
    from ..ray_cluster import connect_ray, disconnect_ray
    from ..tandem_cluster import Cluster

    connect_ray(where)
    try:
        cluster = Cluster.find()
        supervisors = cluster.supervisors()
        before, before_s = cluster.status(), time.monotonic()
        time.sleep(_RATE_PERIOD_S)
        after, seconds = cluster.status(), time.monotonic() - before_s
    finally:
        disconnect_ray()
    rates = _rates(before, after, seconds)
    if as_json:
        for worker in after:
            fields = worker._asdict() | {"report": msgspec.to_builtins(worker.report), **rates.get(worker.peer, {})}
            fields["supervisor"] = supervisors.get(worker.worker, "")
            Console(soft_wrap=True, highlight=False).print(json.dumps(fields), markup=False)
    elif kv:
        print_kv(Console(highlight=False), after, time.time())
    elif experts:
        print_experts(Console(highlight=False), after, time.time())
    else:
        console = Console(highlight=False)
        _print_table(console, after, rates)
        for url in sorted(set(supervisors.values())):
            on_node = sorted(worker for worker, where in supervisors.items() if where == url)
            console.print(f"health and metrics of {', '.join(on_node)}: {url}", style="dim", soft_wrap=True)


def _rates(before: list[WorkerStatus], after: list[WorkerStatus], seconds: float) -> dict[str, dict[str, float]]:
    earlier = {worker.peer: worker.report for worker in before}
    rates = {}
    for worker in after:
        old, new = earlier.get(worker.peer), worker.report
        if old is not None and new is not None:
            rates[worker.peer] = {
                "prompt_tokens_per_s": (new.prompt_tokens - old.prompt_tokens) / seconds,
                "output_tokens_per_s": (new.output_tokens - old.output_tokens) / seconds,
                "received_bytes_per_s": (new.received_bytes - old.received_bytes) / seconds,
            }
    return rates


def _print_table(console: Console, workers: list[WorkerStatus], rates: dict[str, dict[str, float]]) -> None:
    # A line that the terminal breaks can be read; a table squeezed into it cannot.
    console.width = max(console.width, _TABLE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = (
        "worker",
        "role",
        "node",
        "state",
        "restarts",
        "running",
        "waiting",
        "blocks used",
        "leases",
        "transfers",
    )
    for name in (*columns, "prompt tok/s", "output tok/s", "KV MB/s"):
        table.add_column(name, justify="left" if name in ("worker", "role", "node", "state") else "right")
    for worker in workers:
        report = worker.report
        cells = ["–"] * 8
        if report is not None:
            used = f"{report.num_blocks - report.free_blocks}/{report.num_blocks}" if report.num_blocks else "–"
            cells[:5] = [str(report.running), str(report.waiting), used, str(report.leases), str(report.transfers)]
        rate = rates.get(worker.peer)
        if rate is not None:
            cells[5:] = [
                f"{rate['prompt_tokens_per_s']:.0f}",
                f"{rate['output_tokens_per_s']:.0f}",
                f"{rate['received_bytes_per_s'] / 1e6:.1f}",
            ]
        table.add_row(worker.worker, worker.role, worker.node, worker.phase, str(worker.restarts), *cells)
    console.print(table)
