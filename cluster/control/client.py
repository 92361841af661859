"""A client of the operators' API, for the command line. Every method blocks."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...core.errors import WorkerError
from . import control_pb2 as pb
from .credentials import Credentials

SERVICE = pb.DESCRIPTOR.services_by_name["Control"]
_ANSWER_TIMEOUT_S = 10.0
_MARGIN_S = 60.0
_RESTART_TIMEOUT_S = 60.0
"""A controller that died is back by then, pauses included, or is not started again."""
_RETRY_S = 0.2


class ControlClient:
    """A connection. Calls raise WorkerError with what the server says, or that it does not answer.

    Args:
        credentials: of the cluster.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._metadata = (("authorization", f"Bearer {credentials.token}"),)
        self._channel = self._connect()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def status(self) -> list[pb.Worker]:
        """Every worker."""
        return list(self._call("Status", pb.StatusRequest(), _ANSWER_TIMEOUT_S).workers)

    def drain(self, worker: str, grace_s: float, *, restart: bool, finish: bool = False) -> None:
        """Take a worker out; returns when it has ended or, to ``restart``, is back, which may take a model's loading.

        Args:
            worker: "decode-0".
            grace_s: what is not finished by then goes on elsewhere.
            restart: start it again.
            finish: finish what runs on it there, instead of handing it over.
        """
        timeout_s = None if restart else grace_s + _MARGIN_S
        request = pb.DrainRequest(worker=worker, grace_s=grace_s, restart=restart, finish=finish, key=_new_key())
        self._insist("Drain", request, timeout_s)

    def restart(self, pool: str, grace_s: float) -> Iterator[str]:
        """Begin another life of every worker of a pool, or, for "", of all, one after the other: the name of each when
        it serves again. Whoever stops to listen stops it. Goes on when the controller was started again."""
        request = pb.RestartRequest(pool=pool, grace_s=grace_s, key=_new_key())
        num_heard = 0
        self._check_there()
        while True:
            try:
                for number, answer in enumerate(self._method("Restart")(request, metadata=self._metadata), 1):
                    if number > num_heard:
                        num_heard = number
                        yield answer.worker
                return
            except grpc.RpcError as error:
                self._wait_back(error)

    def scale(self, pool: str, replicas: int) -> tuple[list[str], list[str]]:
        """Have so many workers in a pool; those that start, and those that are drained."""
        request = pb.ScaleRequest(pool=pool, replicas=replicas, key=_new_key())
        answer = self._insist("Scale", request, _ANSWER_TIMEOUT_S)
        return list(answer.started), list(answer.drained)

    def rebalance(self, pool: str, timeout_s: float) -> list[pb.Rebalanced]:
        """Place the experts of a pool's groups anew, or of all ("") if none is named; what became of each. When the
        controller was started again, they are asked again: who has just been placed has nothing to move.

        Args:
            pool: prefill, decode or colocated, or "".
            timeout_s: of each group.
        """
        request = pb.RebalanceRequest(pool=pool, timeout_s=timeout_s)
        return list(self._insist("Rebalance", request, timeout_s + _MARGIN_S).groups)

    def expert_load(self, worker: str, after: int) -> pb.ExpertLoadResponse:
        """What the experts of a group computed, behind entry ``after``; some at a time.

        Args:
            worker: the first of the group, or "": of the only one.
            after: see `control.proto`.
        """
        request = pb.ExpertLoadRequest(worker=worker, after=after)
        answer: pb.ExpertLoadResponse = self._call("ExpertLoad", request, _ANSWER_TIMEOUT_S)
        return answer

    def watch(self, after: int = 0) -> Iterator[pb.Event]:
        """Events with a number above ``after``, as they happen, until the cluster ends; goes on when the controller was
        started again."""
        last = after
        self._check_there()
        while True:
            try:
                for event in self._method("Watch")(pb.WatchRequest(after=last), metadata=self._metadata):
                    last = event.number
                    yield event
                return
            except grpc.RpcError as error:
                self._wait_back(error)

    def _connect(self) -> grpc.Channel:
        options = (("grpc.enable_http_proxy", 0),)
        if self._credentials.certificate is None:
            return grpc.insecure_channel(self._credentials.address, options)
        trust = grpc.ssl_channel_credentials(self._credentials.certificate.encode())
        return grpc.secure_channel(self._credentials.address, trust, options)

    def _greet(self) -> None:
        """A call that costs nothing. Raises grpc.RpcError."""
        health = health_pb2_grpc.HealthStub(self._channel)
        health.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_TIMEOUT_S)

    def _check_there(self) -> None:
        """Raises WorkerError if there is no API: what ends without a word from now on is the controller."""
        try:
            self._greet()
        except grpc.RpcError as error:
            raise self._error(error) from None

    def _wait_back(self, error: Any) -> None:
        """After a call that failed: wait until the controller was started again, for a minute at most. Raises
        WorkerError if that is not what it failed from."""
        until_s = time.monotonic() + _RESTART_TIMEOUT_S
        while error.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() < until_s:
            # Anew, as a channel that has failed tries again less and less often.
            self._channel.close()
            self._channel = self._connect()
            with contextlib.suppress(grpc.RpcError):
                self._greet()
                return
            time.sleep(_RETRY_S)
        raise self._error(error) from None

    def _insist(self, name: str, request: Any, timeout_s: float | None) -> Any:
        """As `_call`, of a request that may be made again: goes on when the controller was started again."""
        self._check_there()
        while True:
            try:
                return self._method(name)(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                self._wait_back(error)

    def _call(self, name: str, request: Any, timeout_s: float | None) -> Any:
        try:
            return self._method(name)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def _method(self, name: str) -> Any:
        method = SERVICE.methods_by_name[name]
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        return make(
            f"/{SERVICE.full_name}/{name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )

    def _error(self, error: Any) -> WorkerError:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return WorkerError(
                f"the operators' API at {self._credentials.address} is gone, or does not answer: {details}"
            )
        return WorkerError(str(details))


def _new_key() -> str:
    """Tells a call from all others, also when it is made again."""
    return secrets.token_hex(16)
