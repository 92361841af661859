"""A decode worker without its sockets: messages in, messages out, one engine step at a time.

Owned by one thread. `handle` and `step` return quickly but for the engine's own work; they never wait.
"""

from __future__ import annotations

from functools import partial

from ..core.clock import Clock
from ..core.config import Config, DecodePool
from ..core.errors import RequestError, TandemError
from ..core.hashing import root_hash
from ..core.ids import PeerId
from ..core.log import RateLimited, logger
from ..core.messages import (
    Abort,
    Child,
    ChildUpdate,
    FinishReason,
    Generate,
    Hello,
    HelloReply,
    Membership,
    Message,
    Moved,
    Prefill,
    Release,
    Renew,
    Report,
    SampledToken,
)
from ..core.metrics import WorkerMetrics
from ..core.spans import Trace
from ..core.tracer import Tracer
from ..engine.engine import Engine, Outcome, device_is_lost
from ..engine.limits import check_prompt
from ..engine.offloader import Offloader
from ..engine.sequence import Sequence
from ..kv_transfer.connector import Connector
from ..kv_transfer.hidden_states import HiddenStateWriter
from .cost import CostModel
from .emitter import Emitter
from .lender import Lender
from .peers import Send, Sources
from .prompts import Prompts
from .scheduler import DecodeScheduler
from .spans import spans_of
from .step_loop import Landed, StepLoop
from .stream import Stream, StreamState

_log = RateLimited()

_BEGUN = 1 << 60
"""Outputs that began on another worker come before those of their priority that have not begun."""
_PRIORITY = 1 << 62
"""What a level of priority is worth in a stream's order: more than all streams that a worker ever sees."""


