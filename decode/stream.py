"""One output on a decode worker, from its arrival to its last token."""

from __future__ import annotations

import enum

from ..core.errors import IllegalTransition
from ..core.ids import PeerId
from ..core.log import RequestLog
from ..core.messages import Child, FinishReason, Generate, SampledToken, Usage
from ..core.spans import Trace
from ..engine.offloader import InTiers
from ..engine.sequence import Sequence
from ..kv_transfer.hidden_states import Recording
from ..kv_transfer.multi import MultiConnector


class StreamState(enum.Enum):
    """Where a stream stands.

    ::

        WAITING ──► LOADING ──► RUNNING ──► ENDED        from prefill, by handoff
           │ ▲         │ ▲         │
           │ │         ▼ │         │ (preempted: back to WAITING)
           └─┴──► PREFILLING ──────┘                     computed here
        LOADING ──► DRAINING ──► ENDED                   aborted while reads still write
        WAITING ◄─► FETCHING ──► ENDED                   tiers give what they have to the prefix cache
        RUNNING ──► HELD ──► ENDED                       this worker ends, and another reads its KV
    """

    WAITING = "waiting"
    FETCHING = "fetching"
    LOADING = "loading"
    PREFILLING = "prefilling"
    RUNNING = "running"
    HELD = "held"
    DRAINING = "draining"
    ENDED = "ended"


_ALLOWED = {
    # A child that was split off its request has its KV already, and runs at once.
    StreamState.WAITING: {
        StreamState.FETCHING,
        StreamState.LOADING,
        StreamState.PREFILLING,
        StreamState.RUNNING,
        StreamState.ENDED,
    },
    StreamState.FETCHING: {StreamState.WAITING, StreamState.ENDED},
    StreamState.LOADING: {
        StreamState.RUNNING,
        StreamState.PREFILLING,
        StreamState.LOADING,
        StreamState.DRAINING,
        StreamState.ENDED,
    },
    StreamState.PREFILLING: {StreamState.RUNNING, StreamState.WAITING, StreamState.ENDED},
    StreamState.RUNNING: {StreamState.WAITING, StreamState.HELD, StreamState.ENDED},
    StreamState.HELD: {StreamState.ENDED},
    StreamState.DRAINING: {StreamState.ENDED},
    StreamState.ENDED: set(),
}

_MAX_HISTORY = 64


class Stream:
    """A sequence that tokens are produced for, and who they go to.

    A request for several outputs is one stream with several children until its prompt is computed; then each child is a
    stream of its own.

    Args:
        gateway: who asked.
        request: what was asked for.
        sequence: tokens and blocks.
        order: the smaller, the sooner it is served: by priority, and of one priority by arrival.
        arrived_s: on the monotonic clock.
        max_model_len: tokens of the longest sequence.
    """

    def __init__(
        self,
        gateway: PeerId,
        request: Generate,
        sequence: Sequence,
        order: int,
        arrived_s: float,
        max_model_len: int,
    ) -> None:
        self.gateway = gateway
        self.request = request
        self.sequence = sequence
        self.order = order
        self.limit = min(sequence.num_prompt_tokens + request.stopping.max_tokens, max_model_len)
        """Tokens in all with which it ends."""
        self.recording: Recording | None = None
        """Takes the prompt's hidden states, where they are computed here."""
        self.arrived_s = arrived_s
        self.state = StreamState.WAITING
        self.history = [f"{arrived_s:.6f} waiting"]
        self.first_tokens: list[SampledToken] | None = None
        """The children's next tokens, known before their KV is here."""
        self.ended_children: set[int] = set()
        """Children that are over before their stream was split off."""
        self.sources: MultiConnector[str] = MultiConnector(0, 1, ())
        """Where its prompt's KV comes from, since it was last admitted."""
        self.takes_over = False
        """Whether its KV is asked of a worker that is about to end, on which it ran."""
        self.in_tiers: InTiers | None = None
        """What tiers had of it when it was queued, until that is fetched."""
        self.fetched_from: int | None = None
        """The first token whose KV tiers have just given to the prefix cache."""
        self.begun = False
        """Whether it has run before; a preempted stream waits again, but its stages are told."""
        self.queue_s = 0.0
        self.prefill_s = 0.0
        self.transfer_s = 0.0
        self.started_s = arrived_s
        self.cached_tokens = 0
        self.transferred_bytes = 0
        self.trace: Trace | None = None
        """Where it is traced: its marks, for spans."""
        self.log = RequestLog(request.request_id)

    @property
    def children(self) -> list[Child]:
        """The outputs that this stream stands for."""
        return self.sequence.children

    @property
    def key(self) -> tuple[PeerId, int]:
        """What names the request between gateway and worker."""
        return self.gateway, self.request.ticket

    def move(self, state: StreamState, at_s: float, why: str = "") -> None:
        """Change state.

        Raises:
            IllegalTransition: not from here.
        """
        if state not in _ALLOWED[self.state]:
            raise IllegalTransition(
                f"{self.request.request_id}: {self.state.value} → {state.value}", history=tuple(self.history)
            )
        self.state = state
        if len(self.history) < _MAX_HISTORY:
            self.history.append(f"{at_s:.6f} {state.value} {why}".rstrip())

    def preempt(self, at_s: float) -> None:
        """Back to the queue. What a running stream has produced is part of what it computes again."""
        if self.state is StreamState.RUNNING:
            self.first_tokens = None
        self.move(StreamState.WAITING, at_s, "preempted")

    def finish_of(self, token: int) -> FinishReason | None:
        """Whether the output ends with ``token``, its newest, already appended."""
        if token in self.request.stopping.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.sequence.num_tokens >= self.limit else None

    def usage(self) -> Usage:
        """How long its stages took, and what it reused."""
        return Usage(
            self.request.ticket,
            max(self.queue_s, 0.0),
            max(self.prefill_s, 0.0),
            max(self.transfer_s, 0.0),
            self.cached_tokens,
            self.transferred_bytes,
        )
