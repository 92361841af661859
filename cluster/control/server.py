"""The operators' API: gRPC on the controller's event loop, with health checks and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...core.config import ControlConfig
from ...core.errors import CapacityError, ConfigError, NotFoundError, RequestError, TandemError, WorkerError
from ...core.log import logger
from ..controller import Controller, WorkerStatus
from ..rebalancing import REBALANCE_S, Rebalancing
from ..scaling import DRAIN_S, Scaling
from ..tls import is_loopback
from . import control_pb2 as pb
from .credentials import NAME, Credentials

SERVICE = pb.DESCRIPTOR.services_by_name["Control"]
_HEALTH = f"/{health.SERVICE_NAME}/"
_WATCH_S = 60.0
_STOP_GRACE_S = 0.5
_MAX_RPCS = 256
_MAX_REQUEST_BYTES = 1 << 16
_OPTIONS = (
    # Without this, a port that somebody of this user listens on would be shared with him.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
)
_CODES = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (CapacityError, grpc.StatusCode.FAILED_PRECONDITION),
    (TandemError, grpc.StatusCode.INTERNAL),
)

_T = TypeVar("_T")
Context = Any
"""grpc.aio.ServicerContext, which is generic in stubs only."""


class ControlService:
    """The methods of `tandem.v1.Control`, which raise errors of `core.errors`.

    Args:
        controller: of the cluster.
        scaling: drains and scales.
        rebalancing: places experts.
    """

    def __init__(self, controller: Controller, scaling: Scaling, rebalancing: Rebalancing) -> None:
        self._controller = controller
        self._scaling = scaling
        self._rebalancing = rebalancing
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Who waits for something is told that the cluster ends."""
        self._closing.set()

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """Every worker."""
        return pb.StatusResponse(workers=[_worker(status) for status in await self._controller.status()])

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Answers when the worker has ended, or is back."""
        grace_s = request.grace_s if request.HasField("grace_s") else DRAIN_S
        options = {"restart": request.restart, "finish": request.finish}
        await self._unless_closing(self._scaling.drain(request.worker, grace_s, **options, key=request.key))
        return pb.DrainResponse()

    async def Restart(self, request: pb.RestartRequest, context: Context) -> AsyncIterator[pb.RestartResponse]:
        """One worker after the other."""
        grace_s = request.grace_s if request.HasField("grace_s") else DRAIN_S
        async with contextlib.aclosing(self._scaling.restart(request.pool, grace_s, request.key)) as restarted:
            while worker := await self._unless_closing(anext(restarted, "")):
                yield pb.RestartResponse(worker=worker)

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        """Answers at once."""
        started, drained = await self._scaling.scale(request.pool, request.replicas, request.key)
        return pb.ScaleResponse(started=started, drained=drained)

    async def Rebalance(self, request: pb.RebalanceRequest, context: Context) -> pb.RebalanceResponse:
        """Answers when all groups are done, or have failed."""
        if not self._rebalancing.possible:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no expert group, whose experts could be moved")
        timeout_s = request.timeout_s if request.HasField("timeout_s") else REBALANCE_S
        groups = await self._unless_closing(self._rebalancing.rebalance(request.pool, timeout_s))
        return pb.RebalanceResponse(groups=[pb.Rebalanced(**group._asdict()) for group in groups])

    async def ExpertLoad(self, request: pb.ExpertLoadRequest, context: Context) -> pb.ExpertLoadResponse:
        """Answers at once."""
        load = await self._rebalancing.load(request.worker, request.after)
        return pb.ExpertLoadResponse(
            entries=[pb.ExpertLoadEntry(number=e.number, steps=e.steps, tokens=e.tokens) for e in load.entries],
            num_layers=load.num_layers,
            num_experts=load.num_experts,
            model=load.model,
            last=load.last,
        )

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Event]:
        """Until the caller leaves, or the cluster is stopped."""
        last = request.after
        while True:
            for event in await self._unless_closing(self._controller.events(last, _WATCH_S)):
                last = event.number
                yield pb.Event(**event._asdict())

    async def _unless_closing(self, work: Awaitable[_T]) -> _T:
        """What becomes of ``work``. Raises WorkerError as soon as the cluster is stopped: a broken connection does not
        mean so much."""
        task = asyncio.ensure_future(work)
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait([task, closing], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise WorkerError("the cluster is stopped")
            return task.result()
        finally:
            closing.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


class ControlServer:
    """Listens, and leaves its credentials beside the logs while it does. Belongs to the controller's event loop.

    Args:
        controller: of the cluster.
        scaling: drains and scales.
        rebalancing: places experts.
        config: address and TLS.
        folder: where `control.json` is written.
    """

    def __init__(
        self,
        controller: Controller,
        scaling: Scaling,
        rebalancing: Rebalancing,
        config: ControlConfig,
        folder: Path,
    ) -> None:
        self._controller = controller
        self._scaling = scaling
        self._rebalancing = rebalancing
        self._config = config
        self._note = folder / NAME
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, last: Credentials | None = None) -> Credentials:
        """Bind the port, serve, write the credentials.

        Args:
            last: those of the controller's last life, for whose clients nothing changes if its port is still free.

        Raises:
            ConfigError: the port is taken, or the TLS files are no certificate and key.
        """
        token = last.token if last else secrets.token_urlsafe(32)
        certificate, key = self._read_tls()
        server = grpc.aio.server(interceptors=[_TokenCheck(token)], options=_OPTIONS, maximum_concurrent_rpcs=_MAX_RPCS)
        self._service = ControlService(self._controller, self._scaling, self._rebalancing)
        server.add_generic_rpc_handlers((_handlers(self._service),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        wanted = [self._config.port]
        if last and not self._config.port:
            wanted.insert(0, int(last.address.rpartition(":")[2]))
        for number in wanted:
            address = f"{host}:{number}"
            try:
                if certificate is None or key is None:
                    port = server.add_insecure_port(address)
                else:
                    port = server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)]))
                break
            except RuntimeError as error:
                if number == wanted[-1]:
                    raise ConfigError(
                        f"control.port: cannot listen on {address}: {error}",
                        fix="stop what uses it, or leave control.port out; check control.tls_cert and tls_key",
                    ) from None
                logger.warning("operators' API: %s is taken", address)
        if certificate is None and not is_loopback(self._config.host):
            logger.warning("the operators' API at %s has no TLS: whoever listens on the way learns the token", address)
        await server.start()
        self._server = server
        self._watcher = asyncio.create_task(self._keep_health())
        credentials = Credentials(f"{host}:{port}", token, certificate.decode() if certificate else None)
        credentials.write(self._note)
        logger.info("operators' API at %s:%d", host, port)
        return credentials

    async def stop(self) -> None:
        """End the calls in progress and remove the credentials. Idempotent."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        if self._server is not None:
            self._service.close()
            self._note.unlink(missing_ok=True)
            await self._server.stop(_STOP_GRACE_S)
            self._server = None

    def _read_tls(self) -> tuple[bytes | None, bytes | None]:
        def read(key: str) -> bytes | None:
            path = getattr(self._config, key)
            try:
                return Path(path).expanduser().read_bytes() if path is not None else None
            except OSError as error:
                raise ConfigError(f"control.{key}: {path}: {error.strerror}", fix="give a PEM file") from None

        return read("tls_cert"), read("tls_key")

    async def _keep_health(self) -> None:
        """The API itself serves as long as it is there; "" tells whether requests can be served."""
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE.full_name, serving)
        while True:
            lacking = self._scaling.lacking()
            await self._health.set("", not_serving if lacking else serving)
            await self._controller.until(lambda: self._scaling.lacking() != lacking)  # noqa: B023


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls through that bring the token, and health checks, which probes make without."""

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        matches = hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._wanted)
        if matches or details.method.startswith(_HEALTH):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: Any, context: Context) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, f"a valid token is needed, as `authorization: Bearer …`; {NAME} has it"
    )


def _handlers(service: ControlService) -> Any:
    """The service's methods, as its descriptor says."""
    return grpc.method_handlers_generic_handler(
        SERVICE.full_name, {method.name: _handler(method, getattr(service, method.name)) for method in SERVICE.methods}
    )


