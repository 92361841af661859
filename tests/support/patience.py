"""How long tests wait: their limits are for a machine that does nothing else and is as fast as usual. They grow with what
else this one does, and with how slow it is just now."""

from __future__ import annotations

import os
import time

_USUAL_S = 0.003
"""What `_work` takes on a server's processor of 2023."""
_FRESH_S = 10.0
_MOST = 10.0
"""Times as long is for ever."""

_known = (float("-inf"), 1.0)
"""When it was last measured, and what."""


def stretched(seconds: float) -> float:
    """A limit, times the processes that have lately wanted to run on each core, where these are more than one, and times
    how much longer than usual this machine takes for the same."""
    return seconds * min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) * slowness(), _MOST)


def slowness() -> float:
    """How much longer than usual this machine computes; 1 at least. Measured, for some milliseconds, now and then."""
    global _known
    if time.monotonic() - _known[0] > _FRESH_S:
        _known = time.monotonic(), max(1.0, min(_work() for _ in range(5)) / _USUAL_S)
    return _known[1]


def _work() -> float:
    """Processor seconds of a loop."""
    begin_s = time.thread_time()
    total = 0
    for number in range(100_000):
        total += number
    return time.thread_time() - begin_s
