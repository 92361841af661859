"""`tandem status --experts`: where the experts of each group are, how even that is, and how it came."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ...core.expert_messages import ExpertsReport
from ...core.units import format_bytes
from ..controller import WorkerStatus

_TABLE_WIDTH = 200
_TEXTS = ("group", "state", "attempts", "last attempt")
_FIGURES = ("ranks", "experts", "slots", "most replicas", "balancedness", "predicted", "placed", "moved", "bytes")
_NAMES = ("group", *_FIGURES[:4], "state", *_FIGURES[4:7], "attempts", *_FIGURES[7:], "last attempt")


def print_experts(console: Console, workers: list[WorkerStatus], now_s: float) -> None:
    """Print a row for each group, named by its first worker; ``now_s`` is the wall clock's."""
    console.width = max(console.width, _TABLE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _NAMES:
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    groups = [(worker.worker, worker.report.experts) for worker in workers if worker.report and worker.report.experts]
    for name, report in groups:
        table.add_row(name, *expert_cells(report, now_s))
    if groups:
        console.print(table)
    else:
        console.print("no group moves experts: see experts.parallel and experts.balance", markup=False)


def expert_cells(report: ExpertsReport, now_s: float) -> list[str]:
    """The cells of a row but the first. Moved experts and bytes: in the last attempt, and since the group formed."""
    attempts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.attempts.items()))
    last = "–"
    if report.outcome:
        detail = f": {report.detail}" if report.detail else ""
        last = f"{report.outcome} {max(now_s - report.ended_at_s, 0):.0f} s ago{detail}"
    return [
        str(report.num_ranks),
        f"{report.num_layers} × {report.num_experts}",
        str(report.num_slots),
        str(report.max_replicas),
        report.state,
        f"{report.balancedness:.4f}" if report.window_steps else "–",
        f"{report.predicted:.4f}" if report.outcome else "–",
        f"{max(now_s - report.placed_at_s, 0):.0f} s ago",
        attempts or "–",
        f"{report.moved} of {report.total_moved}",
        f"{format_bytes(report.moved_bytes)} of {format_bytes(report.total_bytes)}",
        last,
    ]
