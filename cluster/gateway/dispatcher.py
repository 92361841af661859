"""Sends requests to workers, takes their tokens in, and sends requests again when workers die.

Belongs to the gateway's event loop. A request survives its workers: what it has produced so far is known here, so that
another worker can go on from there, with the same randomness, and the client sees a pause.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from ...core.clock import Clock
from ...core.config import GatewayConfig
from ...core.errors import CapacityError, NotFoundError, RequestError, TandemError, TooLargeError, WorkerError
from ...core.ids import PeerId
from ...core.log import logger
from ...core.messages import Abort, ChildUpdate, Generate, Membership, Message, Moved, Refused, Report, Update
from ...core.metrics import GatewayMetrics
from ...core.urgency import level_of
from ..router import Placement, Router
from .live import Attempt, Held, LiveRequest, Output


class Dispatcher:
    """All requests in flight.

    Args:
        config: limits.
        router: chooses workers.
        clock: tells the time.
        metrics: counts.
        send: delivers a message to a worker.
    """

    def __init__(
        self,
        config: GatewayConfig,
        router: Router,
        clock: Clock,
        metrics: GatewayMetrics,
        send: Callable[[PeerId, Message], None],
    ) -> None:
        self._config = config
        self._router = router
        self._clock = clock
        self._metrics = metrics
        self._send = send
        self._live: set[LiveRequest] = set()
        self._by_ticket: dict[int, LiveRequest] = {}
        self._homeless: dict[LiveRequest, asyncio.TimerHandle] = {}
        """Requests that wait for a worker to appear."""
        self._with_news: dict[LiveRequest, None] = {}
        """Requests whose readers are told when this turn of the loop is over, in order."""
        self._tickets = itertools.count(1)
        self.on_finish: Callable[[LiveRequest], None] = lambda live: None
        """Called with each request when the client has everything, or is gone."""

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return len(self._live)

    def make_room(self, num_requests: int, priority: int = 0) -> None:
        """Refuse what would go beyond the configured number of requests in flight, or as many that are less urgent: of
        those that no client has seen a token of, the least urgent, and of these the latest.

        Raises:
            CapacityError: with a hint when to come back.
        """
        found, limit = len(self._live), self._config.max_queued
        excess = found + num_requests - limit
        if excess <= 0:
            return
        yielding = [live for live in self._live if live.priority > priority and not live.first_token_s]
        if len(yielding) < excess:
            raise CapacityError(f"{found} requests are in flight, and gateway.max_queued is {limit}", retry_after_s=1.0)
        yielding.sort(key=lambda live: (live.priority, live.arrived_s))
        for live in yielding[-excess:]:
            self._displace(live)

    def submit(self, live: LiveRequest) -> None:
        """Send a request, or keep it until there is a worker for it."""
        self._live.add(live)
        self._metrics.in_flight.set(len(self._live))
        self._dispatch(live)

    def finish(self, live: LiveRequest) -> None:
        """The client has everything, or is gone: whatever still runs for the request is stopped, everywhere."""
        if live not in self._live:
            return
        live.cancel()
        self._news(live)
        self._end(live)

    def _displace(self, live: LiveRequest) -> None:
        """A request that has not begun to answer makes room for more urgent ones."""
        self._metrics.displaced.inc()
        live.timeline.mark("gateway.displaced")
        limit = self._config.max_queued
        message = f"more urgent requests have come, and gateway.max_queued is {limit}"
        self._fail(live, CapacityError(message, retry_after_s=1.0))
        self._end(live)

    def _end(self, live: LiveRequest) -> None:
        """A request takes no place any more, here or on any worker."""
        self._live.discard(live)
        self._metrics.in_flight.set(len(self._live))
        self.on_finish(live)
        timer = self._homeless.pop(live, None)
        if timer is not None:
            timer.cancel()
        for output in live.outputs.values():
            self._drop(output)
        for attempt in list(live.attempts.values()):
            self._abort(attempt)
            self._close(live, attempt)

    def finish_output(self, live: LiveRequest, index: int) -> None:
        """One output is over for the client (a stop string was found)."""
        output = live.outputs[index]
        if output.finished:
            return
        output.finished = True
        self._drop(output)
        for attempt in list(live.attempts.values()):
            if index in attempt.children:
                self._abort(attempt, index)
                self._child_done(live, attempt, index)

    # ---- from the workers -------------------------------------------------------------------------------------------

    def receive(self, sender: PeerId, message: Message) -> None:
        """Take a worker's message in."""
        match message:
            case Update():
                self._update(sender, message)
            case Refused():
                self._refused(sender, message)
            case Report():
                self._router.report(sender, message)
                self._place_homeless()

    def follow(self, membership: Membership) -> None:
        """Workers have come or gone."""
        self._router.follow(membership)
        alive = {member.peer for member in membership.members}
        for peer in {a.placement.decode for live in self._live for a in live.attempts.values()} - alive:
            self.lost(peer)
        self._place_homeless()

    def lost(self, peer: PeerId) -> None:
        """A decode worker is gone: its requests go elsewhere, from where they stand."""
        self._router.forget(peer)
        for live in list(self._live):
            lost = [attempt for attempt in live.attempts.values() if attempt.placement.decode == peer]
            for attempt in lost:
                self._close(live, attempt)
            if lost:
                self._metrics.replays.inc()
                live.timeline.mark("gateway.replay", f"{peer} is gone")
                live.log.warning("%s is gone; the request goes on elsewhere", peer)
                self._dispatch(live)

    def _update(self, sender: PeerId, message: Update) -> None:
        for stage in message.stages:
            live = self._of(sender, stage.ticket)
            if live is not None:
                live.timeline.add(stage.name, sender, stage.at_s, stage.detail)
        for part in message.prompt_logprobs:
            live = self._of(sender, part.ticket)
            if live is not None:
                for position, value in enumerate(part.values, part.first):
                    if position < len(live.prompt_logprobs):
                        live.prompt_logprobs[position] = value
        for usage in message.usages:
            live = self._of(sender, usage.ticket)
            if live is not None and live.usage is None:
                live.usage = usage
                self._metrics.queued(live.priority, usage.queue_s)
                for stage_name in ("queue", "prefill", "transfer"):
                    self._metrics.stage_s.labels(stage_name).observe(getattr(usage, f"{stage_name}_s"))
        now_s = self._clock.monotonic_s()
        for child in message.children:
            live = self._of(sender, child.ticket)
            if live is not None:
                self._tokens(live, child, now_s)

        for moved in message.moved:
            live = self._of(sender, moved.ticket)
            if live is not None:
                self._moved(live, sender, moved)

    def _moved(self, live: LiveRequest, sender: PeerId, moved: Moved) -> None:
        """An output goes on elsewhere, with its KV where there is any: its worker is about to end."""
        attempt = live.attempts[moved.ticket]
        if moved.index not in attempt.children:
            return
        if moved.readers:
            live.outputs[moved.index].held = Held(sender, moved.ticket, moved.readers)
            self._metrics.moves.inc()
        live.timeline.mark("gateway.moves", f"from {sender}")
        # Those that have not begun stay together, as they need one prompt: all of a message's before any is sent.
        self._child_done(live, attempt, moved.index)
        asyncio.get_running_loop().call_soon(self._go_on, live)

    def _go_on(self, live: LiveRequest) -> None:
        if live in self._live:
            self._dispatch(live)

    def _tokens(self, live: LiveRequest, child: ChildUpdate, now_s: float) -> None:
        output = live.outputs.get(child.index)
        attempt = live.attempts[child.ticket]
        if output is None or output.finished or child.index not in attempt.children:
            return
        if attempt.prompt_tokens:
            self._router.prompt_done(attempt.placement, attempt.prompt_tokens, attempt.level)
            attempt.prompt_tokens = 0
        if attempt.level:
            self._router.begun(attempt.placement, len(attempt.children), attempt.level)
            attempt.level = 0
        if not live.first_token_s:
            live.first_token_s = now_s
            live.timeline.mark("gateway.first_token")
            self._metrics.ttft_s.observe(now_s - live.arrived_s)
        elif output.tokens:
            self._metrics.itl_s.observe(now_s - live.last_token_s)
        live.last_token_s = now_s
        output.tokens.extend(child.tokens)
        attempt.held = None
        live.push(child)
        self._news(live)
        if child.finish is not None:
            output.finished = True
            self._child_done(live, attempt, child.index)

    def _refused(self, sender: PeerId, message: Refused) -> None:
        live = self._of(sender, message.ticket)
        if live is not None:
            self._close(live, live.attempts[message.ticket])
            self._fail(live, _error_of(message))

    def _of(self, sender: PeerId, ticket: int) -> LiveRequest | None:
        """The request of a ticket, if the worker that holds it is the one that speaks."""
        live = self._by_ticket.get(ticket)
        if live is None or live.attempts[ticket].placement.decode != sender:
            return None
        return live

    # ---- to the readers ---------------------------------------------------------------------------------------------

    def _news(self, live: LiveRequest) -> None:
        """Tell a request's reader, soon: once, whatever comes before."""
        if not self._with_news:
            asyncio.get_running_loop().call_soon(self._tell)
        self._with_news[live] = None

    def _tell(self) -> None:
        lives, self._with_news = self._with_news, {}
        for live in lives:
            live.on_news()

    def _fail(self, live: LiveRequest, error: TandemError) -> None:
        live.fail(error)
        self._news(live)

    # ---- to the workers ---------------------------------------------------------------------------------------------

    def _place_homeless(self) -> None:
        for live in sorted(self._homeless, key=lambda live: live.priority):
            self._dispatch(live)

    def _dispatch(self, live: LiveRequest) -> None:
        """Send what is not finished and not under way."""
        under_way = {index for attempt in live.attempts.values() for index in attempt.children}
        open_outputs = [o for i, o in live.outputs.items() if not o.finished and i not in under_way]
        if not open_outputs:
            return
        fresh = [output for output in open_outputs if not output.tokens]
        groups = [fresh] if fresh else []
        groups += [[output] for output in open_outputs if output.tokens]
        level = level_of(live.priority)
        for group in groups:
            tokens = live.tokens + group[0].tokens
            held = group[0].held
            placement = self._router.place(tokens, live.salt, held.readers if held else (), level)
            if placement is None:
                self._wait(live)
                return
            group[0].held = None
            if held is not None and placement.decode in held.readers:
                placement = Placement(placement.decode, held.peer)
            ticket = next(self._tickets)
            indices = [output.child.index for output in group]
            attempt = Attempt(ticket, placement, indices, placement.num_left, held, level)
            live.attempts[ticket] = attempt
            self._by_ticket[ticket] = live
            self._router.sent(placement, len(group), placement.num_left, level)
            live.timeline.mark("gateway.sent", f"to {placement.decode}, prompt to {placement.prefill or 'the same'}")
            logprobs = -1 if live.prompt_logprobs_known else live.wants_prompt_logprobs
            self._send(
                placement.decode,
                Generate(
                    ticket=ticket,
                    request_id=live.request_id,
                    tokens=tokens,
                    num_prompt_tokens=len(live.tokens),
                    children=[output.child for output in group],
                    sampling=live.sampling,
                    stopping=live.stopping,
                    prompt_logprobs=logprobs,
                    salt=live.salt,
                    prefill=placement.prefill,
                    hidden_states=live.hidden_states,
                    trace=live.trace.context.traceparent() if live.trace is not None else "",
                    priority=live.priority,
                ),
            )
        timer = self._homeless.pop(live, None)
        if timer is not None:
            timer.cancel()

    def _abort(self, attempt: Attempt, index: int = -1) -> None:
        """Stop an attempt, or one of its outputs, also where its KV may still be held for it."""
        self._send(attempt.placement.decode, Abort([attempt.ticket], index))
        if attempt.held is not None:
            [held_index] = attempt.children
            self._send(attempt.held.peer, Abort([attempt.held.ticket], held_index))

    def _drop(self, output: Output) -> None:
        """Nobody will ask for an output's KV."""
        if output.held is not None:
            self._send(output.held.peer, Abort([output.held.ticket], output.child.index))
            output.held = None

    def _wait(self, live: LiveRequest) -> None:
        if live in self._homeless:
            return
        live.timeline.mark("gateway.waits", "no decode worker is there")
        loop = asyncio.get_running_loop()
        self._homeless[live] = loop.call_later(self._config.failover_timeout_s, self._give_up, live)

    def _give_up(self, live: LiveRequest) -> None:
        self._homeless.pop(live, None)
        timeout_s = self._config.failover_timeout_s
        self._fail(live, WorkerError(f"no decode worker appeared within {timeout_s:g} s", status=503))

    def _child_done(self, live: LiveRequest, attempt: Attempt, index: int) -> None:
        attempt.children.discard(index)
        self._router.done(attempt.placement, 1, attempt.level)
        if not attempt.children:
            self._close(live, attempt)

    def _close(self, live: LiveRequest, attempt: Attempt) -> None:
        if attempt.prompt_tokens:
            self._router.prompt_done(attempt.placement, attempt.prompt_tokens, attempt.level)
        if attempt.children:
            self._router.done(attempt.placement, len(attempt.children), attempt.level)
        live.attempts.pop(attempt.ticket, None)
        self._by_ticket.pop(attempt.ticket, None)


def _error_of(message: Refused) -> TandemError:
    kinds: dict[int, type[TandemError]] = {404: NotFoundError, 413: TooLargeError, 429: CapacityError}
    if message.status in kinds:
        return kinds[message.status](message.message)
    if message.status < 500:
        return RequestError(message.message)
    logger.error("a worker refused a request: %s", message.message)
    return WorkerError(message.message, status=message.status)
