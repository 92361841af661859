"""Where the time of a step goes: the device's kernels, and the gaps between them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def profile_steps(run: Callable[[], None], steps: int, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """Run steps under torch's profiler. Blocks.

    Args:
        run: computes ``steps`` steps and waits for them.
        steps: how many.
        device: a GPU, whose kernels are looked at, or the CPU, whose operators are.
        trace: where to write a Chrome trace (gzip); None: nowhere.

    Returns:
        of a step: ``span_ms`` from the first kernel to the last, ``busy_ms`` with a kernel running, ``idle_us`` without
        one, in microseconds, and ``between_us``, the median of as many longest such gaps as there are between steps;
        and ``kernels``, the longest first, with their milliseconds and calls.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        run()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    intervals = []
    for event in events:
        start_us, end_us = event.time_range.start, event.time_range.end
        intervals.append((start_us, end_us))
        own_us = end_us - start_us if device.type == "cuda" else event.self_cpu_time_total
        kernels[event.name][0] += own_us
        kernels[event.name][1] += 1
    busy_us, span_us, gaps_us = _union(intervals)
    between_us = sorted(gaps_us, reverse=True)[: steps - 1]
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:24]
    return {
        "span_ms": round(span_us / steps / 1e3, 4),
        "busy_ms": round(busy_us / steps / 1e3, 4),
        "idle_us": round((span_us - busy_us) / steps, 1),
        "between_us": round(statistics.median(between_us), 1) if between_us else 0.0,
        "kernels": [
            {"name": name[:120], "ms": round(us / steps / 1e3, 4), "calls": round(calls / steps, 2)}
            for name, (us, calls) in longest
        ],
    }


def _union(intervals: list[tuple[float, float]]) -> tuple[float, float, list[float]]:
    """How much of the time from the first start to the last end is covered, that time, and the gaps."""
    if not intervals:
        return 0.0, 0.0, []
    intervals.sort()
    covered = 0.0
    gaps = []
    end = intervals[0][0]
    for start, stop in intervals:
        if start > end:
            gaps.append(start - end)
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered, end - intervals[0][0], gaps
