"""One prompt's way from prefill to decode: the reading side. Sans-IO: events in, instructions out.

::

    REQUESTED ──accepted──► PULLING ──all verified, prompt done──► LOADED
        │                      │
        │ fail, abort          │ fail, abort
        ▼                      ▼
    DRAINING (reads still write into our blocks) ──last read ended──► FAILED or CLOSED

The reader owns the destination blocks throughout. They are given to somebody else (a recomputation, the free list)
only when no read can write into them any more; that is what DRAINING waits for. Every way out ends with `Release`,
exactly one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.clock import Clock
from ..core.errors import IllegalTransition
from ..core.ids import PeerId
from ..core.messages import FailureReason


class HandoffState(enum.Enum):
    """See the module's diagram."""

    REQUESTED = "requested"
    PULLING = "pulling"
    DRAINING = "draining"
    LOADED = "loaded"
    FAILED = "failed"
    CLOSED = "closed"


class Pull(NamedTuple):
    """Read these blocks of one layer group, and verify them: positions ``start`` … ``stop`` − 1 of the handoff's
    blocks."""

    layer_group: int
    start: int
    stop: int


class CancelPulls(NamedTuple):
    """Give up the reads that are outstanding; report each as `pull_ended` when it cannot write any more."""


class Release(NamedTuple):
    """Tell the peer that nothing will be read any more."""


class Loaded(NamedTuple):
    """Every block is here and verified."""


class Failed(NamedTuple):
    """The handoff is over; the first ``num_blocks`` blocks are here and verified."""

    reason: FailureReason
    num_blocks: int


class Closed(NamedTuple):
    """The handoff was aborted and nothing writes into its blocks any more."""


Instruction = Pull | CancelPulls | Release | Loaded | Failed | Closed


