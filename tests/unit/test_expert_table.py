"""What `tandem status --experts` prints."""

from __future__ import annotations

import io

from rich.console import Console
from tandem.cluster.cli.expert_table import print_experts
from tandem.cluster.controller import WorkerStatus
from tandem.core.expert_messages import ExpertsReport
from tandem.core.messages import Report


def printed(*reports: ExpertsReport | None) -> list[str]:
    workers = [
        WorkerStatus(f"decode-{n}", f"decode-{n}#1", "decode", "ready", "n", 0, Report(0, 0, 0, 0, 0, experts=report))
        for n, report in enumerate(reports)
    ]
    text = io.StringIO()
    print_experts(Console(file=text), workers, 1000.0)
    return text.getvalue().splitlines()


def test_a_row_for_each_group() -> None:
    report = ExpertsReport(
        2, 4, 8, 10, 2, "watching", 900.0, 0.75, 0.96875, 1000, "done", "7 experts moved in 0.25 s", 990.0, 0.25, 7,
        7 << 20, {"done": 2, "timeout": 1}, 9, 9 << 20,
    )  # fmt: skip
    lines = printed(report, None, ExpertsReport(2, 4, 8, 8, 1, "watching", 1000.0))
    assert len(lines) == 3
    for cell in (
        "decode-0", "4 × 8", "watching", "0.7500", "0.9688", "100 s ago", "2 done, 1 timeout", "7 of 9",
        "7.0 MiB of 9.0 MiB", "done 10 s ago: 7 experts moved in 0.25 s",
    ):  # fmt: skip
        assert cell in lines[1]
    assert "decode-2" in lines[2]
    assert "–" in lines[2]


def test_nobody() -> None:
    assert printed(None) == ["no group moves experts: see experts.parallel and experts.balance"]