class DecodeWorker:
    """Produces tokens.

    Args:
        engine: computes.
        connector: reads from prefill peers.
        pool: limits.
        config: kv and routing rules.
        fingerprint: of the model, root of the block keys.
        max_model_len: tokens of the longest sequence.
        clock: tells the time.
        metrics: counts.
        send: delivers a message to a peer; never blocks.
        hidden_states: writes those of prompts; None: nobody may ask.
        offloader: keeps blocks in tiers, for streams; None: there are none.
        tracer: sends spans; None: nothing is traced.
    """

    def __init__(
        self,
        engine: Engine,
        connector: Connector,
        pool: DecodePool,
        config: Config,
        fingerprint: str,
        max_model_len: int,
        clock: Clock,
        metrics: WorkerMetrics,
        send: Send,
        hidden_states: HiddenStateWriter | None = None,
        offloader: Offloader[Stream] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine = engine
        self._connector = connector
        self._peers = Sources(connector, metrics, send)
        self._fingerprint = fingerprint
        self._max_model_len = max_model_len
        self._clock = clock
        self._metrics = metrics
        self._tracer = tracer
        self._cost = CostModel(config.routing.local_prefill, pool.max_batched_tokens)
        self._offloader = offloader or Offloader[Stream](engine, None, clock, metrics)
        self._scheduler = DecodeScheduler(
            engine,
            pool.max_running,
            pool.max_batched_tokens,
            clock,
            lambda stream, spare: self._prompts.fetch(stream, spare),
        )
        self._steps = StepLoop(engine, self._scheduler, clock, self._preempted, self._landed, self._step_failed)
        self._emitter = Emitter(clock, send)
        self._prompts = Prompts(
            engine,
            connector,
            self._peers,
            self._scheduler,
            self._offloader,
            self._cost,
            hidden_states,
            config.kv.on_load_failure == "recompute",
            config.kv.handoff_timeout_s,
            clock,
            metrics,
            self._emitter,
            send,
            self._first_tokens,
            self._begin,
            self._refuse,
        )
        self._lender = Lender(
            connector,
            engine.pool,
            engine.block_tokens,
            config.kv.lease_s,
            clock,
            metrics,
            send,
            self._scheduler.end,
        )
        self._streams: dict[tuple[PeerId, int], list[Stream]] = {}
        self._order = 0
        self._output_tokens = 0
        self._prompt_tokens = 0

    # ---- messages ---------------------------------------------------------------------------------------------------

    def handle(self, sender: PeerId, message: Message) -> None:
        """Take a message in. Messages that a decode worker has no use for are ignored."""
        match message:
            case Generate():
                self._generate(sender, message)
            case Abort():
                for ticket in message.tickets:
                    self._abort(sender, ticket, message.child)
                    self._lender.abort(sender, ticket, message.child)
            case Hello() | Prefill() | Renew() | Release():
                self._lender.handle(sender, message)
            case HelloReply():
                self._peers.greeted(sender, message)
            case Membership():
                self._lender.follow(message)
                for peer in self._peers.take_leave(message):
                    if self._peers.prefills():  # else it computes what it was asked for as long as it may
                        self._prompts.leave(peer)
                for peer in self._peers.follow(message, {key[0] for key in self._streams}):
                    self.peer_lost(peer)
            case _:
                self._prompts.handle(sender, message)

    def peer_lost(self, peer: PeerId) -> None:
        """A prefill worker or a gateway is gone for good."""
        self._peers.forget(peer)
        self._prompts.peer_lost(peer)
        self._emitter.forget(peer)
        self._lender.peer_lost(peer)
        for gateway, ticket in [key for key in self._streams if key[0] == peer]:
            self._abort(gateway, ticket, -1)

    # ---- work -------------------------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        """When `tick` is due, on the monotonic clock."""
        times = [self._prompts.next_deadline_s(), self._lender.next_deadline_s(), self._offloader.next_event_s()]
        return min((at_s for at_s in times if at_s is not None), default=None)

    def tick(self) -> None:
        """Renew leases, end those of others, and give up on prefills that stand still."""
        self._lender.tick()
        self._prompts.tick()

    def step(self) -> bool:
        """Look after the loads, admit streams, start a step and finish one. Returns whether anything was computed.

        Where the engine overlaps steps, the one that is finished is the one before: while the device computes a step,
        this thread deals with the tokens of the last and plans the next.
        """
        self._prompts.poll()
        if self._lender.readers:
            for stream in self._scheduler.waiting():
                self._move(stream, [])
                self._close(stream)
        for stream in self._scheduler.admit():
            self._prompts.start(stream)
        computed = self._steps.turn()
        if not computed:
            self._offloader.idle()
        self._emitter.flush()
        return computed

    def report(self) -> Report:
        """Our load."""
        pool, scheduler = self._engine.pool, self._scheduler
        *urgent, (num_queued, queued_tokens) = scheduler.before_levels()
        return Report(
            running=scheduler.num_running,
            waiting=num_queued + scheduler.num_loading,
            queued_tokens=queued_tokens,
            free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            transfers=len(self._prompts),
            output_tokens=self._output_tokens,
            prompt_tokens=self._prompt_tokens,
            received_bytes=self._prompts.received_bytes,
            cached_tokens=self._prompts.cached_tokens,
            leases=len(self._lender),
            peers=self._peers.prefills(),
            refused=self._peers.refusals(),
            # Who waits for KV that is on its way has a place in the batch.
            urgent=[(count + scheduler.num_loading, tokens) for count, tokens in urgent] if num_queued else [],
        )

    def drained(self) -> bool:
        """Whether neither a client nor a worker that takes over waits for us any more."""
        return not self._streams and not len(self._lender)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _generate(self, gateway: PeerId, message: Generate) -> None:
        key = gateway, message.ticket
        if key in self._streams:
            _log.warning("twice", "%s sent ticket %d twice; the second is ignored", *key)
            return
        try:
            check_prompt(message.tokens, self._engine.model.spec.vocab_size, self._max_model_len)
            if message.num_prompt_tokens > len(message.tokens):
                raise RequestError("num_prompt_tokens is larger than the number of tokens")
        except RequestError as error:
            self._emitter.refuse(gateway, message.ticket, error.status, error.message)
            return
        sequence = Sequence(
            message.request_id,
            message.tokens,
            message.num_prompt_tokens,
            message.children,
            message.sampling,
            root_hash(self._fingerprint, message.salt),
            message.prompt_logprobs,
            bool(message.hidden_states),
        )
        stream = self._new_stream(gateway, message, sequence)
        if self._tracer is not None:
            stream.trace = Trace.of(message.trace)
        self._streams[key] = [stream]
        self._emitter.stage(stream, "decode.received")
        stream.in_tiers = self._offloader.look(sequence, message.salt)
        self._scheduler.add(stream)

    def _new_stream(self, gateway: PeerId, message: Generate, sequence: Sequence) -> Stream:
        self._order += 1
        order = self._order + _PRIORITY * message.priority
        if len(message.tokens) > message.num_prompt_tokens:  # a client waits in the middle of his answer
            order -= _BEGUN
        return Stream(gateway, message, sequence, order, self._clock.monotonic_s(), self._max_model_len)

    def _abort(self, gateway: PeerId, ticket: int, child: int) -> None:
        for stream in list(self._streams.get((gateway, ticket), ())):
            indices = {c.index for c in stream.children}
            if child >= 0 and child not in indices:
                continue
            if child >= 0 and len(indices - stream.ended_children) > 1:
                stream.ended_children.add(child)
                continue
            self._metrics.aborts.labels(stream.state.value).inc()
            stream.log.info("aborted while %s, at %d tokens", stream.state.value, stream.sequence.num_tokens)
            self._close(stream)

    def _close(self, stream: Stream) -> None:
        """End a stream in whatever state; blocks that reads still write into are freed when they have stopped."""
        if self._tracer is not None and stream.trace is not None:
            self._tracer.send(partial(spans_of, stream.trace, self._clock.wall_s()))
            stream.trace = None
        if stream.recording is not None:
            stream.recording.close()
        self._forget(stream)
        if stream.state is StreamState.LOADING and self._prompts.loads(stream):
            self._scheduler.drain(stream)
            self._prompts.abort(stream)
        elif stream.state is not StreamState.DRAINING:
            self._scheduler.end(stream)

    def _forget(self, stream: Stream) -> None:
        """Its ticket means nothing here any more."""
        streams = self._streams.get(stream.key, [])
        if stream in streams:
            streams.remove(stream)
            if not streams:
                del self._streams[stream.key]

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _preempted(self, stream: Stream) -> None:
        self._metrics.preemptions.inc()
        stream.in_tiers = self._offloader.look(stream.sequence, stream.request.salt)
        self._emitter.stage(stream, "decode.preempted")
        stream.log.info("preempted at %d tokens", stream.sequence.num_tokens)

    def _landed(self, landed: Landed) -> None:
        kind = "mixed" if landed.prompt_tokens else "decode"
        self._metrics.step_s.labels(kind).observe(landed.seconds)
        self._metrics.forward_s.labels(kind).observe(self._engine.forward_s)
        if landed.prompt_tokens:
            self._cost.computed_locally(landed.prompt_tokens, landed.seconds)
            self._prompt_tokens += landed.prompt_tokens
            self._metrics.prompt_tokens.inc(landed.prompt_tokens)
        for stream, outcome in landed.outcomes:
            if stream.state in (StreamState.RUNNING, StreamState.PREFILLING):  # else it ended while the step ran
                self._advance(stream, outcome)

    def _step_failed(self, streams: list[Stream], error: RuntimeError) -> None:
        """The worker goes on without the streams of the step, unless the device is broken: then only a new process
        helps."""
        logger.error("a decode step failed", exc_info=error)
        for stream in streams:
            if stream.state is not StreamState.ENDED:
                self._refuse(stream, TandemError(f"the step failed: {error}"))
        if device_is_lost(error):
            raise error

    def _advance(self, stream: Stream, outcome: Outcome) -> None:
        if stream.state is StreamState.PREFILLING:
            self._advance_prompt(stream, outcome)
            return
        assert outcome.samples is not None
        sample = outcome.samples[0]
        if sample is None:
            self._not_a_number(stream)
            return
        self._offloader.offer(stream.sequence, stream.request.salt, outcome.first + outcome.num_new)
        stream.sequence.tokens.append(sample.token)
        finish = stream.finish_of(sample.token)
        if finish is None and self._lender.readers:
            stream.sequence.tokens.pop()
            self._hold(stream, sample)
            return
        self._engine.commit(stream.sequence)
        self._emit(stream, stream.children[0], sample, finish)
        if finish is not None:
            self._close(stream)

    def _hold(self, stream: Stream, sample: SampledToken) -> None:
        """Another worker goes on with a stream, from the token that has just been sampled."""
        self._move(stream, self._lender.readers)
        self._scheduler.hold(stream)
        self._forget(stream)
        self._lender.hold(stream, sample)

    def _move(self, stream: Stream, readers: list[PeerId]) -> None:
        """Tell that a stream's outputs do not go on here."""
        self._emitter.stage(stream, "decode.moved", "" if readers else "not begun")
        for child in stream.children:
            if child.index not in stream.ended_children:
                self._emitter.moved(stream.gateway, Moved(stream.request.ticket, child.index, readers))

    def _advance_prompt(self, stream: Stream, outcome: Outcome) -> None:
        sequence = stream.sequence
        self._emitter.prompt_logprobs(stream.gateway, stream.request.ticket, outcome.first + 1, outcome.prompt_logprobs)
        self._engine.commit(sequence)
        self._offloader.offer(sequence, stream.request.salt, outcome.first + outcome.num_new)
        if stream.recording is not None and outcome.hidden_states is not None:
            stream.recording.append(outcome.first, outcome.hidden_states)
        if outcome.samples is None:
            return
        samples: list[SampledToken] = [sample for sample in outcome.samples if sample is not None]
        if len(samples) != len(outcome.samples):
            self._not_a_number(stream)
            return
        stream.prefill_s += self._clock.monotonic_s() - stream.started_s
        sequence.prompt_logprobs = -1
        sequence.hidden_states = False
        # After a failed load the first tokens are known, and these are the same.
        if stream.first_tokens is None:
            self._first_tokens(stream, samples)
        if stream.state is StreamState.PREFILLING:
            self._begin(stream)

    def _first_tokens(self, stream: Stream, samples: list[SampledToken]) -> None:
        """The children's first tokens are known: send them; a child that ends with it is over."""
        stream.first_tokens = samples
        for child, sample in zip(stream.children, samples, strict=True):
            if child.index in stream.ended_children:
                continue
            stream.sequence.tokens.append(sample.token)
            finish = stream.finish_of(sample.token)
            stream.sequence.tokens.pop()
            self._emit(stream, child, sample, finish)
            if finish is not None:
                stream.ended_children.add(child.index)
        if all(child.index in stream.ended_children for child in stream.children):
            self._send_usage(stream)
            self._close(stream)

    def _begin(self, stream: Stream) -> None:
        """Prompt and KV are here: every child that is not over runs on its own."""
        assert stream.first_tokens is not None
        self._send_usage(stream)
        pairs = [
            (child, sample)
            for child, sample in zip(stream.children, stream.first_tokens, strict=True)
            if child.index not in stream.ended_children
        ]
        for child, sample in pairs[1:]:
            self._split(stream, child, sample)
        child, sample = pairs[0]
        stream.sequence.children = [child]
        stream.sequence.tokens.append(sample.token)
        self._scheduler.run(stream)
        self._emitter.stage(stream, "decode.started")

    def _split(self, stream: Stream, child: Child, sample: SampledToken) -> None:
        fork = self._engine.fork(stream.sequence, child, stream.request.request_id)
        if fork is None:  # no free block: it computes its last block again when there is one
            parent = stream.sequence
            fork = Sequence(
                parent.request_id, parent.tokens, parent.num_prompt_tokens, [child], parent.sampling, parent.root
            )
        fork.tokens.append(sample.token)
        other = self._new_stream(stream.gateway, stream.request, fork)
        other.begun = True
        if stream.trace is not None:
            other.trace = Trace(stream.trace.context)
            other.trace.mark("decode.started" if fork.num_computed else "decode.received", self._clock.wall_s())
        self._streams[stream.key].append(other)
        if fork.num_computed:
            self._scheduler.run(other)
        else:
            self._scheduler.add(other)

    def _emit(self, stream: Stream, child: Child, sample: SampledToken, finish: FinishReason | None) -> None:
        self._output_tokens += 1
        self._metrics.output_tokens.inc()
        logprobs = None if sample.logprobs is None else [sample.logprobs]
        update = ChildUpdate(stream.request.ticket, child.index, [sample.token], logprobs, finish)
        self._emitter.child(stream.gateway, update)

    def _send_usage(self, stream: Stream) -> None:
        if stream.begun:
            return
        stream.begun = True
        self._emitter.usage(stream.gateway, stream.usage())

    def _not_a_number(self, stream: Stream) -> None:
        self._metrics.invalid_logits.inc()
        self._refuse(stream, TandemError("the model's output is not a number"))

    def _refuse(self, stream: Stream, error: TandemError) -> None:
        """End a stream's whole request with an error."""
        status, message = error.status, error.message
        stream.log.error("ended with status %d: %s", status, message)
        if stream.trace is not None:
            stream.trace.error = message
        self._emitter.refuse(stream.gateway, stream.request.ticket, status, message, retryable=error.retryable)
        for other in list(self._streams.get(stream.key, [stream])):
            if status >= 500 and other.state in (StreamState.PREFILLING, StreamState.RUNNING):
                self._offloader.forget(other.sequence, other.request.salt)
                self._engine.discard(other.sequence)
            self._close(other)
