"""Asks all workers the same, and waits for their answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from ...core.ids import PeerId
from ...core.messages import Message

_A = TypeVar("_A")


class Gather(Generic[_A]):
    """Belongs to the gateway's event loop.

    Args:
        send: delivers a message to a worker.
    """

    def __init__(self, send: Callable[[PeerId, Message], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[PeerId, _A]] = {}
        self._waiting: dict[int, tuple[set[PeerId], asyncio.Event]] = {}

    async def ask(
        self, peers: Collection[PeerId], question: Callable[[int], Message], timeout_s: float
    ) -> dict[PeerId, _A]:
        """The answers of those that answered in time.

        Args:
            peers: whom to ask.
            question: makes a message with this number, which its answer repeats.
            timeout_s: to wait for the last.
        """
        number = next(self._numbers)
        answers = self._answers[number] = {}
        missing, done = self._waiting[number] = set(peers), asyncio.Event()
        try:
            for peer in peers:
                self._send(peer, question(number))
            if missing:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), timeout_s)
        finally:
            del self._answers[number], self._waiting[number]
        return answers

    def answered(self, peer: PeerId, number: int, answer: _A) -> None:
        """A worker has answered; what nobody waits for is ignored."""
        if number in self._waiting:
            missing, done = self._waiting[number]
            if peer in missing:
                missing.discard(peer)
                self._answers[number][peer] = answer
                if not missing:
                    done.set()
