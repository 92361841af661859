"""How long tests wait: their limits are for a machine that does nothing else and is as fast as usual. They grow with what
else this one does, and with how slow it is."""

from __future__ import annotations

import functools
import os
import time

_USUAL_S = 0.003
"""What `_work` takes on a server's processor of 2023."""


def stretched(seconds: float) -> float:
    """A limit, times the processes that have lately wanted to run on each core, where these are more than one, and times
    how much longer than usual this machine takes for the same."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) * slowness()


@functools.cache
def slowness() -> float:
    """How much longer than usual this machine computes; 1 at least."""
    return max(1.0, min(_work() for _ in range(5)) / _USUAL_S)


def _work() -> float:
    """Processor seconds of a loop."""
    begin_s = time.thread_time()
    total = 0
    for number in range(100_000):
        total += number
    return time.thread_time() - begin_s
