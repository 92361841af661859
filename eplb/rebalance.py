"""How ranks agree on each step of a rebalance. Sans-IO: one machine a rank, driven by two threads under a lock.

Every few steps of the engine all ranks exchange a *word* each: where they are. From the words of all, and nothing else,
each rank decides what comes next; the words are the same everywhere, and so is the decision. No rank ever asks one
peer, or takes part only if it has something to say.

::

    the word of all ranks                        decided, by all, before the same step
    ─────────────────────────────────────────────────────────────────────────────────────
    the leader OFFERS, the others are IDLE       read the leader's plan (position 0)
    all are READY at position 0                  stage the first changed layer (position 1)
    all are READY at position p                  commit that layer; stage the next, or done
    one FAILED                                   the attempt ends; the layer stays as it was
    anything else                                nothing

**No weights are read that were overwritten.** A rank overwrites a layer only when a commit was decided, so when all
ranks had said READY: their reads of that layer had ended. A new attempt begins only when all ranks say IDLE, which a
rank does when its reads have ended, also those of an attempt that failed, and its device has written what it committed.

**READY is a promise.** What was said cannot be taken back before its exchange is decided: a failure in between counts
only if the others have not decided to commit. So the layer is either committed by all or by none.

**A lost exchange.** When a rank dies within an exchange, some of the others may have its word and some not, and may
have decided to commit while others did not. Who did not has promised, though, and keeps what it staged; and whoever
decided cannot get further without it. `eplb.standing` makes them equal before they serve again.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..core.clock import Clock
from ..core.errors import IllegalTransition, WorkerError


class Phase(enum.IntEnum):
    """Where a rank is."""

    IDLE = 0
    """Ready for an attempt."""
    OFFERS = 1
    """The leader: likewise, and it has a plan."""
    BUSY = 2
    """Reads the plan, or stages a layer."""
    READY = 3
    """Has read the plan, or staged the layer."""
    FAILED = 4
    """Cannot."""
    DRAINING = 5
    """The attempt is over, but something may still be read or written for it."""


class Reason(enum.IntEnum):
    """Why an attempt ended."""

    DONE = 0
    TIMEOUT = 1
    """A rank did not stage a layer in time."""
    TRANSFER = 2
    """Bytes did not arrive."""
    CORRUPTED = 3
    """They arrived, and are not what the peer has."""
    GENERATION = 4
    """A peer's layer was not the one that was expected."""
    PLAN = 5
    """The plan could not be read, or does not fit."""
    EXCEPTION = 6
    """A thread raised; the log has it."""
    DISAGREE = 7
    """The ranks are not at the same place: a bug."""
    PEER_LOST = 8
    """An exchange failed: a rank is gone."""
    NOT_BEGUN = 9
    """The ranks were not all idle in time."""
    CLOSED = 10


_WORD = struct.Struct("<QIBBHQ")
WORD_BYTES = _WORD.size


class Word(NamedTuple):
    """What a rank tells all others."""

    attempt: int
    position: int
    phase: Phase
    reason: Reason
    num_layers: int
    """That the plan changes; 0 until it is known."""
    digest: int
    """Of the plan; 64 bits."""

    def pack(self) -> bytes:
        """As `WORD_BYTES` bytes."""
        attempt, position, phase, reason, num_layers, digest = self
        return _WORD.pack(attempt, position, phase, reason, num_layers, digest)

    @classmethod
    def unpack(cls, data: bytes) -> Word:
        """Of `pack`'s bytes.

        Raises:
            WorkerError: they are no word.
        """
        try:
            attempt, position, phase, reason, num_layers, digest = _WORD.unpack(data)
            return cls(attempt, position, Phase(phase), Reason(reason), num_layers, digest)
        except (struct.error, ValueError) as error:
            raise WorkerError(f"a rank's word about experts cannot be understood: {error}") from None


class ReadPlan(NamedTuple):
    """Read the leader's plan, whose digest is this."""

    attempt: int
    digest: int


class Stage(NamedTuple):
    """Stage the ``position``-th of the layers that the plan changes, counted from 1."""

    attempt: int
    position: int


class Commit(NamedTuple):
    """Swap that layer in, before the next step."""

    attempt: int
    position: int


class End(NamedTuple):
    """The attempt is over; let everything go, then call `Rebalance.freed`."""

    attempt: int
    reason: Reason
    rank: int
    """Whose word ended it; of `Reason.DONE`, this one."""
    position: int
    """Where it ended."""


Instruction = ReadPlan | Stage | Commit | End


