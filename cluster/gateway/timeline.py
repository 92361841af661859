"""When each stage of a request happened, for the last requests."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from ...core.clock import Clock
from ...core.ids import RequestId

_MAX_MARKS = 512


class Mark(NamedTuple):
    """A stage, where it happened, and when by that process's wall clock."""

    name: str
    process: str
    at_s: float
    detail: str


class Timeline:
    """One request's marks."""

    def __init__(self, request_id: RequestId, process: str, clock: Clock) -> None:
        self.request_id = request_id
        self.started_s = clock.monotonic_s()
        self._process = process
        self._clock = clock
        self._marks: list[Mark] = []

    def mark(self, name: str, detail: str = "") -> None:
        """Something happened here, now."""
        self.add(name, self._process, self._clock.wall_s(), detail)

    def add(self, name: str, process: str, at_s: float, detail: str) -> None:
        """Something happened elsewhere."""
        if len(self._marks) < _MAX_MARKS:
            self._marks.append(Mark(name, process, at_s, detail))

    def marks_of(self, process: str) -> list[Mark]:
        """What happened in one process."""
        return [mark for mark in self._marks if mark.process == process]

    def as_json(self) -> dict[str, Any]:
        """For `GET /debug/requests/{id}`: marks in order, with milliseconds since the first."""
        marks = sorted(self._marks, key=lambda mark: mark.at_s)
        start_s = marks[0].at_s if marks else 0.0
        return {
            "id": self.request_id,
            "stages": [
                {
                    "ms": round((mark.at_s - start_s) * 1e3, 3),
                    "stage": mark.name,
                    "process": mark.process,
                    "at": mark.at_s,
                    **({"detail": mark.detail} if mark.detail else {}),
                }
                for mark in marks
            ],
        }


class Timelines:
    """The last ``size`` timelines, by request id."""

    def __init__(self, process: str, clock: Clock, size: int = 1000) -> None:
        self._process = process
        self._clock = clock
        self._size = size
        self._by_id: OrderedDict[RequestId, Timeline] = OrderedDict()

    def open(self, request_id: RequestId) -> Timeline:
        """A new request's timeline."""
        timeline = self._by_id[request_id] = Timeline(request_id, self._process, self._clock)
        if len(self._by_id) > self._size:
            self._by_id.popitem(last=False)
        return timeline

    def get(self, request_id: RequestId) -> Timeline | None:
        """A request's timeline, if it is remembered."""
        return self._by_id.get(request_id)
