"""A prefill worker without its sockets: messages in, messages out, one engine step at a time.

Owned by one thread. `handle` and `step` return quickly but for the engine's own work; they never wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ..core.clock import Clock
from ..core.config import PrefillPool
from ..core.errors import CapacityError, RequestError
from ..core.hashing import root_hash
from ..core.ids import PeerId, TransferId
from ..core.log import RateLimited, RequestLog, logger
from ..core.messages import (
    Accepted,
    BlocksReady,
    FailureReason,
    Farewell,
    Hello,
    Membership,
    Message,
    Prefill,
    Prefilled,
    PrefillFailed,
    Release,
    Renew,
    Report,
    SampledToken,
    Table,
)
from ..core.metrics import WorkerMetrics
from ..core.spans import Trace
from ..core.tracer import Tracer
from ..engine.engine import Engine, Outcome, device_is_lost
from ..engine.limits import check_prompt
from ..engine.offloader import Offloader
from ..engine.sequence import Sequence
from ..engine.watermarks import Watermarks
from ..kv_transfer.connector import Connector
from ..kv_transfer.hidden_states import HiddenStateWriter, record
from ..kv_transfer.layout import DTYPE_BYTES
from ..kv_transfer.lease import LeaseTable
from .job import Job, JobState
from .scheduler import PrefillScheduler
from .spans import spans_of

Send = Callable[[PeerId, Message], None]
_log = RateLimited()


def _no_sums() -> np.ndarray:
    """Of a reader that wants none."""
    return np.empty(0, np.uint64)


_FIRST_S_PER_TOKEN = 50e-6
"""Before anything is measured: a small model on a CPU."""
_NEW_WEIGHT = 0.2


class PrefillWorker:
    """Computes prompts for readers, and holds their blocks.

    Args:
        engine: computes.
        connector: describes our memory to readers.
        pool: limits.
        fingerprint: of the model, root of the block keys.
        lease_s: how long blocks are held for a silent reader.
        max_model_len: tokens of the longest prompt.
        clock: tells the time.
        metrics: counts.
        send: delivers a message to a peer; never blocks. On a GPU it is also called by the thread that waits for layers
            to be computed, never by two at a time for one transfer.
        hidden_states: writes those of prompts; None: nobody may ask.
        offloader: keeps blocks in tiers, for jobs; None: there are none.
        tracer: sends spans; None: nothing is traced.
    """

    def __init__(
        self,
        engine: Engine,
        connector: Connector,
        pool: PrefillPool,
        fingerprint: str,
        lease_s: float,
        max_model_len: int,
        clock: Clock,
        metrics: WorkerMetrics,
        send: Send,
        hidden_states: HiddenStateWriter | None = None,
        offloader: Offloader[Job] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine = engine
        self._connector = connector
        self._fingerprint = fingerprint
        self._max_model_len = max_model_len
        self._clock = clock
        self._metrics = metrics
        self._send = send
        self._hidden_states = hidden_states
        self._tracer = tracer
        self._leases = LeaseTable(lease_s, clock)
        self._leaving = False
        self._readers: set[PeerId] = set()
        """Those who may ask us for more."""
        self._offloader = offloader or Offloader[Job](engine, None, clock, metrics)
        self._scheduler = PrefillScheduler(engine, pool.max_batched_tokens, pool.max_running, clock, self._fetch)
        self._watermarks = Watermarks(engine.model.device)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._s_per_token = _FIRST_S_PER_TOKEN

    # ---- messages ---------------------------------------------------------------------------------------------------

    def handle(self, sender: PeerId, message: Message) -> None:
        """Take a message in. Messages that a prefill worker has no use for are ignored."""
        match message:
            case Prefill():
                self._prefill(sender, message)
            case Release():
                for number in message.numbers:
                    self._release(TransferId(sender, number))
            case Renew():
                renewed = self._leases.renew(TransferId(sender, number) for number in message.numbers)
                self._metrics.lease_events.labels("renewed").inc(renewed)
            case Hello():
                reply = self._connector.answer(message)
                if reply.refused:
                    _log.warning(f"hello {sender}", "refused %s: %s", sender, reply.refused)
                else:
                    self._readers.add(sender)
                self._send(sender, reply)
            case Farewell():
                self._readers.discard(sender)
            case Membership():
                alive = {member.peer for member in message.members}
                self._leaving = any(m.peer == self._connector.peer and not m.ready for m in message.members)
                self._readers &= alive
                for reader in {job.transfer.reader for job in self._scheduler} - alive:
                    self.peer_lost(reader)

    def peer_lost(self, peer: PeerId) -> None:
        """A reader is gone for good: nothing of its will be read any more."""
        self._readers.discard(peer)
        for transfer in self._leases.of_reader(peer):
            self._release(transfer)

    # ---- work -------------------------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        """When `tick` is due, on the monotonic clock."""
        times = [self._leases.next_deadline_s(), self._offloader.next_event_s()]
        return min((at_s for at_s in times if at_s is not None), default=None)

    def tick(self) -> None:
        """End the leases whose readers have gone silent."""
        for transfer in self._leases.expire():
            job = self._scheduler.get(transfer)
            if job is not None:
                self._metrics.lease_events.labels("expired").inc()
                RequestLog(job.sequence.request_id).warning(
                    "the lease of %s's transfer %d expired while %s", *transfer, job.state.value
                )
                self._scheduler.remove(job)
                self._end_trace(job, "the lease expired")
                message = "the reader gave no sign of life for the length of a lease"
                self._send(transfer.reader, PrefillFailed(transfer.number, FailureReason.EXPIRED, message))

    def step(self) -> bool:
        """Start queued jobs, and run one engine step. Returns whether anything was computed."""
        for job, _, num_good in self._offloader.poll():
            if job.state is JobState.FETCHING:
                RequestLog(job.sequence.request_id).debug("KV of %d tokens came from tiers", num_good)
                if job.trace is not None:
                    job.trace.mark("prefill.fetched", self._clock.wall_s(), f"{num_good} tokens")
                self._scheduler.fetched(job)
        for job in self._scheduler.admit():
            self._accept(job)
        plan = self._scheduler.plan()
        if not plan:
            self._offloader.idle()
            return False
        jobs = {id(job.sequence): job for job in self._scheduler if job.state is JobState.RUNNING}
        ends = [(jobs[id(w.sequence)], w.sequence.num_computed + w.num_new) for w in plan]

        def publish(layer_group: int) -> None:
            marks = [self._mark(job, layer_group, num_tokens) for job, num_tokens in ends]
            self._watermarks.after(lambda: self._send_all(marks))

        start_s = self._clock.monotonic_s()
        try:
            outcomes = self._engine.step(plan, publish)
            # Everything has been computed, and readers must know of the last layers before they hear of the end.
            self._watermarks.flush()
        except RuntimeError as error:  # torch's; the worker goes on without the prompts that it failed on
            self._watermarks.flush()
            logger.exception("a prefill step failed")
            for job, _ in ends:
                self._fail(job, f"the prefill step failed: {error}", 500)
            if device_is_lost(error):
                raise
            return True
        step_s = self._clock.monotonic_s() - start_s
        self._metrics.step_s.labels("prefill").observe(step_s)
        self._metrics.forward_s.labels("prefill").observe(self._engine.forward_s)
        s_per_token = step_s / sum(w.num_new for w in plan)
        self._s_per_token += _NEW_WEIGHT * (s_per_token - self._s_per_token)
        for outcome in outcomes:
            self._finish(jobs[id(outcome.sequence)], outcome, s_per_token)
        return True

    def report(self) -> Report:
        """Our load."""
        pool = self._engine.pool
        *urgent, (num_jobs, queued_tokens) = self._scheduler.before_levels()
        return Report(
            running=self._scheduler.num_running,
            waiting=num_jobs - self._scheduler.num_running,
            queued_tokens=queued_tokens,
            free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            leases=len(self._leases),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            urgent=urgent if num_jobs else [],
        )

    def close(self) -> None:
        """End the thread that waits for the GPU. Idempotent."""
        self._watermarks.close()

    def drained(self) -> bool:
        """Whether no reader needs us any more; one that leaves waits until each has said so."""
        return len(self._leases) == 0 and not (self._leaving and self._readers)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _prefill(self, sender: PeerId, message: Prefill) -> None:
        transfer = TransferId(sender, message.number)
        log = RequestLog(message.request_id)
        if transfer in self._leases:
            _log.warning("twice", "%s sent transfer %d twice; the second is ignored", *transfer)
            return
        try:
            check_prompt(message.tokens, self._engine.model.spec.vocab_size, self._max_model_len)
            if message.skip_tokens >= len(message.tokens):
                raise RequestError(f"skip_tokens {message.skip_tokens} leaves none of {len(message.tokens)} tokens")
            if message.sum_tokens and message.sum_dtype not in DTYPE_BYTES:
                raise RequestError(f"sum_dtype {message.sum_dtype!r} is none of {', '.join(DTYPE_BYTES)}")
            recording = record(self._hidden_states, message)
        except (RequestError, CapacityError) as error:
            self._send(sender, PrefillFailed(message.number, FailureReason.PREFILL, error.message[:4000], error.status))
            return
        sequence = Sequence(
            message.request_id,
            message.tokens,
            min(message.num_prompt_tokens, len(message.tokens)),
            message.children,
            message.sampling,
            root_hash(self._fingerprint, message.salt),
            message.prompt_logprobs,
            recording is not None,
        )
        self._leases.grant(transfer)
        self._metrics.lease_events.labels("granted").inc()
        arrived_s = self._clock.monotonic_s()
        job = Job(
            transfer,
            sequence,
            message.skip_tokens,
            arrived_s,
            message.sum_tokens,
            message.sum_dtype,
            message.salt,
            message.priority,
        )
        job.recording = recording
        if self._tracer is not None and (trace := Trace.of(message.trace)) is not None:
            job.trace = trace
            trace.attributes |= {"tandem.request_id": message.request_id, "tandem.tokens": len(message.tokens)}
            trace.mark("prefill.received", self._clock.wall_s(), f"{message.skip_tokens} tokens not needed")
        job.in_tiers = self._offloader.look(sequence, message.salt)
        self._scheduler.add(job)
        log.debug("queued: %d tokens, %d of them not needed", len(message.tokens), message.skip_tokens)

    def _fetch(self, job: Job) -> bool:
        """Have the tiers load what a job lacks, where that is sooner than computing it."""
        known = job.in_tiers
        if known is None or not self._offloader.fetch(job, job.sequence, job.salt, known, 0, self._s_per_token):
            return False
        job.in_tiers = None
        if job.trace is not None:
            job.trace.mark("prefill.fetch", self._clock.wall_s())
        return True

    def _accept(self, job: Job) -> None:
        sequence = job.sequence
        size = self._engine.block_tokens
        tables = []
        for group, table in zip(self._connector.groups, sequence.tables, strict=True):
            first = max(job.skip_tokens, group.first_needed(sequence.num_tokens)) // size
            blocks = table[first:]
            tables.append(Table(first * size, blocks, self._engine.pool.generations_of(blocks)))
        if job.trace is not None:
            job.trace.mark("prefill.begun", self._clock.wall_s(), f"{sequence.num_computed} tokens cached")
        self._cached_tokens += sequence.num_computed
        self._metrics.cached_tokens.inc(sequence.num_computed)
        self._send(job.transfer.reader, Accepted(job.transfer.number, tables, sequence.num_computed))
        if sequence.num_computed > job.skip_tokens:
            groups = range(len(self._connector.layer_groups))
            self._send_all([self._mark(job, layer_group, sequence.num_computed) for layer_group in groups])

    def _mark(self, job: Job, layer_group: int, num_tokens: int) -> Callable[[], None]:
        """Sends a watermark: to be called when it is true."""
        self._leases.publish(job.transfer)
        first_sum, sums = self._sums(job, layer_group, num_tokens) if job.sum_tokens else (0, _no_sums)
        reader, number = job.transfer.reader, job.transfer.number

        def send() -> None:
            summed = sums().astype("<u8").tobytes()
            self._send(reader, BlocksReady(number, layer_group, num_tokens, first_sum, summed))

        return send

    def _send_all(self, marks: list[Callable[[], None]]) -> None:
        for send in marks:
            send()

    def _sums(self, job: Job, layer_group: int, num_tokens: int) -> tuple[int, Callable[[], np.ndarray]]:
        """The number of the first checksum that a watermark completes, and what returns them when it is true."""
        unit, sequence = job.sum_tokens, job.sequence
        start, stop = job.num_summed.get(layer_group, job.skip_tokens), num_tokens
        if num_tokens < sequence.num_tokens:
            stop -= stop % unit
        if stop <= start:
            return 0, _no_sums
        job.num_summed[layer_group] = stop
        sums = self._connector.sums(
            layer_group, range(start, stop), job.skip_tokens, sequence.num_tokens, sequence.tables, unit, job.sum_dtype
        )
        return start // unit, sums

    def _finish(self, job: Job, outcome: Outcome, s_per_token: float) -> None:
        self._prompt_tokens += outcome.num_new
        self._metrics.prompt_tokens.inc(outcome.num_new)
        self._engine.commit(job.sequence)
        self._offloader.offer(job.sequence, job.salt, outcome.first + outcome.num_new)
        job.prompt_logprobs.extend(outcome.prompt_logprobs)
        if job.recording is not None and outcome.hidden_states is not None:
            job.recording.append(outcome.first, outcome.hidden_states)
        if outcome.samples is None:
            return
        samples: list[SampledToken] = [sample for sample in outcome.samples if sample is not None]
        if len(samples) != len(outcome.samples):
            self._metrics.invalid_logits.inc()
            self._fail(job, "the model's output is not a number", 500)
            return
        now_s = self._clock.monotonic_s()
        self._end_trace(job)
        self._scheduler.hold(job)
        self._send(
            job.transfer.reader,
            Prefilled(
                job.transfer.number,
                samples,
                job.started_s - job.arrived_s,
                now_s - job.started_s,
                s_per_token,
                job.prompt_logprobs,
            ),
        )
        RequestLog(job.sequence.request_id).info(
            "prompt of %d tokens computed in %.1f ms after %.1f ms in the queue",
            job.sequence.num_tokens,
            (now_s - job.started_s) * 1e3,
            (job.started_s - job.arrived_s) * 1e3,
        )

    def _fail(self, job: Job, message: str, status: int) -> None:
        self._leases.release(job.transfer)
        self._offloader.forget(job.sequence, job.salt)
        self._engine.discard(job.sequence)
        self._scheduler.remove(job)
        self._end_trace(job, message)
        RequestLog(job.sequence.request_id).error("%s", message)
        self._send(
            job.transfer.reader,
            PrefillFailed(job.transfer.number, FailureReason.PREFILL, message[:4000], status),
        )

    def _release(self, transfer: TransferId) -> None:
        if not self._leases.release(transfer):
            return
        self._metrics.lease_events.labels("released").inc()
        job = self._scheduler.get(transfer)
        if job is not None:
            if job.state is not JobState.HELD:
                self._metrics.aborts.labels(job.state.value).inc()
            self._scheduler.remove(job)
            self._end_trace(job, "the reader wants it no more")

    def _end_trace(self, job: Job, error: str = "") -> None:
        """A job that is traced is computed, or given up; idempotent."""
        if self._tracer is not None and job.trace is not None:
            job.trace.error = error
            self._tracer.send(partial(spans_of, job.trace, self._clock.wall_s()))
            job.trace = None
