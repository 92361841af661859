"""What `tandem status --kv` prints."""

from __future__ import annotations

import io

from rich.console import Console
from tandem.cluster.cli.kv_table import print_kv
from tandem.cluster.controller import WorkerStatus
from tandem.core.kv_messages import KVReport
from tandem.core.messages import Report


def test_a_row_for_each_medium_of_each_worker() -> None:
    cache = KVReport("", 64, 10, 0, 7, 0, 0, 0.0, 0.0, 3, 0.0, 0, "")
    tier = KVReport("disk-1", 1000, 400, 80, 60, 3 << 30, 1 << 30, 1.5, 2.0, 5, 940.0, 2, "io")
    workers = [
        WorkerStatus("decode-0", "decode-0#1", "decode", "ready", "n", 0, Report(0, 0, 0, 0, 0, kv=[cache, tier])),
        WorkerStatus("prefill-0", "prefill-0#1", "prefill", "starting", "", 0, None),
    ]
    text = io.StringIO()
    print_kv(Console(file=text), workers, 1000.0)
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert lines[1] == ["decode-0", "prefix", "cache", "ready", "10/64", "7", "–", "–", "–", "–", "–", "3", "–", "–"]
    assert lines[2] == [
        "decode-0",
        "disk-1",
        "away:",
        "io",
        "400/1000",
        "60",
        "75%",
        "1.0",
        "GiB",
        "3.0",
        "GiB",
        "0.54",
        "2.15",
        "5",
        "60",
        "s",
        "2",
    ]
    assert len(lines) == 3
