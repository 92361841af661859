"""Whether the engine thread gets on: read by other threads, which it need not answer."""

from __future__ import annotations

from ..core.clock import Clock


class Heartbeat:
    """Written by the engine thread, read by any: each field is one assignment.

    Args:
        clock: tells the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._well_s = clock.monotonic_s()
        self._owes = False
        """Whether a step is due, or a turn has begun and not ended."""

    def wakes(self) -> None:
        """A turn begins: from now on the thread is at work, until `sleeps`."""
        if not self._owes:
            self._well_s = self._clock.monotonic_s()
            self._owes = True

    def steps(self) -> None:
        """A step was taken."""
        self._well_s = self._clock.monotonic_s()

    def sleeps(self, *, has_work: bool) -> None:
        """A turn ends. ``has_work``: something waits for a step that could not be taken yet."""
        self._owes = has_work

    def stalled_s(self) -> float:
        """Seconds for which there has been work and no step; 0 when there is none."""
        return max(0.0, self._clock.monotonic_s() - self._well_s) if self._owes else 0.0
