"""`tandem status --kv`: what each worker's prefix cache and tiers hold and have done."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ...core.kv_messages import KVReport
from ...core.units import format_bytes
from ..controller import WorkerStatus

_TABLE_WIDTH = 140
_NAMES = ("worker", "medium", "state")
_FIGURES = ("blocks used", "hits", "hit rate", "in", "out", "in GB/s", "out GB/s", "evicted", "oldest", "failures")


def print_kv(console: Console, workers: list[WorkerStatus], now_s: float) -> None:
    """Print a row for each prefix cache and tier; ``now_s`` is the wall clock's."""
    console.width = max(console.width, _TABLE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (*_NAMES, *_FIGURES):
        table.add_column(name, justify="left" if name in _NAMES else "right")
    for worker in workers:
        for report in worker.report.kv if worker.report is not None else ():
            table.add_row(worker.worker, *kv_cells(report, now_s))
    console.print(table)


def kv_cells(report: KVReport, now_s: float) -> list[str]:
    """The cells of a row but the first. What is not counted of a medium is "–"."""
    tier = bool(report.medium)
    return [
        report.medium or "prefix cache",
        f"away: {report.away}" if report.away else "ready",
        f"{report.num_used}/{report.num_blocks}",
        str(report.hits),
        f"{report.hits / report.lookups:.0%}" if report.lookups else "–",
        format_bytes(report.stored_bytes) if tier else "–",
        format_bytes(report.loaded_bytes) if tier else "–",
        f"{report.stored_bytes / report.store_s / 1e9:.2f}" if report.store_s else "–",
        f"{report.loaded_bytes / report.load_s / 1e9:.2f}" if report.load_s else "–",
        str(report.evicted),
        f"{max(now_s - report.oldest_at_s, 0):.0f} s" if report.oldest_at_s else "–",
        str(report.failures) if tier else "–",
    ]
