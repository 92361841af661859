"""A request in flight, as the gateway keeps it: enough to answer, and enough to begin again elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...core.errors import TandemError
from ...core.ids import PeerId, RequestId
from ...core.log import RequestLog
from ...core.messages import Child, ChildUpdate, Sampling, Stopping, TokenLogprobs, Usage
from ...core.spans import Trace
from ..router import Placement
from .timeline import Timeline


class Held(NamedTuple):
    """Where an output's KV waits for the worker that goes on with it."""

    peer: PeerId
    ticket: int
    """Under which it ran there."""
    readers: list[PeerId]
    """Who can read it."""


class Output:
    """One of a request's outputs: its tokens so far."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.tokens: list[int] = []
        self.finished = False
        self.held: Held | None = None


class Attempt:
    """One sending of (a part of) a request to a decode worker. ``prompt_tokens`` is 0 once the prompt is computed.
    ``held`` is where its KV comes from, until it goes on. ``level`` of `core.urgency` is 0 once an output has begun:
    none goes before it any more."""

    def __init__(
        self,
        ticket: int,
        placement: Placement,
        children: list[int],
        prompt_tokens: int,
        held: Held | None = None,
        level: int = 0,
    ) -> None:
        self.ticket = ticket
        self.placement = placement
        self.children = set(children)
        self.prompt_tokens = prompt_tokens
        self.held = held
        self.level = level


def nobody() -> None:
    """Hears no news."""


class LiveRequest:
    """One prompt and its outputs. Belongs to the gateway's event loop.

    Args:
        request_id: in logs and on the wire.
        tokens: the prompt.
        children: the outputs.
        sampling: how tokens are chosen.
        stopping: when an output ends.
        prompt_logprobs: alternatives wanted for each prompt token, or −1.
        salt: of the prefix cache.
        hidden_states: name of the file for the prompt's hidden states, without a suffix; "" for none.
        timeline: where its stages are kept.
        trace: of the client's request, if it is traced.
        priority: the lower, the sooner it is served, by whoever it is sent to.
    """

    def __init__(
        self,
        request_id: RequestId,
        tokens: list[int],
        children: list[Child],
        sampling: Sampling,
        stopping: Stopping,
        prompt_logprobs: int,
        salt: str,
        timeline: Timeline,
        hidden_states: str = "",
        trace: Trace | None = None,
        priority: int = 0,
    ) -> None:
        self.request_id = request_id
        self.tokens = tokens
        self.outputs = {child.index: Output(child) for child in children}
        self.sampling = sampling
        self.stopping = stopping
        self.wants_prompt_logprobs = prompt_logprobs
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * len(tokens) if prompt_logprobs >= 0 else []
        self.salt = salt
        self.hidden_states = hidden_states
        self.timeline = timeline
        self.trace = trace
        self.priority = priority
        self.log = RequestLog(request_id)
        self.attempts: dict[int, Attempt] = {}
        self.usage: Usage | None = None
        self.arrived_s = timeline.started_s
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.done = False
        self.error: TandemError | None = None
        """Why no more tokens come than there are to `take`."""
        self.on_news: Callable[[], None] = nobody
        """Called when there is something to `take`, or an error: once for all that a turn of the loop brought. Raises
        nothing."""
        self._updates: dict[int, ChildUpdate] = {}
        """By output."""

    @property
    def prompt_logprobs_known(self) -> bool:
        """Whether every prompt token but the first has its log probabilities."""
        return all(value is not None for value in self.prompt_logprobs[1:])

    def push(self, update: ChildUpdate) -> None:
        """Tokens have come. Those of an output that nobody has taken yet become one update: a gateway that is busy
        makes fewer and larger events."""
        before = self._updates.get(update.index)
        if before is None:
            self._updates[update.index] = update
            return
        logprobs = None
        if before.logprobs is not None or update.logprobs is not None:
            logprobs = [*(before.logprobs or ()), *(update.logprobs or ())]
        tokens = before.tokens + update.tokens
        self._updates[update.index] = ChildUpdate(update.ticket, update.index, tokens, logprobs, update.finish)

    def fail(self, error: TandemError) -> None:
        """The request ends with an error, after the tokens that came before it."""
        if self.trace is not None:
            self.trace.error = error.message
        self.error = error

    def cancel(self) -> None:
        """Nobody listens any more."""
        self.done = True

    def take(self) -> list[ChildUpdate]:
        """New tokens, at most one update for each output."""
        updates, self._updates = self._updates, {}
        return list(updates.values())
