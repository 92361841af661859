"""Time, injected: everything that waits or expires asks a clock, so that tests move time by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings of time. Never blocks."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary origin; never goes back. For durations and deadlines."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch. For people and for timelines that span processes."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def monotonic_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move both readings forward by ``seconds`` ≥ 0."""
        if seconds < 0:
            raise ValueError(f"time does not go back: advance({seconds})")
        self._now_s += seconds

    def advance_to(self, now_s: float) -> None:
        """Move both readings to a time that has not passed; exactly, which adding a difference need not be."""
        if now_s < self._now_s:
            raise ValueError(f"time does not go back: advance_to({now_s}) at {self._now_s}")
        self._now_s = now_s
