"""A prompt on its way through a prefill worker."""

from __future__ import annotations

import enum

from ..core.errors import IllegalTransition
from ..core.ids import TransferId
from ..core.messages import TokenLogprobs
from ..core.spans import Trace
from ..engine.offloader import InTiers
from ..engine.sequence import Sequence
from ..kv_transfer.hidden_states import Recording


class JobState(enum.Enum):
    """QUEUED → RUNNING → HELD, at times by QUEUED → FETCHING → QUEUED; GONE from anywhere."""

    QUEUED = "queued"
    """Waits for blocks."""
    FETCHING = "fetching"
    """Waits for what tiers give to the prefix cache."""
    RUNNING = "running"
    """Has blocks, and tokens to compute."""
    HELD = "held"
    """Computed; its blocks wait for the reader."""
    GONE = "gone"
    """Its blocks are given back."""


_ALLOWED = {
    JobState.QUEUED: {JobState.FETCHING, JobState.RUNNING, JobState.GONE},
    JobState.FETCHING: {JobState.QUEUED, JobState.GONE},
    JobState.RUNNING: {JobState.HELD, JobState.GONE},
    JobState.HELD: {JobState.GONE},
    JobState.GONE: set(),
}


class Job:
    """One transfer's prompt.

    Args:
        transfer: its id.
        sequence: tokens and blocks.
        skip_tokens: the reader has these.
        arrived_s: on the monotonic clock.
        sum_tokens: tokens that the reader wants a checksum for each; 0: none.
        sum_dtype: the reader's.
        salt: the tenant's.
        priority: the lower, the sooner it is computed.
    """

    def __init__(
        self,
        transfer: TransferId,
        sequence: Sequence,
        skip_tokens: int,
        arrived_s: float,
        sum_tokens: int = 0,
        sum_dtype: str = "",
        salt: str = "",
        priority: int = 0,
    ) -> None:
        self.transfer = transfer
        self.sequence = sequence
        self.skip_tokens = skip_tokens
        self.sum_tokens = sum_tokens
        self.sum_dtype = sum_dtype
        self.salt = salt
        self.priority = priority
        self.in_tiers: InTiers | None = None
        """What tiers had of it when it was queued, until that is fetched."""
        self.num_summed: dict[int, int] = {}
        """Layer group → tokens whose checksums were told, the skipped ones included."""
        self.arrived_s = arrived_s
        self.started_s = arrived_s
        self.state = JobState.QUEUED
        self.history = [f"{arrived_s:.6f} queued"]
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.recording: Recording | None = None
        """Takes the prompt's hidden states."""
        self.trace: Trace | None = None
        """Where it is traced: its marks, for spans."""

    def move(self, state: JobState, at_s: float) -> None:
        """Change state.

        Raises:
            IllegalTransition: not from here.
        """
        if state not in _ALLOWED[self.state]:
            raise IllegalTransition(f"{self.transfer}: {self.state.value} → {state.value}", history=tuple(self.history))
        self.state = state
        self.history.append(f"{at_s:.6f} {state.value}")
