"""All handoffs of a decode worker: talks to prefill peers, drives the reads, and says what became of each prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..core.clock import Clock
from ..core.errors import IllegalTransition
from ..core.ids import PeerId
from ..core.log import RateLimited, logger
from ..core.messages import (
    Accepted,
    BlocksReady,
    FailureReason,
    Message,
    Prefill,
    Prefilled,
    PrefillFailed,
    Release,
    Renew,
)
from ..core.metrics import WorkerMetrics
from ..kv_transfer import handoff as steps
from ..kv_transfer.connector import Connector
from ..kv_transfer.handoff import Handoff, HandoffState, Pull
from ..kv_transfer.peers import Terms
from .stream import Stream

_log = RateLimited()


class PromptStarted(NamedTuple):
    """The prefill worker has begun."""

    stream: Stream
    cached_tokens: int


class ReadStarted(NamedTuple):
    """The first blocks are being read."""

    stream: Stream


class PromptDone(NamedTuple):
    """The prompt is computed; the children's first tokens are known."""

    stream: Stream
    message: Prefilled


class LoadDone(NamedTuple):
    """The KV is here and verified."""

    stream: Stream


class LoadFailed(NamedTuple):
    """The KV did not come, but that of the first ``num_tokens`` tokens is here."""

    stream: Stream
    reason: FailureReason
    num_tokens: int
    message: str
    status: int


class LoadClosed(NamedTuple):
    """An aborted load writes nowhere any more."""

    stream: Stream


LoadEvent = PromptStarted | ReadStarted | PromptDone | LoadDone | LoadFailed | LoadClosed


class _Load:
    def __init__(self, stream: Stream, handoff: Handoff, terms: Terms, skip_tokens: int, started_s: float) -> None:
        self.stream = stream
        self.handoff = handoff
        self.terms = terms
        self.skip_tokens = skip_tokens
        self.num_tokens = stream.sequence.num_tokens
        self.started_s = started_s
        self.sums: dict[int, dict[int, np.uint64]] = {}
        """Layer group → unit of tokens → the checksum that it must have."""
        self.pulls: dict[int, Pull] = {}
        self.reading = False
        self.hidden_s = 0.0
        """Time with reads on their way while the prompt was being computed."""
        self.reading_s = 0.0
        """Since when there have been reads on their way."""
        self.message = ""
        self.status = 503
        self.prefilled_s = 0.0
        self.num_bytes = 0
        self.queue_s = 0.0
        self.prefill_s = 0.0
        self.s_per_token = 0.0