def _handler(method: Any, behaviour: Callable[..., Any]) -> Any:
    request_type, encode = GetMessageClass(method.input_type), GetMessageClass(method.output_type).SerializeToString

    async def parse(body: bytes, context: Context) -> Any:
        try:
            return request_type.FromString(body)
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def answer(body: bytes, context: Context) -> Any:
        request = await parse(body, context)
        try:
            return await behaviour(request, context)
        except TandemError as error:
            await refuse(error, context)

    async def stream(body: bytes, context: Context) -> AsyncIterator[Any]:
        async with contextlib.aclosing(behaviour(await parse(body, context), context)) as messages:
            try:
                async for message in messages:
                    yield message
            except TandemError as error:
                await refuse(error, context)

    async def refuse(error: TandemError, context: Context) -> None:
        code = next(code for kind, code in _CODES if isinstance(error, kind))
        await context.abort(code, str(error))

    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, response_serializer=encode)
    return grpc.unary_unary_rpc_method_handler(answer, response_serializer=encode)


def _worker(status: WorkerStatus) -> pb.Worker:
    fields = pb.Load.DESCRIPTOR.fields_by_name
    report = status.report
    load = None
    if report is not None:
        load = pb.Load(**{name: getattr(report, name) for name in fields if name != "experts"})
        if report.experts is not None:
            load.experts.CopyFrom(pb.Experts(**msgspec.structs.asdict(report.experts)))
    return pb.Worker(
        name=status.worker,
        peer=status.peer,
        role=status.role,
        phase=status.phase,
        node=status.node,
        restarts=max(0, status.restarts),
        load=load,
    )
