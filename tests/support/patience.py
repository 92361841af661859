"""How long tests wait: their limits are for a machine that does nothing else, and grow with what else this one does."""

from __future__ import annotations

import os


def stretched(seconds: float) -> float:
    """A limit, times the processes that have lately wanted to run on each core, where these are more than one."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
