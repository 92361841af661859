"""`CpuGpuEvent`: its own code over every interleaving of two threads, and what it refuses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.interleavings import Explorer, ModelCondition, Scheduler
from tandem.core.errors import IllegalTransition
from tandem.kernels.events import CpuGpuEvent, EventClosed, EventTimeout

CPU = torch.device("cpu")


class Stream:
    """Of a device that runs late: what was queued has an order only with what its stream waits for."""

    def __init__(self) -> None:
        self.queued = 0
        self.after = 0
        """How much of the other stream comes before what is queued now."""


class ModelEvent:
    """CUDA's: an event that was never recorded holds nobody up."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.marked = 0

    def record(self, stream: Any) -> None:
        self._scheduler.point("event.record")
        self.marked = stream.queued
        self._scheduler.point("event.recorded")

    def wait(self, stream: Any) -> None:
        self._scheduler.point("event.wait")
        stream.after = self.marked
        self._scheduler.point("event.waited")


class FlagFirst(CpuGpuEvent):
    """Wrong on purpose: the flag goes up before the event is recorded."""

    def record(self, stream: Any = None) -> int:
        with self._changed:
            self._refuse_closed()
            assert not self._raised
            self._raised = True
            self._generation += 1
            self._changed.notify_all()
        self._event.record(stream)
        return self._generation


class LoweredFirst(CpuGpuEvent):
    """Wrong on purpose: the flag goes down before the stream waits."""

    def wait(self, stream: Any = None, timeout_s: float | None = None) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._raised or self._closed, timeout_s)
            self._refuse_closed()
            self._raised = False
            generation = self._generation
        self._event.wait(stream)
        return generation


def hand_over(scheduler: Scheduler, kind: type[CpuGpuEvent], timeouts: bool, closes: bool, rounds: int) -> None:
    """The migrator's and the engine's loops: one buffer, filled by one stream and emptied by another."""

    devices = ModelEvent(scheduler), ModelEvent(scheduler)
    staged, consumed = (kind(CPU, lambda: ModelCondition(scheduler), device) for device in devices)  # type: ignore[arg-type,return-value]
    streams: list[Any] = [Stream(), Stream()]
    scheduler.state = lambda: (
        *(device.marked for device in devices),
        *((s.queued, s.after) for s in streams),
        *(
            tuple(v.held if k == "_changed" else v for k, v in vars(e).items() if k != "_event")
            for e in (staged, consumed)
        ),
    )
    timeout_s = 1.0 if timeouts else None

    def again(wait: Callable[[], int]) -> int:
        for _ in range(2):
            try:
                return wait()
            except EventTimeout:
                continue
        raise EventClosed("given up")

    def fill() -> None:
        mine = streams[0]
        for round_ in range(1, rounds + 1):
            mine.queued += 1  # the buffer's new contents
            assert staged.record(mine) == round_
            assert again(lambda: consumed.wait(mine, timeout_s)) == round_
            assert mine.after == 2 * round_, "the buffer is filled again before it was emptied"

    def empty() -> None:
        mine = streams[1]
        for round_ in range(1, rounds + 1):
            assert again(lambda: staged.wait(mine, timeout_s)) == round_
            assert mine.after == round_, "the buffer is read before it was filled"
            mine.queued += 2
            assert consumed.record(mine) == round_

    def until_closed(run: Callable[[], None]) -> Callable[[], None]:
        def run_it() -> None:
            try:
                run()
            except EventClosed:
                # As whoever fails does: nobody waits for it for ever.
                staged.close()
                consumed.close()

        return run_it

    threads = {"fill": until_closed(fill), "empty": until_closed(empty)}
    if closes:

        def close() -> None:
            staged.close()
            consumed.close()

        threads["close"] = close
    scheduler.run(threads)


@pytest.mark.parametrize(
    ("timeouts", "closes", "rounds"), [(False, False, 4), (False, True, 2), (True, False, 2), (True, True, 1)]
)
def test_every_interleaving_hands_over_in_order(timeouts: bool, closes: bool, rounds: int) -> None:
    explorer = Explorer(lambda scheduler: hand_over(scheduler, CpuGpuEvent, timeouts, closes, rounds))
    explorer.explore()
    assert len(explorer.known) >= 50, f"only {len(explorer.known)} states were reached"


def impatient(scheduler: Scheduler, kind: type[CpuGpuEvent]) -> None:
    """A recorder that tries again and again, and is refused as long as the last hand-over was not waited for."""
    device = ModelEvent(scheduler)
    event = kind(CPU, lambda: ModelCondition(scheduler), device)  # type: ignore[arg-type,return-value]
    streams: list[Any] = [Stream(), Stream()]
    scheduler.state = lambda: (
        device.marked, streams[0].queued, streams[1].after, event._raised, event._generation, event._changed.held  # type: ignore[attr-defined]
    )  # fmt: skip

    def record() -> None:
        for _ in range(4):
            with contextlib.suppress(IllegalTransition):
                streams[0].queued = event._generation + 1
                event.record(streams[0])

    def wait() -> None:
        with contextlib.suppress(EventTimeout):
            for _ in range(3):
                number = event.wait(streams[1], 1.0)
                assert streams[1].after == number, "the stream waits for another hand-over"

    scheduler.run({"record": record, "wait": wait})


def test_an_impatient_recorder_disturbs_no_hand_over() -> None:
    explorer = Explorer(lambda scheduler: impatient(scheduler, CpuGpuEvent))
    explorer.explore()
    assert len(explorer.known) >= 50


def test_the_exploration_finds_a_wrong_order() -> None:
    with pytest.raises(AssertionError, match="before it was"):
        Explorer(lambda scheduler: hand_over(scheduler, FlagFirst, False, False, 2)).explore()
    with pytest.raises(AssertionError, match="another hand-over"):
        Explorer(lambda scheduler: impatient(scheduler, LoweredFirst)).explore()


def test_recording_twice_is_an_error_and_changes_nothing() -> None:
    event = CpuGpuEvent(CPU)
    assert event.record() == 1
    with pytest.raises(IllegalTransition, match="hand-over 1 was not waited for"):
        event.record()
    assert event.wait(timeout_s=0) == 1
    assert event.record() == 2


def test_a_time_out_is_an_error_and_the_event_goes_on() -> None:
    event = CpuGpuEvent(CPU)
    with pytest.raises(EventTimeout, match=r"hand-over 1 did not come within 0\.01 s"):
        event.wait(timeout_s=0.01)
    event.record()
    assert event.wait(timeout_s=0) == 1


def test_closing_wakes_the_waiter() -> None:
    event = CpuGpuEvent(CPU)
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            event.wait()
        except EventClosed as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    event.close()
    event.close()
    thread.join(10)
    assert len(seen) == 1
    for call in (event.wait, event.record):
        with pytest.raises(EventClosed):
            call()


def test_a_device_that_fails_closes_the_event() -> None:
    class Lost:
        def record(self, stream: Any) -> None: ...

        def wait(self, stream: Any) -> None:
            raise RuntimeError("the device is lost")

    event = CpuGpuEvent(CPU, event=Lost())
    event.record()
    with pytest.raises(RuntimeError, match="lost"):
        event.wait(timeout_s=0)
    with pytest.raises(EventClosed):  # and not: hand-over 1 was not waited for, for ever
        event.record()
