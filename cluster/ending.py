"""How an actor tells its owner that it has ended: the owner waits, and an owner that comes after it waits instead."""

from __future__ import annotations

import threading


class Ending:
    """Thread-safe."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._ended = False
        self._num_waits = 0

    def set(self) -> None:
        """It has ended."""
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait(self) -> bool:
        """Block until it has ended, or somebody else waits: an owner that died holds no thread.

        Returns:
            Whether it has ended.
        """
        with self._news:
            self._num_waits += 1
            mine = self._num_waits
            self._news.notify_all()
            self._news.wait_for(lambda: self._ended or self._num_waits != mine)
            return self._ended
