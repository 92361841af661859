"""Health and metrics of a node's ranks, over HTTP and gRPC on one port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...core.clock import SystemClock
from ...core.config import SupervisorConfig
from ...core.errors import WorkerError
from ...core.health import LocalRank, Vitals
from ...core.ids import PeerId, WorkerId
from ...core.log import RateLimited, logger
from ...core.metrics import SupervisorMetrics, merge, render
from .health import NodeHealth
from .port import LOOPBACK, Port

Ask = Callable[[bool], Awaitable[Vitals]]
"""Asks a process how it is; True: with its metrics. Raises WorkerError if it is dead, TimeoutError if it is silent."""

_PERIOD_S = 5.0
_STOP_GRACE_S = 0.5
_log = RateLimited()


class Supervisor:
    """One of a node. Belongs to one event loop.

    Args:
        config: port, TLS, and how long a rank may stand still.
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._health = NodeHealth(SystemClock(), config.stalled_after_s)
        self._metrics = SupervisorMetrics(CollectorRegistry())
        self._asks: dict[PeerId, Ask] = {}
        self._asked: dict[PeerId, asyncio.Task[None]] = {}
        self._ranks: dict[WorkerId, LocalRank] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._servicer = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._port: Port | None = None
        self._http: uvicorn.Server | None = None
        self._told: dict[str, str] = {}
        self._news = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Bind and serve; returns the port.

        Args:
            host: the node's own address.
            port: 0: any that is free.

        Raises:
            ConfigError: the port is taken, or the TLS files are no certificate and key.
        """
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        listener = socket.create_server((LOOPBACK, 0))
        self._port = Port(listener.getsockname()[1], server.add_insecure_port(f"{LOOPBACK}:0"))
        try:
            bound = await self._port.open(host, self._config, port)
        except BaseException:
            listener.close()
            raise
        await server.start()
        self._grpc = server
        self._http = uvicorn.Server(
            uvicorn.Config(self._app(), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        )
        self._tasks = [
            asyncio.create_task(self._http.serve(sockets=[listener])),
            asyncio.create_task(self._watch()),
        ]
        await self._tell()
        logger.info("health and metrics at %s:%d", host, bound)
        return bound

    async def stop(self) -> None:
        """Idempotent."""
        if self._port is not None:
            await self._port.close()
        if self._http is not None:
            self._http.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(_STOP_GRACE_S)
            self._grpc = None
        if self._tasks:
            serving, watching = self._tasks
            watching.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(serving, watching, return_exceptions=True), 2.0)
            self._tasks = []
        for asked in self._asked.values():
            asked.cancel()

    def follow(self, ranks: Sequence[LocalRank], asks: Mapping[PeerId, Ask]) -> None:
        """These are, or should be, on the node; and how those that live are asked."""
        for rank in ranks:
            before = self._ranks.get(rank.worker)
            if before is not None and rank.restarts > before.restarts:
                logger.warning("%s begins life %s", rank.worker, rank.peer)
        self._ranks = {rank.worker: rank for rank in ranks}
        self._asks = dict(asks)
        self._health.follow(ranks)
        self._news.set()

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            for peer in self._asks.keys() - self._asked.keys():
                task = self._asked[peer] = asyncio.create_task(self._ask(peer))
                task.add_done_callback(lambda _, peer=peer: self._asked.pop(peer, None))  # type: ignore[misc]
            await self._tell()
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _PERIOD_S)

    async def _ask(self, peer: PeerId) -> None:
        try:
            self._health.answered(peer, await self._asks[peer](False))
        except TimeoutError:
            return  # its silence is measured
        except WorkerError as error:
            self._health.lost(peer, error.message)

    async def _tell(self) -> None:
        """Those who watch by gRPC, and the log."""
        problems = self._health.not_ready()
        for worker, problem in problems.items():
            if worker not in self._told:
                logger.warning("%s is not ready: %s", worker, problem)
        for worker in self._told.keys() - problems.keys():
            logger.info("%s is ready", worker)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await self._servicer.set("", not_serving if problems else serving)
        for worker in self._told.keys() | self._ranks.keys():
            await self._servicer.set(worker, not_serving if worker in problems else serving)
        self._told = problems

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/readyz", self._readyz),
                Route("/startupz", self._startupz),
                Route("/metrics", self._serve_metrics),
            ]
        )

    async def _livez(self, request: Request) -> Response:
        """The supervisor itself: a rank that is dead is started again alone, and is no reason to end the node."""
        return _answer({})

    async def _readyz(self, request: Request) -> Response:
        """Every rank serves, and gets on."""
        return _answer(self._health.not_ready())

    async def _startupz(self, request: Request) -> Response:
        """Every rank has been ready once."""
        return _answer(self._health.not_started())

    async def _serve_metrics(self, request: Request) -> Response:
        """Of all ranks, in Prometheus' text format."""
        labels: dict[str, dict[str, str]] = {"": {}}
        labels |= {
            rank.worker: {"pool": rank.role, "worker": rank.worker, "rank": str(rank.rank)}
            for rank in self._ranks.values()
        }
        self._metrics.clear()
        for found in self._health.judge():
            place = labels[found.rank.worker].values()
            self._metrics.ready.labels(*place).set(not found.problem)
            self._metrics.stalled_s.labels(*place).set(found.stalled_s)
            self._metrics.restarts.labels(*place).set(found.rank.restarts)
        texts = {"": render(self._metrics.registry)}
        alive = [(rank.worker, self._asks[rank.peer]) for rank in self._ranks.values() if rank.peer in self._asks]
        answers = await asyncio.gather(*(ask(True) for _, ask in alive), return_exceptions=True)
        for (worker, _), answer in zip(alive, answers, strict=True):
            if isinstance(answer, Vitals):
                texts[worker] = answer.metrics
            else:
                _log.warning(worker, "%s does not tell its metrics: %s", worker, type(answer).__name__)
        text = await asyncio.to_thread(merge, texts, labels)
        return Response(text, media_type="text/plain; version=0.0.4")


def _answer(problems: dict[WorkerId, str]) -> Response:
    status = "; ".join(f"{worker}: {problem}" for worker, problem in sorted(problems.items()))
    return JSONResponse({"status": status or "ok", "not_ready": problems}, 503 if problems else 200)
