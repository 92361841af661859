"""What a step has to tell the gateways, gathered into one message for each."""

from __future__ import annotations

from collections.abc import Callable

from ..core.clock import Clock
from ..core.ids import PeerId
from ..core.messages import ChildUpdate, Message, Moved, PromptLogprobs, Refused, Stage, TokenLogprobs, Update, Usage
from .stream import Stream


class Emitter:
    """Collects, and sends on `flush`.

    Args:
        clock: stamps the stages.
        send: delivers a message to a gateway.
    """

    def __init__(self, clock: Clock, send: Callable[[PeerId, Message], None]) -> None:
        self._clock = clock
        self._send = send
        self._updates: dict[PeerId, Update] = {}

    def child(self, gateway: PeerId, update: ChildUpdate) -> None:
        """New tokens."""
        self._of(gateway).children.append(update)

    def stage(self, stream: Stream, name: str, detail: str = "") -> None:
        """A mark on a stream's timeline, now, and in its trace."""
        at_s = self._clock.wall_s()
        self._of(stream.gateway).stages.append(Stage(stream.request.ticket, name, at_s, detail))
        if stream.trace is not None:
            note = stream.trace.mark_handover if name == "decode.handoff" else stream.trace.mark
            note(name, at_s, detail)

    def prompt_logprobs(self, gateway: PeerId, ticket: int, first: int, values: list[TokenLogprobs]) -> None:
        """Log probabilities of prompt tokens from position ``first`` on."""
        if values:
            self._of(gateway).prompt_logprobs.append(PromptLogprobs(ticket, first, values))

    def usage(self, gateway: PeerId, usage: Usage) -> None:
        """How long the stages took."""
        self._of(gateway).usages.append(usage)

    def moved(self, gateway: PeerId, moved: Moved) -> None:
        """An output does not go on here."""
        self._of(gateway).moved.append(moved)

    def refuse(self, gateway: PeerId, ticket: int, status: int, message: str, *, retryable: bool = False) -> None:
        """The request ends with an error."""
        self.flush()
        self._send(gateway, Refused(ticket, status, message[:4000], retryable))

    def forget(self, gateway: PeerId) -> None:
        """A gateway is gone."""
        self._updates.pop(gateway, None)

    def flush(self) -> None:
        """Send everything gathered."""
        updates, self._updates = self._updates, {}
        for gateway, update in updates.items():
            self._send(gateway, update)

    def _of(self, gateway: PeerId) -> Update:
        update = self._updates.get(gateway)
        if update is None:
            # Fresh lists: a Struct's empty default list is copied for each instance.
            update = self._updates[gateway] = Update()
        return update