class Rebalance:
    """One rank's part.

    Args:
        rank: this one.
        size: how many there are.
        clock: for the time-out.
        timeout_s: within which a rank reads the plan or stages a layer, and the ranks take a plan up.

    Attributes:
        phase: where this rank is.
        attempt: number of the attempt that is under way, or of the last.
        position: within it.
    """

    LEADER = 0

    def __init__(self, rank: int, size: int, clock: Clock, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.phase = Phase.IDLE
        self.attempt = 0
        self.position = 0
        self._clock = clock
        self._timeout_s = timeout_s
        self._reason = Reason.DONE
        self._num_layers = 0
        self._digest = 0
        self._since_s = 0.0
        self._said: Word | None = None

    @property
    def active(self) -> bool:
        """Whether an attempt is under way."""
        return self.phase in (Phase.BUSY, Phase.READY, Phase.FAILED)

    @property
    def promised(self) -> int:
        """The position that this rank has said it is ready to commit, in an exchange that is not decided; else 0."""
        said = self._said
        return said.position if said is not None and said.phase is Phase.READY else 0

    # ---- the leader's caller ----------------------------------------------------------------------------------------

    def offer(self, digest: int) -> None:
        """The leader has a plan, which its peers can read.

        Raises:
            IllegalTransition: this is not the leader, or not idle.
        """
        if self.rank != self.LEADER or self.phase is not Phase.IDLE:
            raise IllegalTransition(f"rank {self.rank} offers a plan while it is {self.phase.name}")
        self.phase, self._digest, self._since_s = Phase.OFFERS, digest, self._clock.monotonic_s()

    # ---- the thread that stages -------------------------------------------------------------------------------------

    def ready(self, attempt: int, position: int, num_layers: int) -> None:
        """What was instructed is done; too late, it counts as failed. Without effect when it is not wanted any more.

        Args:
            attempt: of the instruction.
            position: of the instruction; 0 for the plan.
            num_layers: that the plan changes.
        """
        self._look_at_clock()
        if self.phase is Phase.BUSY and (attempt, position) == (self.attempt, self.position):
            self.phase, self._num_layers = Phase.READY, num_layers

    def failed(self, attempt: int, reason: Reason) -> None:
        """This attempt cannot go on. Without effect when it does not go on anyway."""
        if attempt == self.attempt and self.phase in (Phase.BUSY, Phase.READY):
            self.phase, self._reason = Phase.FAILED, reason

    def freed(self, attempt: int) -> None:
        """Nothing is read or written any more for an attempt that ended."""
        if self.phase is Phase.DRAINING and attempt == self.attempt:
            self.phase = Phase.IDLE

    # ---- the engine's thread, at a boundary -------------------------------------------------------------------------

    def say(self) -> Word:
        """This rank's word for the next exchange."""
        assert self._said is None, "the last exchange was not decided"
        self._look_at_clock()
        self._said = Word(self.attempt, self.position, self.phase, self._reason, self._num_layers, self._digest)
        return self._said

    def withdraw(self) -> Instruction | None:
        """Give up an offer that the others did not take in time. To be called after `decide`, before `say`."""
        if self.phase is Phase.OFFERS and self._late():
            self.phase = Phase.IDLE
            return End(self.attempt, Reason.NOT_BEGUN, self.rank, 0)
        return None

    def decide(self, words: Sequence[Word]) -> list[Instruction]:
        """An exchange has ended.

        Args:
            words: of all ranks, in their order.

        Returns:
            what to do now, before the next step.
        """
        assert self._said is not None, "nothing was said"
        self._said = None
        leader = words[self.LEADER]
        others = [word.phase for rank, word in enumerate(words) if rank != self.LEADER]
        if leader.phase is Phase.OFFERS:
            if any(phase is not Phase.IDLE for phase in others):
                return []
            self._begin(max(word.attempt for word in words) + 1, leader.digest)
            return [ReadPlan(self.attempt, self._digest)]
        for rank, word in enumerate(words):
            if word.phase is Phase.FAILED:
                return [self._end(word.reason, rank)]
        if any(word.phase is not Phase.READY for word in words):
            return []
        first = words[0]
        for rank, word in enumerate(words):
            if word != first:
                return [self._end(Reason.DISAGREE, rank)]
        committed = Commit(self.attempt, first.position)
        instructions: list[Instruction] = [committed] if first.position else []
        if first.position == first.num_layers:
            return [*instructions, self._end(Reason.DONE, self.rank)]
        self._advance(first.position + 1)
        return [*instructions, Stage(self.attempt, self.position)]

    def leave(self, reason: Reason) -> list[Instruction]:
        """This rank takes part in no further exchange until `resume`. A promise stays what it was: see `promised`.

        Args:
            reason: why.
        """
        if self.phase is Phase.OFFERS or self.active:
            return [self._end(reason, self.rank)]
        return []

    def resume(self, attempt: int) -> None:
        """The ranks are together again, and equal. `leave` must have come before, and `freed` too.

        Args:
            attempt: the last that any of them knows.

        Raises:
            IllegalTransition: something is under way here.
        """
        if self.phase is not Phase.IDLE:
            raise IllegalTransition(f"rank {self.rank} is to begin anew while it is {self.phase.name}")
        self.attempt, self._said = attempt, None

    def _late(self) -> bool:
        return self._clock.monotonic_s() - self._since_s > self._timeout_s

    def _look_at_clock(self) -> None:
        # Who is ready waits for the others, whose time is measured where they are.
        if self.phase is Phase.BUSY and self._late():
            self.failed(self.attempt, Reason.TIMEOUT)

    def _begin(self, attempt: int, digest: int) -> None:
        self.attempt, self._digest, self._num_layers, self._reason = attempt, digest, 0, Reason.DONE
        self._advance(0)

    def _advance(self, position: int) -> None:
        self.phase, self.position, self._since_s = Phase.BUSY, position, self._clock.monotonic_s()

    def _end(self, reason: Reason, rank: int) -> End:
        ended = End(self.attempt, reason, rank, self.position)
        self.phase, self._reason = Phase.DRAINING, Reason.DONE
        return ended
