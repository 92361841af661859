"""An order between two host threads and what each has queued on its stream.

Waiting for a CUDA event that was never recorded is a no-op, so an event alone orders two threads only if something else
tells the second that the first has recorded. Here that is a flag on the host: it goes up after the event is recorded,
and down after the waiter's stream has been made to wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch

from ..core.errors import IllegalTransition, TandemError


class EventClosed(TandemError):
    """The event was closed: what was waited for will not come."""


class EventTimeout(TandemError):
    """The recorder did not come in time."""

    retryable = True


class DeviceEvent(Protocol):
    """The device's part of the order; `torch.cuda.Event` is one. Neither call waits."""

    def record(self, stream: torch.cuda.Stream | None) -> None:
        """Mark what the stream has been given so far."""

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        """Let what the stream is given from now on run after what was marked last."""


class _OnHost:
    """On a CPU what was queued has been computed."""

    def record(self, stream: torch.cuda.Stream | None) -> None: ...

    def wait(self, stream: torch.cuda.Stream | None) -> None: ...


class CpuGpuEvent:
    """Hands something over from one recorder to one waiter, again and again; each a thread and, on a GPU, its stream.

    One hand-over is under way at a time: who records again must know, as by a second event in the other direction, that
    the first was waited for. On a CPU the streams are None, and the order is that of the threads.

    Args:
        device: whose streams they are.
        condition: for model checking: what the threads meet at.
        event: for model checking: the device's part.
    """

    def __init__(
        self,
        device: torch.device,
        condition: Callable[[], threading.Condition] = threading.Condition,
        event: DeviceEvent | None = None,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._event: DeviceEvent = event or (torch.cuda.Event() if on_gpu else _OnHost())
        self._changed = condition()
        self._raised = False
        self._waited = True
        self._closed = False
        self._generation = 0

    def record(self, stream: torch.cuda.Stream | None = None) -> int:
        """Hand over what the stream has been given so far. Does not wait.

        Returns:
            the hand-over's number, from 1 on.

        Raises:
            EventClosed: it was closed.
            IllegalTransition: the last hand-over was not waited for.
            RuntimeError: CUDA's; the event is closed.
        """
        with self._changed:
            self._refuse_closed()
            if self._raised:
                raise IllegalTransition(f"hand-over {self._generation} was not waited for before the next was recorded")
        # Before the flag goes up: who sees the flag waits for this record, not for an earlier one.
        self._on_device(self._event.record, stream)
        with self._changed:
            self._refuse_closed()
            self._raised = True
            self._generation += 1
            self._changed.notify_all()
            return self._generation

    def wait(self, stream: torch.cuda.Stream | None = None, timeout_s: float | None = None) -> int:
        """Let the stream wait for what was handed over. Blocks until it is, not until the device has computed it.

        Args:
            stream: the waiter's.
            timeout_s: how long to wait for the recorder; None: for ever.

        Returns:
            the hand-over's number.

        Raises:
            EventClosed: it was closed, before or while this waited.
            EventTimeout: nothing was handed over in time. It may be waited for again.
            IllegalTransition: another thread waits already.
            RuntimeError: CUDA's; the event is closed.
        """
        with self._changed:
            if not self._waited:
                raise IllegalTransition("two threads wait for an event, which has one waiter")
            self._waited = False
            try:
                found = self._changed.wait_for(lambda: self._raised or self._closed, timeout_s)
            finally:
                self._waited = True
            self._refuse_closed()
            if not found:
                raise EventTimeout(f"hand-over {self._generation + 1} did not come within {timeout_s} s")
            generation = self._generation
        # Before the flag goes down: the recorder may then record anew, and this stream wait for that instead.
        self._on_device(self._event.wait, stream)
        with self._changed:
            self._refuse_closed()
            self._raised = False
            return generation

    def close(self) -> None:
        """End it: whoever waits, or comes later, gets `EventClosed`. Any thread's. Does not wait. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EventClosed(f"the event was closed after hand-over {self._generation}")

    def _on_device(self, call: Callable[[torch.cuda.Stream | None], None], stream: torch.cuda.Stream | None) -> None:
        try:
            call(stream)
        except BaseException:
            self.close()
            raise
