"""A supervisor's one port, as probes, Prometheus and gRPC clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from support.certificates import self_signed
from support.gateway import wait_for
from tandem.cluster.supervisor.server import Supervisor
from tandem.core.config import SupervisorConfig
from tandem.core.errors import ConfigError, WorkerError
from tandem.core.health import LocalRank, Vitals
from tandem.core.metrics import WorkerMetrics, render

TIMEOUT_S = 20
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Node:
    """A supervisor on a loop of its own, and ranks that answer as the test says."""

    def __init__(self, **config: Any) -> None:
        self.vitals: dict[str, Vitals | Exception] = {}
        self.supervisor = Supervisor(SupervisorConfig.model_validate(config))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        try:
            self.port: int = self.do(self.supervisor.start("127.0.0.1", int(config.get("port", 0))))
        except BaseException:
            self.close()
            raise

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def follow(self, **phases: str) -> None:
        """Who is there, "decode_0" for decode-0; those that are ready answer."""
        ranks = [_rank(name.replace("_", "-"), phase) for name, phase in phases.items()]

        async def follow() -> None:
            self.supervisor.follow(ranks, {rank.peer: self._asker(rank.peer) for rank in ranks})

        self.do(follow())

    def _asker(self, peer: str) -> Callable[[bool], Awaitable[Vitals]]:
        async def ask(with_metrics: bool) -> Vitals:
            found = self.vitals.get(peer, Vitals(0.0, _metrics() if with_metrics else ""))
            if isinstance(found, Exception):
                raise found
            return found

        return ask

    def close(self) -> None:
        self.do(self.supervisor.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _rank(worker: str, phase: str) -> LocalRank:
    return LocalRank(worker, f"{worker}#1", worker.rpartition("-")[0], 0, phase, 0)


def _metrics() -> str:
    return render(WorkerMetrics(CollectorRegistry()).registry)


@contextlib.contextmanager
def node(**config: Any) -> Iterator[Node]:
    found = Node(**config)
    try:
        yield found
    finally:
        found.close()


def test_http_and_grpc_tell_the_same_on_one_port() -> None:
    with node() as one, httpx.Client(base_url=f"http://127.0.0.1:{one.port}", trust_env=False) as http:
        with grpc.insecure_channel(f"127.0.0.1:{one.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def check(service: str = "") -> int:
                return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status)

            def statuses() -> dict[str, int]:
                return {path: http.get(path).status_code for path in ("/livez", "/readyz", "/startupz")}

            assert statuses() == {"/livez": 200, "/readyz": 200, "/startupz": 200}
            one.follow(decode_0="weights 40 %", decode_1="ready")
            assert statuses() == {"/livez": 200, "/readyz": 503, "/startupz": 503}
            assert http.get("/readyz").json()["not_ready"] == {"decode-0": "weights 40 %"}
            wait_for(lambda: check() == NOT_SERVING, TIMEOUT_S, "gRPC to know")
            assert (check("decode-0"), check("decode-1")) == (NOT_SERVING, SERVING)

            changes = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(changes).status == NOT_SERVING
            one.follow(decode_0="ready", decode_1="ready")
            assert next(changes).status == SERVING
            one.vitals["decode-1#1"] = WorkerError("decode-1#1 is gone: SIGKILL")
            assert next(changes).status == NOT_SERVING
            changes.cancel()
            assert statuses() == {"/livez": 200, "/readyz": 503, "/startupz": 200}
            assert http.get("/readyz").json()["status"] == "decode-1: decode-1#1 is gone: SIGKILL"

            metrics = http.get("/metrics").text
            assert 'tandem_rank_ready{pool="decode",rank="0",worker="decode-0"} 1.0' in metrics
            assert 'tandem_rank_ready{pool="decode",rank="0",worker="decode-1"} 0.0' in metrics
            assert 'tandem_sequences_running{pool="decode",rank="0",worker="decode-0"} 0.0' in metrics
            assert 'tandem_sequences_running{pool="decode",rank="0",worker="decode-1"}' not in metrics
            assert http.get("/nothing").status_code == 404
            with pytest.raises(grpc.RpcError) as caught:
                check("decode-7")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_work_without_steps_is_not_ready_and_named() -> None:
    with node(stalled_after_s=30) as one, httpx.Client(base_url=f"http://127.0.0.1:{one.port}") as http:
        one.follow(decode_0="ready", prefill_0="ready")
        one.vitals["prefill-0#1"] = Vitals(31.0)
        wait_for(lambda: http.get("/readyz").status_code == 503, TIMEOUT_S, "prefill-0 to be named")
        assert list(http.get("/readyz").json()["not_ready"]) == ["prefill-0"]
        assert "no step for" in http.get("/readyz").json()["status"]
        one.vitals["prefill-0#1"] = Vitals(0.0)
        wait_for(lambda: http.get("/readyz").status_code == 200, TIMEOUT_S, "prefill-0 to be ready")


def test_both_speak_tls_where_it_is_configured(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with node(tls_cert=str(certificate), tls_key=str(key)) as one:
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"https://127.0.0.1:{one.port}/livez", verify=context, trust_env=False).status_code == 200
        trust = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{one.port}", trust) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert answer.status == SERVING
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{one.port}/livez", trust_env=False, timeout=TIMEOUT_S)
    with pytest.raises(ConfigError, match=r"supervisor\.tls_cert"):
        Node(tls_cert=str(key), tls_key=str(key))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"supervisor\.port"):
        Node(port=taken.getsockname()[1])


def test_those_who_say_nothing_or_nonsense_take_nothing() -> None:
    with node() as one:
        address = ("127.0.0.1", one.port)
        silent = [socket.create_connection(address) for _ in range(20)]
        for frame in (
            b"PRI",
            b"P",
            b"\x16\x03\x01" + bytes(200),
            b"GET / HTTP/9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(99),
        ):
            with socket.create_connection(address) as stranger:
                stranger.sendall(frame)
                stranger.shutdown(socket.SHUT_WR)
                stranger.settimeout(TIMEOUT_S)
                with contextlib.suppress(ConnectionError):
                    while stranger.recv(4096):
                        pass
        assert httpx.get(f"http://127.0.0.1:{one.port}/livez", trust_env=False).status_code == 200
        for connection in silent:
            connection.close()
