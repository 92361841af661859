"""Where the KV of each stream's prompt comes from: decides it, follows it, and goes on to the next source if one fails.

The sources are, in this order, blocks that an earlier prompt left, tiers, peers, and this worker's engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..core.clock import Clock
from ..core.errors import CapacityError, RequestError, TandemError, WorkerError
from ..core.ids import PeerId
from ..core.messages import FailureReason, Message, SampledToken
from ..core.metrics import WorkerMetrics
from ..engine.engine import Engine
from ..engine.offloader import Offloader
from ..kv_transfer.connector import Connector
from ..kv_transfer.hidden_states import HiddenStateWriter, record
from ..kv_transfer.multi import MultiConnector
from .cost import CostModel
from .emitter import Emitter
from .loader import LoadClosed, LoadDone, Loader, LoadEvent, LoadFailed, PromptDone, PromptStarted, ReadStarted
from .peers import Send, Sources
from .scheduler import DecodeScheduler
from .stream import Stream, StreamState

_PREFIX_CACHE = "prefix cache"
_TIERS = "tiers"
_HERE = "here"


class Prompts:
    """Owned by the engine thread; nothing blocks.

    Args:
        engine: computes what nobody else does, and has the prefix cache.
        connector: reads from peers.
        peers: those that can be read from.
        scheduler: of the streams.
        offloader: has what tiers have.
        cost: says where computing is sooner.
        hidden_states: writes those of prompts; None: nobody may ask.
        recompute: whether what did not arrive is computed again, or fails the request.
        timeout_s: how long a prefill may stand still.
        clock: tells the time.
        metrics: counts.
        emitter: tells gateways.
        send: delivers a message to a peer.
        on_sampled: told a stream's first tokens, one for each child, which may come before the KV.
        on_here: told of each stream whose KV has come from a peer, all of it.
        on_failed: told of each stream whose request ends with an error.
    """

    def __init__(
        self,
        engine: Engine,
        connector: Connector,
        peers: Sources,
        scheduler: DecodeScheduler,
        offloader: Offloader[Stream],
        cost: CostModel,
        hidden_states: HiddenStateWriter | None,
        recompute: bool,
        timeout_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
        emitter: Emitter,
        send: Send,
        on_sampled: Callable[[Stream, list[SampledToken]], None],
        on_here: Callable[[Stream], None],
        on_failed: Callable[[Stream, TandemError], None],
    ) -> None:
        self._engine = engine
        self._peers = peers
        self._scheduler = scheduler
        self._offloader = offloader
        self._cost = cost
        self._hidden_states = hidden_states
        self._recompute = recompute
        self._clock = clock
        self._metrics = metrics
        self._emitter = emitter
        self._loader = Loader(connector, timeout_s, clock, metrics, send, cost.handed_off)
        self._on_sampled = on_sampled
        self._on_here = on_here
        self._on_failed = on_failed
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache since the worker started."""
        self.received_bytes = 0
        """KV bytes read from peers since the worker started."""

    def __len__(self) -> int:
        """How many come from peers at present."""
        return len(self._loader)

    # ---- messages and time ------------------------------------------------------------------------------------------

    def handle(self, sender: PeerId, message: Message) -> None:
        """Take a peer's message in; those that are not about prompts are ignored."""
        self._apply(self._loader.handle(sender, message))

    def leave(self, peer: PeerId) -> None:
        """A prefill peer is about to end: what it has not begun goes elsewhere."""
        self._apply(self._loader.leave(peer))

    def peer_lost(self, peer: PeerId) -> None:
        """A peer is gone for good: what was to come from it comes from the next source."""
        self._apply(self._loader.peer_lost(peer))

    def next_deadline_s(self) -> float | None:
        """When `tick` is due, on the monotonic clock."""
        return self._loader.next_deadline_s()

    def tick(self) -> None:
        """Renew leases, and give up on prefills that stand still."""
        self._apply(self._loader.tick())

    def poll(self) -> None:
        """Look after the reads, and take in what tiers have given to the prefix cache."""
        self._apply(self._loader.poll())
        for stream, start, num_good in self._offloader.poll():
            if stream.state is StreamState.FETCHING:
                stream.fetched_from = start
                self._emitter.stage(stream, "decode.fetched", f"{num_good} tokens")
                self._scheduler.fetched(stream)

    # ---- one stream -------------------------------------------------------------------------------------------------

    def fetch(self, stream: Stream, spare: int) -> bool:
        """Have the tiers load what a stream lacks, where that is sooner than computing it.

        Args:
            stream: waits, and is matched against the prefix cache.
            spare: blocks to leave to others.

        Returns:
            whether they have begun; it is then given to `DecodeScheduler.fetched`.
        """
        if stream.in_tiers is None:
            return False
        s_per_token = self._cost.s_per_token(has_peer=bool(self._peers.choose(stream)))
        sequence, salt = stream.sequence, stream.request.salt
        if not self._offloader.fetch(stream, sequence, salt, stream.in_tiers, spare, s_per_token):
            return False
        stream.in_tiers = None
        self._emitter.stage(stream, "decode.fetch")
        return True

    def start(self, stream: Stream) -> None:
        """Decide where an admitted stream's prompt is computed, and ask for it."""
        sequence = stream.sequence
        now_s = self._clock.monotonic_s()
        if not stream.begun:
            stream.queue_s += now_s - stream.arrived_s
            stream.cached_tokens = sequence.num_computed
            self.cached_tokens += sequence.num_computed
            self._metrics.cached_tokens.inc(sequence.num_computed)
        stream.started_s = now_s
        stream.sources = MultiConnector(sequence.num_tokens, self._engine.block_tokens, self._sources(stream))
        stream.sources.ask()
        if stream.fetched_from is not None:
            stream.sources.ended(min(stream.fetched_from, sequence.num_computed))
            stream.sources.ask()
        stream.sources.ended(sequence.num_computed)
        stream.in_tiers = stream.fetched_from = None
        self._ask_next(stream)

    def loads(self, stream: Stream) -> bool:
        """Whether a peer's KV may still be written into a stream's blocks."""
        return self._loader.loads(stream)

    def abort(self, stream: Stream) -> None:
        """Give up what a draining stream loads; it ends when nothing writes into its blocks any more."""
        self._apply(self._loader.abort(stream))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _sources(self, stream: Stream) -> Iterator[str]:
        """Where a stream's KV may come from, the best first: each is thought of when the one before has ended."""
        yield _PREFIX_CACHE
        if stream.fetched_from is not None:
            yield _TIERS
        peer = self._peers.choose(stream)
        scheduler = self._scheduler
        ahead = scheduler.num_prefilling_tokens, scheduler.num_loading_tokens
        remaining = stream.sequence.num_tokens - stream.sequence.num_computed
        held = self._peers.holds(peer)
        if peer and (held or not self._cost.local_is_sooner(remaining, *ahead, scheduler.num_running)):
            yield peer
            # With the first tokens known, the client waits for this worker alone.
            other = self._peers.choose(stream, avoid=peer) if stream.first_tokens is None else ""
            if other:
                yield other
        yield _HERE

    def _ask_next(self, stream: Stream, why: str = "") -> None:
        source = stream.sources.ask()
        assert source is not None, "the last source does not fail"
        remaining = stream.sequence.num_tokens - stream.sequence.num_computed
        if source == _HERE:
            self._prefill(stream, f"{remaining} tokens here", why)
        else:
            self._load(stream, source, f"{remaining} tokens from {source}")

    def _prefill(self, stream: Stream, detail: str, why: str) -> None:
        if stream.sequence.hidden_states and stream.recording is None:
            try:
                stream.recording = record(self._hidden_states, stream.request)
            except (RequestError, CapacityError) as error:
                self._on_failed(stream, error)
                return
        self._scheduler.prefill(stream, why)
        self._emitter.stage(stream, "decode.prefill", detail)

    def _load(self, stream: Stream, peer: PeerId, detail: str) -> None:
        if stream.recording is not None:  # whoever computes the whole prompt records it
            stream.recording.close()
            stream.recording = None
        stream.takes_over = self._peers.holds(peer)
        self._scheduler.load(stream)
        self._emitter.stage(stream, "decode.handoff", detail)  # before the peer knows: its span hangs on this one
        self._loader.start(stream, peer)

    def _apply(self, events: list[LoadEvent]) -> None:
        for event in events:
            stream = event.stream
            match event:
                case _ if stream.state is StreamState.ENDED:  # by an earlier event of the same list
                    continue
                case LoadClosed() | LoadDone() | LoadFailed() if stream.state is StreamState.DRAINING:
                    self._scheduler.end(stream)
                case PromptStarted():
                    self._emitter.stage(stream, "prefill.started", f"{event.cached_tokens} tokens cached")
                    stream.cached_tokens = max(stream.cached_tokens, event.cached_tokens)
                case ReadStarted():
                    self._emitter.stage(stream, "transfer.started")
                case PromptDone():
                    self._emitter.stage(stream, "prefill.done")
                    self._prompt_done(stream, event)
                case LoadDone():
                    self.received_bytes += stream.transferred_bytes
                    self._emitter.stage(stream, "transfer.done", f"{stream.transferred_bytes} bytes")
                    stream.sources.ended(stream.sequence.num_tokens)
                    stream.sequence.num_computed = stream.sequence.num_tokens
                    self._engine.commit(stream.sequence)
                    self._on_here(stream)
                case LoadFailed():
                    self._load_failed(stream, event)

    def _prompt_done(self, stream: Stream, event: PromptDone) -> None:
        """Stream the first tokens at once; the KV follows."""
        message = event.message
        if stream.state is not StreamState.LOADING:
            return
        self._emitter.prompt_logprobs(stream.gateway, stream.request.ticket, 1, message.prompt_logprobs)
        stream.sequence.prompt_logprobs = -1
        stream.sequence.hidden_states = False
        if stream.first_tokens is None:  # else the client has them, of a load that failed, and these are the same
            self._on_sampled(stream, message.samples)

    def _load_failed(self, stream: Stream, event: LoadFailed) -> None:
        self._emitter.stage(stream, "transfer.failed", event.reason.value)
        stream.log.warning(
            "KV did not arrive (%s): %s; that of %d tokens is here", event.reason.value, event.message, event.num_tokens
        )
        if event.reason is FailureReason.PREFILL and event.status < 500:
            self._on_failed(stream, RequestError(event.message, status=event.status))
            return
        drains = stream.takes_over or event.reason is FailureReason.LEAVING
        if not self._recompute and not drains:  # an operator's drain fails no request
            message = f"the prompt's KV did not arrive: {event.reason.value}"
            self._on_failed(stream, WorkerError(message, status=503))
            return
        # Hidden states are wanted of every token: the one that computes the last has computed the first.
        stream.sources.ended(0 if stream.sequence.hidden_states else event.num_tokens, complete=False)
        stream.sequence.num_computed = stream.sources.num_here
        self._engine.commit(stream.sequence)
        self._ask_next(stream, event.reason.value)
