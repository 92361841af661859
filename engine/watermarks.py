"""What a step has made readable, told when the device has made it so."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from ..core.log import logger


class Watermarks:
    """Calls back, in order, once what was queued before has been computed.

    On a CPU that is at once. On a GPU a step is queued long before it is computed: an event marks the place, and a
    thread sleeps until it fires and calls back, while the owner thread queues the layers behind it. Waiting for an
    event is all that the thread does with the device.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda" and device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._pending: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._run, name="watermarks", daemon=True)
            self._thread.start()

    def after(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` when all that the owner's stream has been given so far is computed. Does not wait for it.

        Args:
            tell: called on another thread on a GPU; must not fail. When the device is lost, it is never called.
        """
        if self._thread is None:
            tell()
            return
        # One that lets its waiter sleep.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        with self._changed:
            self._pending.append((event, tell))
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when everything has been told. Blocks until the device has computed what it was given."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def close(self) -> None:
        """End the thread, when everything has been told. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                event, tell = self._pending[0]
            try:
                event.synchronize()
                tell()
            except RuntimeError as error:  # the owner's next call finds that the device is lost, too
                logger.error("a step's events are lost: %s", error)
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()
