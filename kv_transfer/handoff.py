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

All is counted in tokens: the two ends' blocks may be of different sizes. A read covers the same tokens in all KV
groups, but for those that a group with a window never needs.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.clock import Clock
from ..core.errors import IllegalTransition
from ..core.ids import PeerId
from ..core.messages import FailureReason, Table


class HandoffState(enum.Enum):
    """See the module's diagram."""

    REQUESTED = "requested"
    PULLING = "pulling"
    DRAINING = "draining"
    LOADED = "loaded"
    FAILED = "failed"
    CLOSED = "closed"


class Pull(NamedTuple):
    """Read these tokens' KV of one layer group, and verify it: positions ``start`` … ``stop`` − 1 of the prompt."""

    layer_group: int
    start: int
    stop: int


class CancelPulls(NamedTuple):
    """Give up the reads that are outstanding; report each as `pull_ended` when it cannot write any more."""


class Release(NamedTuple):
    """Tell the peer that nothing will be read any more."""


class Loaded(NamedTuple):
    """The KV of every token is here and verified."""


class Failed(NamedTuple):
    """The handoff is over; the KV of the prompt's first ``num_tokens`` tokens, the skipped ones included, is here and
    verified."""

    reason: FailureReason
    num_tokens: int


class Closed(NamedTuple):
    """The handoff was aborted and nothing writes into its blocks any more."""


Instruction = Pull | CancelPulls | Release | Loaded | Failed | Closed


class Handoff:
    """The reading side of one transfer.

    Args:
        number: with our peer id, the transfer id.
        peer: the prefill peer.
        skip_tokens: tokens of the prefix that we have already.
        num_tokens: tokens of the prompt, more than that.
        first_tokens: of each KV group, the first token that we need: ``skip_tokens``, or later where the group's window
            never looks back so far.
        source_block_tokens: the peer's tokens a block.
        unit_tokens: what is read ends at multiples of this, or with the prompt.
        num_layer_groups: how many layer groups the peer publishes.
        clock: for the progress time-out.
    """

    def __init__(
        self,
        number: int,
        peer: PeerId,
        skip_tokens: int,
        num_tokens: int,
        first_tokens: Sequence[int],
        source_block_tokens: int,
        unit_tokens: int,
        num_layer_groups: int,
        clock: Clock,
    ) -> None:
        self.number = number
        self.peer = peer
        self.state = HandoffState.REQUESTED
        self.tables: list[Table] = []
        """The peer's blocks, for each KV group."""
        self.first_tokens = list(first_tokens)
        self.history: list[str] = []
        self._skip_tokens = skip_tokens
        self._num_tokens = num_tokens
        self._source_block_tokens = source_block_tokens
        self._unit_tokens = unit_tokens
        self._clock = clock
        self._asked = [skip_tokens] * num_layer_groups
        self._verified = np.zeros((num_layer_groups, num_tokens - skip_tokens), bool)
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

    def accepted(self, tables: Sequence[Table]) -> list[Instruction]:
        """The peer tells where the KV will be.

        Raises:
            IllegalTransition: it had told so before.
        """
        if self.state is HandoffState.DRAINING or self.finished:
            return []
        self._require(HandoffState.REQUESTED, "accepted")
        if len(tables) != len(self.first_tokens) or not all(map(self._covers, tables, self.first_tokens)):
            return self.fail(FailureReason.REFUSED)
        self.tables = list(tables)
        self._move(HandoffState.PULLING, f"accepted with {sum(len(table.blocks) for table in tables)} blocks")
        return self._advance()

    def ready(self, layer_group: int, num_tokens: int) -> list[Instruction]:
        """A watermark: this layer group's KV of the first ``num_tokens`` tokens may be read."""
        if self.state is HandoffState.DRAINING or self.finished:
            return []
        self._require(HandoffState.PULLING, "ready")
        if layer_group >= len(self._asked) or num_tokens > self._num_tokens:
            return self.fail(FailureReason.REFUSED)
        self._progress_s = self._clock.monotonic_s()
        start, stop = self._asked[layer_group], num_tokens
        if num_tokens < self._num_tokens:
            stop -= stop % self._unit_tokens
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
            failure: None when its KV arrived and was verified.
            num_good: of a failed read, how many of its first tokens are verified all the same.

        Raises:
            IllegalTransition: no such read is outstanding.
        """
        if pull not in self._outstanding:
            raise IllegalTransition(f"{pull} is not outstanding", history=tuple(self.history))
        self._outstanding.discard(pull)
        good = pull.stop if failure is None else pull.start + num_good
        self._verified[pull.layer_group, pull.start - self._skip_tokens : good - self._skip_tokens] = True
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
            return [Release(), Failed(self._failure, self._valid_tokens())]
        return []

    def _valid_tokens(self) -> int:
        """Tokens of the prefix that every KV group can vouch for."""
        complete = self._verified.all(axis=0)
        if complete.all():
            return self._num_tokens
        # What a group left out for its window's sake is out of sight of the whole prompt's next token, not of a part's.
        if max(self.first_tokens) > self._skip_tokens:
            return self._skip_tokens
        return self._skip_tokens + int(complete.argmin())

    def _covers(self, table: Table, first_token: int) -> bool:
        """Whether a table names a block for every token from ``first_token`` on."""
        size = self._source_block_tokens
        blocks = -(-self._num_tokens // size) - table.first_token // size
        aligned = table.first_token % size == 0 and table.first_token <= first_token
        return aligned and len(table.blocks) == len(table.generations) == blocks

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