class Loader:
    """Owned by the engine thread; nothing blocks. Every method returns the events that it led to.

    Args:
        connector: moves the bytes.
        timeout_s: how long a prefill may stand still.
        clock: tells the time.
        metrics: counts.
        send: delivers a message to a peer.
        on_handoff: told of each finished handoff: how long it took in seconds beyond the prefill worker's queue and
            work, and that worker's seconds a token.
    """

    def __init__(
        self,
        connector: Connector,
        timeout_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
        send: Callable[[PeerId, Message], None],
        on_handoff: Callable[[float, float], None],
    ) -> None:
        self._connector = connector
        self._timeout_s = timeout_s
        self._clock = clock
        self._metrics = metrics
        self._send = send
        self._on_handoff = on_handoff
        self._loads: dict[int, _Load] = {}
        self._of_pull: dict[int, _Load] = {}
        self._number = 0
        self._renew_s: float | None = None

    def __len__(self) -> int:
        return len(self._loads)

    def loads(self, stream: Stream) -> bool:
        """Whether a stream's load is not over yet."""
        return any(load.stream is stream for load in self._loads.values())

    def start(self, stream: Stream, peer: PeerId) -> None:
        """Ask a connected peer for a stream's prompt, and start to fetch its KV into the stream's blocks.

        The stream has blocks for all its tokens; what it has computed is not asked for.
        """
        self._number += 1
        sequence, request = stream.sequence, stream.request
        terms = self._connector.terms(peer)
        skip, num_tokens = sequence.num_computed, sequence.num_tokens
        handoff = Handoff(
            self._number,
            peer,
            skip,
            num_tokens,
            self._connector.first_tokens(skip, num_tokens),
            terms.block_tokens,
            terms.unit_tokens,
            terms.num_layer_groups,
            self._clock,
        )
        now_s = self._clock.monotonic_s()
        self._loads[self._number] = _Load(stream, handoff, terms, skip, now_s)
        if self._renew_s is None:
            self._renew_s = now_s + self._connector.shortest_lease_s() / 3
        self._send(
            peer,
            Prefill(
                number=self._number,
                request_id=request.request_id,
                tokens=sequence.tokens,
                num_prompt_tokens=sequence.num_prompt_tokens,
                skip_tokens=skip,
                children=sequence.children,
                sampling=request.sampling,
                prompt_logprobs=sequence.prompt_logprobs,
                salt=request.salt,
                hidden_states=request.hidden_states if sequence.hidden_states else "",
                sum_tokens=terms.sum_tokens,
                sum_dtype=self._connector.layout.dtype if terms.sum_tokens else "",
                trace=stream.trace.handed_over() if stream.trace is not None else "",
                priority=request.priority,
            ),
        )

    def handle(self, sender: PeerId, message: Message) -> list[LoadEvent]:
        """Take a prefill peer's message in; messages about transfers that are over are ignored."""
        if not isinstance(message, Accepted | BlocksReady | Prefilled | PrefillFailed):
            return []
        load = self._loads.get(message.number)
        if load is None or load.handoff.peer != sender:
            return []
        try:
            return self._take(load, message)
        except IllegalTransition as error:  # the peer broke the protocol: its loads are its problem, not ours
            _log.warning(sender, "%s: %s", sender, error)
            return self._run(load, load.handoff.fail(FailureReason.REFUSED))

    def _take(self, load: _Load, message: Accepted | BlocksReady | Prefilled | PrefillFailed) -> list[LoadEvent]:
        handoff = load.handoff
        events: list[LoadEvent] = []
        match message:
            case Accepted():
                events.append(PromptStarted(load.stream, message.cached_tokens))
                return events + self._run(load, handoff.accepted(message.tables))
            case BlocksReady():
                self._keep_sums(load, message)
                instructions = handoff.ready(message.layer_group, message.num_tokens)
                if instructions and not load.reading:
                    load.reading = True
                    events.append(ReadStarted(load.stream))
                return events + self._run(load, instructions)
            case Prefilled():
                if len(message.samples) != len(load.stream.children):
                    return self._run(load, handoff.fail(FailureReason.REFUSED))
                load.prefilled_s = self._clock.monotonic_s()
                load.queue_s, load.prefill_s = message.queue_s, message.prefill_s
                load.s_per_token = message.s_per_token
                if load.pulls:
                    load.hidden_s += load.prefilled_s - load.reading_s
                return [PromptDone(load.stream, message), *self._run(load, handoff.prompt_done())]
            case PrefillFailed():
                load.message, load.status = message.message, message.status
                return self._run(load, handoff.fail(message.reason))

    def poll(self) -> list[LoadEvent]:
        """Drive the reads."""
        if not self._loads:
            return []
        events = []
        for result in self._connector.poll():
            load = self._of_pull.pop(result.number, None)
            if load is None:
                continue
            load.num_bytes += result.num_bytes
            pull = load.pulls.pop(result.number)
            if not load.pulls and not load.prefilled_s:
                load.hidden_s += self._clock.monotonic_s() - load.reading_s
            events += self._run(load, load.handoff.pull_ended(pull, result.failure, result.num_good))
        return events

    def abort(self, stream: Stream) -> list[LoadEvent]:
        """Give a stream's load up; `LoadClosed` comes when nothing writes into its blocks any more."""
        for load in list(self._loads.values()):
            if load.stream is stream:
                return self._run(load, load.handoff.abort())
        return []

    def leave(self, peer: PeerId) -> list[LoadEvent]:
        """A prefill peer is about to end: what it has not begun goes elsewhere."""
        loads = [load for load in self._loads.values() if load.handoff.peer == peer]
        events = []
        for load in loads:
            if load.handoff.state is HandoffState.REQUESTED:
                load.message = f"{peer} is about to end"
                events += self._run(load, load.handoff.fail(FailureReason.LEAVING))
        return events

    def peer_lost(self, peer: PeerId) -> list[LoadEvent]:
        """A prefill peer is gone: its loads fail."""
        self._connector.remove_peer(peer)
        events = []
        for load in list(self._loads.values()):
            if load.handoff.peer == peer:
                load.message = f"{peer} is gone"
                events += self._run(load, load.handoff.fail(FailureReason.PEER_LOST))
        return events

    def next_deadline_s(self) -> float | None:
        """When `tick` is due."""
        if not self._loads:
            return None
        stalls = min(load.handoff.last_progress_s for load in self._loads.values()) + self._timeout_s
        return stalls if self._renew_s is None else min(self._renew_s, stalls)

    def tick(self) -> list[LoadEvent]:
        """Renew leases, and fail loads that have stood still for too long."""
        now_s = self._clock.monotonic_s()
        if self._renew_s is not None and now_s >= self._renew_s:
            numbers: dict[PeerId, list[int]] = {}
            for number, load in self._loads.items():
                numbers.setdefault(load.handoff.peer, []).append(number)
            for peer, open_numbers in numbers.items():
                self._send(peer, Renew(open_numbers))
            self._renew_s = now_s + self._connector.shortest_lease_s() / 3 if self._loads else None
        events = []
        for load in list(self._loads.values()):
            if now_s - load.handoff.last_progress_s >= self._timeout_s:
                load.message = f"{load.handoff.peer} made no progress for {self._timeout_s:g} s"
                events += self._run(load, load.handoff.fail(FailureReason.TIMEOUT))
        return events

    def _run(self, load: _Load, instructions: list[steps.Instruction]) -> list[LoadEvent]:
        events: list[LoadEvent] = []
        for instruction in instructions:
            match instruction:
                case Pull():
                    self._pull(load, instruction)
                case steps.CancelPulls():
                    events += self._cancel(load)
                case steps.Release():
                    self._send(load.handoff.peer, Release([load.handoff.number]))
                case steps.Loaded():
                    events.append(self._done(load))
                case steps.Failed(reason, num_tokens):
                    moves = reason is FailureReason.LEAVING
                    self._end(load, "moved" if moves else "failed")
                    if not moves:
                        self._metrics.load_failures.labels(reason.value).inc()
                    logger.info("handoff failed: %s: %s", reason.value, "; ".join(load.handoff.history))
                    events.append(LoadFailed(load.stream, reason, num_tokens, load.message, load.status))
                case steps.Closed():
                    self._end(load, "aborted")
                    events.append(LoadClosed(load.stream))
        return events

    def _pull(self, load: _Load, pull: Pull) -> None:
        if not load.pulls:
            load.reading_s = self._clock.monotonic_s()
        number = self._connector.pull(
            load.handoff.peer,
            pull.layer_group,
            range(pull.start, pull.stop),
            load.stream.sequence.tables,
            load.handoff.tables,
            load.skip_tokens,
            load.num_tokens,
            self._sums_of(load, pull),
        )
        load.pulls[number] = pull
        self._of_pull[number] = load

    @staticmethod
    def _keep_sums(load: _Load, message: BlocksReady) -> None:
        if load.terms.sum_tokens and message.layer_group < load.terms.num_layer_groups:
            values = np.frombuffer(message.sums[: len(message.sums) // 8 * 8], "<u8").astype(np.uint64)
            load.sums.setdefault(message.layer_group, {}).update(enumerate(values, message.first_sum))

    @staticmethod
    def _sums_of(load: _Load, pull: Pull) -> np.ndarray | None:
        """The checksums of what is pulled, or None: there are none, or some did not come."""
        unit, known = load.terms.sum_tokens, load.sums.get(pull.layer_group, {})
        if not unit:
            return None
        wanted = [known.pop(index, None) for index in range(pull.start // unit, -(-pull.stop // unit))]
        return None if None in wanted else np.array(wanted, np.uint64)

    def _cancel(self, load: _Load) -> list[LoadEvent]:
        draining = self._connector.cancel(load.pulls)
        events = []
        for number in [n for n in load.pulls if n not in draining]:
            pull = load.pulls.pop(number)
            del self._of_pull[number]
            events += self._run(load, load.handoff.pull_ended(pull, FailureReason.TRANSPORT))
        return events

    def _done(self, load: _Load) -> LoadDone:
        now_s = self._clock.monotonic_s()
        stream = load.stream
        stream.queue_s += load.queue_s
        stream.prefill_s += load.prefill_s
        stream.transfer_s += now_s - load.prefilled_s
        stream.transferred_bytes += load.num_bytes
        self._metrics.transfer_hidden_s.observe(load.hidden_s)
        self._metrics.transfer_unhidden_s.observe(now_s - load.prefilled_s)
        if load.s_per_token:  # else it was computed before
            self._on_handoff(now_s - load.started_s - load.queue_s - load.prefill_s, load.s_per_token)
        self._end(load, "loaded")
        return LoadDone(stream)

    def _end(self, load: _Load, outcome: str) -> None:
        del self._loads[load.handoff.number]
        self._metrics.handoffs.labels(outcome).inc()
