"""What is told after the device: in order, never before it is true, and nothing once the device is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from tandem.engine.watermarks import Watermarks


class Event:
    """Stands for `torch.cuda.Event`: fires, or fails, when the test says so."""

    made: list[Event]

    def __init__(self, blocking: bool) -> None:
        assert blocking, "a waiter would spin"
        self.fired = threading.Event()
        self.error = ""
        Event.made.append(self)

    def record(self, stream: object) -> None:
        assert stream == "the stream"

    def synchronize(self) -> None:
        self.fired.wait()
        if self.error:
            raise RuntimeError(self.error)


@pytest.fixture
def watermarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watermarks]:
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    watermarks = Watermarks(torch.device("cuda", 0))
    yield watermarks
    watermarks.close()
    watermarks.close()


def test_at_once_on_a_cpu() -> None:
    told: list[int] = []
    watermarks = Watermarks(torch.device("cpu"))
    watermarks.after(lambda: told.append(1))
    assert told == [1]
    watermarks.flush()
    watermarks.close()


def test_in_order_and_not_before(watermarks: Watermarks) -> None:
    told: list[int] = []
    first = threading.Event()
    watermarks.after(lambda: (told.append(0), first.set()))  # type: ignore[func-returns-value]
    for number in (1, 2):
        watermarks.after(lambda number=number: told.append(number))  # type: ignore[misc]
    Event.made[2].fired.set()
    assert not first.wait(0.02)
    assert told == []
    Event.made[0].fired.set()
    assert first.wait(5)
    assert told == [0]
    flushed = threading.Thread(target=watermarks.flush)
    flushed.start()
    flushed.join(0.02)
    assert flushed.is_alive()
    Event.made[1].fired.set()
    flushed.join(5)
    assert not flushed.is_alive()
    assert told == [0, 1, 2]


def test_a_lost_device_is_told_of_nothing_and_holds_nobody_up(watermarks: Watermarks) -> None:
    told: list[int] = []
    for number in range(3):
        watermarks.after(lambda number=number: told.append(number))  # type: ignore[misc]
        Event.made[number].error = "an illegal memory access was encountered" if number != 1 else ""
        Event.made[number].fired.set()
    watermarks.flush()
    assert told == [1]