class Handoff:
    """The reading side of one transfer.

    Args:
        number: with our peer id, the transfer id.
        peer: the prefill peer.
        skip_tokens: tokens of the prefix that we have already; a whole number of blocks.
        num_tokens: tokens of the prompt.
        block_tokens: tokens a block.
        num_layer_groups: how many layer groups the peer publishes.
        clock: for the progress time-out.
    """

    def __init__(
        self,
        number: int,
        peer: PeerId,
        skip_tokens: int,
        num_tokens: int,
        block_tokens: int,
        num_layer_groups: int,
        clock: Clock,
    ) -> None:
        self.number = number
        self.peer = peer
        self.state = HandoffState.REQUESTED
        self.num_blocks = -(-num_tokens // block_tokens) - skip_tokens // block_tokens
        self.blocks: list[int] = []
        """The peer's block numbers, from the first block that we lack."""
        self.generations: list[int] = []
        self.history: list[str] = []
        self._skip_tokens = skip_tokens
        self._num_tokens = num_tokens
        self._block_tokens = block_tokens
        self._clock = clock
        self._asked = np.zeros(num_layer_groups, np.int64)
        self._verified = np.zeros((num_layer_groups, self.num_blocks), bool)
        self._outstanding: set[Pull] = set()
        self._prompt_done = False
        self._failure: FailureReason | None = None
        self._progress_s = clock.monotonic_s()
        self._log("requested")

    @property
    def last_progress_s(self) -> float:
        """When the peer last moved on, on the clock's monotonic scale."""
        return self._progress_s

    @property
    def finished(self) -> bool:
        """Whether nothing more can happen."""
        return self.state in (HandoffState.LOADED, HandoffState.FAILED, HandoffState.CLOSED)

    def accepted(self, blocks: Sequence[int], generations: Sequence[int]) -> list[Instruction]:
        """The peer tells where the KV will be.

        Raises:
            IllegalTransition: it had told so before.
        """
        if self.state is HandoffState.DRAINING or self.finished:
            return []
        self._require(HandoffState.REQUESTED, "accepted")
        if len(blocks) != self.num_blocks or len(generations) != self.num_blocks:
            return self.fail(FailureReason.REFUSED)
        self.blocks, self.generations = list(blocks), list(generations)
        self._move(HandoffState.PULLING, f"accepted with {len(blocks)} blocks")
        return self._advance()

    def ready(self, layer_group: int, num_tokens: int) -> list[Instruction]:
        """A watermark: this layer group's KV of the first ``num_tokens`` tokens may be read."""
        if self.state is HandoffState.DRAINING or self.finished:
            return []
        self._require(HandoffState.PULLING, "ready")
        if layer_group >= len(self._asked) or num_tokens > self._num_tokens:
            return self.fail(FailureReason.REFUSED)
        self._progress_s = self._clock.monotonic_s()
        # A block is read once, when it is full, or when it is the prompt's last.
        whole = (
            -(-num_tokens // self._block_tokens) if num_tokens == self._num_tokens else num_tokens // self._block_tokens
        )
        start, stop = int(self._asked[layer_group]), whole - self._skip_tokens // self._block_tokens
        if stop <= start:
            return []
        pull = Pull(layer_group, start, stop)
        self._asked[layer_group] = stop
        self._outstanding.add(pull)
        return [pull]

    def prompt_done(self) -> list[Instruction]:
        """The peer has computed the whole prompt; every watermark came before this."""
        if self.state is HandoffState.DRAINING or self.finished:
            return []
        self._require(HandoffState.PULLING, "prompt_done")
        self._progress_s = self._clock.monotonic_s()
        self._prompt_done = True
        self._log("prompt done")
        return self._advance()

    def pull_ended(self, pull: Pull, failure: FailureReason | None, num_good: int = 0) -> list[Instruction]:
        """A read can write no more.

        Args:
            pull: the instruction that started it.
            failure: None when its blocks arrived and were verified.
            num_good: of a failed read, how many of its first blocks are verified all the same.

        Raises:
            IllegalTransition: no such read is outstanding.
        """
        if pull not in self._outstanding:
            raise IllegalTransition(f"{pull} is not outstanding", history=tuple(self.history))
        self._outstanding.discard(pull)
        good = pull.stop if failure is None else pull.start + num_good
        self._verified[pull.layer_group, pull.start : good] = True
        if failure is not None and self.state is HandoffState.PULLING:
            return self.fail(failure)
        return self._advance()

    def fail(self, reason: FailureReason) -> list[Instruction]:
        """The KV will not come, or not all of it. Without effect once the handoff is draining or over."""
        if self.state is HandoffState.DRAINING or self.finished:
            return []
        self._failure = reason
        self._move(HandoffState.DRAINING, f"failed: {reason.value}")
        return [*([CancelPulls()] if self._outstanding else []), *self._advance()]

    def abort(self) -> list[Instruction]:
        """The request is gone. Turns a failure that is still draining into an abort."""
        if self.finished:
            return []
        draining = self.state is HandoffState.DRAINING
        self._failure = None
        self._move(HandoffState.DRAINING, "aborted")
        return [*([CancelPulls()] if self._outstanding and not draining else []), *self._advance()]

    def _advance(self) -> list[Instruction]:
        if self.state is HandoffState.PULLING:
            if self._prompt_done and not self._outstanding:
                if not self._verified.all():
                    return self.fail(FailureReason.TRANSPORT)
                self._move(HandoffState.LOADED, "loaded")
                return [Release(), Loaded()]
        elif self.state is HandoffState.DRAINING and not self._outstanding:
            if self._failure is None:
                self._move(HandoffState.CLOSED, "closed")
                return [Release(), Closed()]
            self._move(HandoffState.FAILED, "drained")
            complete = self._verified.all(axis=0)
            valid = self.num_blocks if complete.all() else int(complete.argmin())
            return [Release(), Failed(self._failure, valid)]
        return []

    def _require(self, state: HandoffState, event: str) -> None:
        if self.state is not state:
            raise IllegalTransition(
                f"handoff {self.number} of {self.peer}: {event} in state {self.state.value}",
                history=tuple(self.history),
            )

    def _move(self, state: HandoffState, why: str) -> None:
        self.state = state
        self._log(why)

    def _log(self, what: str) -> None:
        self.history.append(f"{self._clock.monotonic_s():.6f} {what}")
