"""A gateway process: one thread with an event loop for HTTP, and the mesh's thread for the workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvicorn
from prometheus_client import CollectorRegistry

from ...core.checkpoint import model_folder, model_name
from ...core.clock import SystemClock
from ...core.config import Config
from ...core.errors import ConfigError, WorkerError
from ...core.garbage import settle
from ...core.health import Vitals
from ...core.ids import PeerId, worker_of
from ...core.kv_messages import KVControlled, KVEvents, KVSnapshot
from ...core.log import logger
from ...core.messages import Member, Membership, Message, Report, Scrape, Scraped, Subscribe
from ...core.metrics import GatewayMetrics, merge, render
from ...core.tracer import open_tracer
from ...core.wire import ClusterKeys, SecureContext
from ...engine.models.spec import context_length, read_spec
from ..kv_view import KVView
from ..mesh import Mesh
from ..router import Router
from ..tls import is_loopback, tls_context
from .app import Api
from .connection import Connection
from .dispatcher import Dispatcher
from .gather import Gather
from .generation import Model
from .listener import BACKLOG, bind, hold_back
from .live import LiveRequest
from .operators import Operators
from .recorder import TraceRecorder
from .timeline import Timelines
from .tokenizer import Tokenizer
from .traces import RequestTraces

_SCRAPE_TIMEOUT_S = 1.0
_CONTROL_TIMEOUT_S = 10.0
_RECONNECT_S = 0.5
_TURN_TIMEOUT_S = 2.0
_HANDSHAKES_S = 0.3
"""For connections that begin when their gateway is about to leave: more than a way around the world and back."""


def load_model(config: Config) -> Model:
    """What the gateway needs of the model. Imports the tokenizer library: two seconds.

    Raises:
        ConfigError: the model cannot be served as configured.
    """
    folder = model_folder(config)
    spec = read_spec(folder)
    try:
        tokenizer: Tokenizer | None = Tokenizer(folder)
    except ConfigError:
        if config.model.load != "dummy":
            raise
        tokenizer = None
    eos_ids = spec.eos_ids or ((tokenizer.eos_id,) if tokenizer and tokenizer.eos_id is not None else ())
    max_model_len = context_length(spec, config.model.max_model_len)
    hidden_states = config.hidden_states.folder is not None
    return Model(model_name(config), tokenizer, spec.vocab_size, max_model_len, eos_ids, hidden_states)


class GatewayRuntime:
    """One life of one gateway.

    Args:
        peer: who we are.
        config: the cluster's.
        keys: the cluster's.
        address: this node's address.
        progress: told how the start goes on.
    """

    def __init__(
        self, peer: PeerId, config: Config, keys: ClusterKeys, address: str, progress: Callable[[str], None]
    ) -> None:
        self.peer = peer
        self._config = config
        self._keys = keys
        self._address = address
        self._progress = progress
        self._metrics = GatewayMetrics(CollectorRegistry())
        self._clock = SystemClock()
        self._view = KVView(lambda peer, message: self._mesh.send(peer, message))
        self._router = Router(config.routing.policy, self._view)
        self._membership: Membership | None = None
        self._linked: dict[PeerId, str] = {}
        self._scrapes: Gather[str] = Gather(lambda peer, message: self._mesh.send(peer, message))
        self._controlled: Gather[KVControlled] = Gather(lambda peer, message: self._mesh.send(peer, message))
        self._stopped = threading.Event()
        self._closing = threading.Lock()
        self._loop = self._new_loop()
        self._thread = threading.Thread(target=self._serve, name="gateway")
        self._server: uvicorn.Server | None = None

    # ---- any thread -------------------------------------------------------------------------------------------------

    def start(self) -> Member:
        """Read the tokenizer, listen, serve. Blocks until HTTP is answered.

        Raises:
            ConfigError: the port is taken, or the model cannot be served as configured.
        """
        gateway = self._config.gateway
        tls_context(gateway.tls_cert, gateway.tls_key, "gateway")  # or it tells what is wrong with them
        certificate, key = (path and Path(path).expanduser() for path in (gateway.tls_cert, gateway.tls_key))
        self._socket = bind(gateway.host, gateway.port)
        if not certificate and gateway.api_keys and not is_loopback(gateway.host):
            logger.warning("the gateway at %s has no TLS: whoever listens on the way learns the API keys", gateway.host)
        self._progress("reading the tokenizer")
        self._model = load_model(self._config)
        if self._config.routing.policy == "kv_aware":
            from ...kernels import block_hashes  # compiled code, which other policies do without

            block_hashes.prepare()
        context = self._context = SecureContext(self._keys)
        self._mesh = Mesh(
            self.peer,
            context,
            None,
            lambda sender, message: self._call(self._receive, sender, message),
            lambda peer: self._call(self._lost, peer),
            self._metrics.bad_frames.labels("mesh").inc,
        )
        recorder = TraceRecorder(self._clock)
        self._dispatcher = Dispatcher(self._config.gateway, self._router, self._clock, self._metrics, self._mesh.send)
        self._tracer = open_tracer(self.peer, "gateway", self._config.observability.traces, self._metrics.spans)
        traces = RequestTraces(self._tracer, self.peer, self._model.name)

        def finished(live: LiveRequest) -> None:
            recorder.finished(live)
            traces.finished(live)

        self._dispatcher.on_finish = finished
        operators = Operators(self._config.gateway, self._model, self._control, recorder, self._metrics)
        api = Api(
            self._config.gateway,
            self._model,
            self._dispatcher,
            Timelines(self.peer, self._clock),
            self._metrics,
            self._clock,
            self._why_not_ready,
            self._scrape,
            operators.routes(),
            traces,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                api.app,
                http=Connection,
                log_config=None,
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
                server_header=False,
                h11_max_incomplete_event_size=1 << 16,
                ssl_certfile=certificate or None,
                ssl_keyfile=key or None,
            )
        )
        settle()
        self._mesh.start()
        self._socket.listen(BACKLOG)  # not before: others that share the port answer sooner
        self._thread.start()
        self._progress("ready")
        logger.info("listens on %s:%d", self._config.gateway.host, self._config.gateway.port)
        return Member(self.peer, "gateway", self._address, "")

    def follow(self, membership: Membership) -> None:
        """The cluster has changed."""
        self._call(self._follow, membership)

    def report(self) -> Report:
        """Requests in flight, as `running`."""
        return Report(self._dispatcher.num_live, 0, 0, 0, 0)

    def vitals(self, with_metrics: bool) -> Vitals:
        """How we are, if the event loop turns.

        Raises:
            WorkerError: it does not.
        """
        turned = threading.Event()
        self._call(turned.set)
        if self._thread.is_alive() and not turned.wait(_TURN_TIMEOUT_S):
            raise WorkerError(f"the event loop of {self.peer} has not turned for {_TURN_TIMEOUT_S:g} s")
        return Vitals(0.0, render(self._metrics.registry) if with_metrics else "")

    @property
    def is_alone(self) -> bool:
        """Whether no other gateway shares the port, as far as we know."""
        members = self._membership.members if self._membership is not None else []
        return not any(m.role == "gateway" and m.ready and m.peer != self.peer for m in members)

    def stop(self, grace_s: float) -> None:
        """Stop listening, finish what is in flight for at most ``grace_s`` seconds, end the threads. Idempotent."""
        self._end(grace_s, self._exit)

    def leave(self, grace_s: float) -> None:
        """As `stop`, while other gateways share the port: no connection is refused, and clients learn by the answers to
        their next requests that they have to connect anew. Idempotent."""
        self._end(grace_s, self._exit_unnoticed)

    def _end(self, grace_s: float, begin: Callable[[], None]) -> None:
        if self._server is not None and self._thread.is_alive():
            self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
            self._call(begin)
            self._thread.join()
            with self._closing:
                if self._tracer is not None:
                    self._tracer.close()
                self._mesh.close()
                self._context.close()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _exit(self) -> None:
        assert self._server is not None
        self._server.should_exit = True

    def _exit_unnoticed(self) -> None:
        hold_back(self._socket)
        self._loop.call_later(_HANDSHAKES_S, self._take_leave)

    def _take_leave(self) -> None:
        """Nobody's connection begins any more: have all clients go."""
        assert self._server is not None
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            cast(Connection, connection).leave()
        self._exit()

    def _serve(self) -> None:
        assert self._server is not None
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        except BaseException:  # noqa: BLE001 - whatever it was, it is told
            logger.exception("the gateway's thread broke; the process ends")
            os._exit(70)
        logger.info("stopped")

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *args)

    def _receive(self, sender: PeerId, message: Message) -> None:
        if isinstance(message, Scraped):
            self._scrapes.answered(sender, message.number, message.text)
        elif isinstance(message, KVControlled):
            self._controlled.answered(sender, message.number, message)
        elif isinstance(message, KVSnapshot | KVEvents):
            self._view.receive(sender, message)
        else:
            self._dispatcher.receive(sender, message)

    def _follow(self, membership: Membership) -> None:
        self._membership = membership
        self._view.follow(membership)
        self._link()
        self._dispatcher.follow(membership)
        roles = [member.role for member in membership.members]
        for role in ("prefill", "decode", "colocated"):
            self._metrics.members.labels(role).set(roles.count(role))

    def _link(self) -> None:
        """Connect to every worker, and ask for its reports."""
        assert self._membership is not None
        members = [m for m in self._membership.members if m.endpoint]
        # One that leaves takes nothing new, but still answers.
        wanted = {m.peer: m.endpoint for m in members if m.ready or m.peer in self._linked}
        for peer in self._linked.keys() - wanted.keys():
            self._mesh.disconnect(peer)
        for peer in wanted.keys() - self._linked.keys():
            self._mesh.connect(peer, wanted[peer])
            self._mesh.send(peer, Subscribe())
            if self._config.routing.policy == "kv_aware":
                self._view.watch(peer)
        self._linked = wanted

    def _lost(self, peer: PeerId) -> None:
        logger.warning("lost %s", peer)
        self._linked.pop(peer, None)
        self._view.forget(peer)
        self._dispatcher.lost(peer)
        self._loop.call_later(_RECONNECT_S, self._relink)

    def _relink(self) -> None:
        """A worker that was lost and is still a member may only have been out of reach: try again."""
        if self._membership is not None:
            self._link()
            self._dispatcher.follow(self._membership)

    def _why_not_ready(self) -> str:
        if self._router.routable(wants_prefill=self._config.pools.prefill is not None):
            return ""
        return "waiting for workers" if not self._router.members() else "prefill and decode do not know each other yet"

    async def _scrape(self) -> str:
        peers = list(self._linked)
        answers = await self._scrapes.ask(peers, Scrape, _SCRAPE_TIMEOUT_S)
        self._metrics.worker_up.clear()
        for peer in peers:
            self._metrics.worker_up.labels(worker_of(peer)).set(peer in answers)
        texts = {worker_of(self.peer): render(self._metrics.registry)}
        texts |= {worker_of(peer): text for peer, text in answers.items()}
        return await asyncio.to_thread(merge, texts)

    async def _control(self, order: Callable[[int], Message]) -> dict[PeerId, KVControlled | None]:
        """Give all workers an order; who did not answer has None."""
        peers = list(self._linked)
        answers = await self._controlled.ask(peers, order, _CONTROL_TIMEOUT_S)
        return {peer: answers.get(peer) for peer in peers}

    @staticmethod
    def _new_loop() -> asyncio.AbstractEventLoop:
        try:
            import uvloop
        except ImportError:  # not made for every system
            return asyncio.new_event_loop()
        return uvloop.new_event_loop()
