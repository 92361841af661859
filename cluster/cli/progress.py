"""What a launch shows while it goes on: one line that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from ..tandem_cluster import Cluster

_POLL_S = 0.15


def watch_signals(stop: threading.Event) -> None:
    """Set a flag, which is looked at often: Ray's calls do not take kindly to exceptions out of signal handlers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())


class Interrupted(Exception):
    """The user asked to stop while something went on."""


class Progress:
    """The current step, and how long it has taken.

    Args:
        console: where it is shown.
        stopped: whether the user has asked to stop.
    """

    def __init__(self, console: Console, stopped: Callable[[], bool] = lambda: False) -> None:
        self._console = console
        self._stopped = stopped
        self._status: Status | None = None
        self._shown = ""
        self._started_s = time.monotonic()

    def check(self) -> None:
        """Raises `Interrupted` if the user has asked to stop."""
        if self._stopped():
            raise Interrupted

    def show(self, text: str) -> None:
        """What goes on now."""
        self.check()
        if text == self._shown:
            return
        self._shown = text
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(text)
                self._status.start()
            self._status.update(text)
        else:
            self._console.print(f"[{time.monotonic() - self._started_s:5.1f} s] {text}", markup=False)

    def done(self, text: str) -> None:
        """The last step is over."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._console.print(text)


def show_launch(cluster: Cluster, progress: Progress) -> None:
    """Show each worker's phase until all serve.

    Raises:
        TandemError: a worker could not start.
    """
    progress.show("starting the workers")
    while not cluster.wait_ready(_POLL_S):
        progress.check()
        phases = cluster.phases()
        waiting = {worker: phase for worker, phase in phases.items() if phase != "ready"}
        if waiting:
            progress.show(" · ".join(f"{worker}: {phase}" for worker, phase in waiting.items()))
