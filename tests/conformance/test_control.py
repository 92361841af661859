"""The operators' API over real sockets, as any gRPC client sees it, on a real controller whose processes the test owns."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.certificates import self_signed
from support.launched import Launched
from tandem.cluster.control import control_pb2 as pb
from tandem.cluster.control.client import ControlClient
from tandem.cluster.control.credentials import Credentials
from tandem.cluster.control.server import ControlServer
from tandem.cluster.controller import Controller
from tandem.cluster.rebalancing import Rebalancing
from tandem.cluster.scaling import Scaling
from tandem.core.clock import SystemClock
from tandem.core.config import Config, ControlConfig
from tandem.core.errors import ConfigError, TandemError, WorkerError

TIMEOUT_S = 20


class Served:
    """A control server and its controller, on a loop of their own."""

    def __init__(self, folder: Path, parallel: int = 1, **config: Any) -> None:
        self.folder = folder
        self.launched = Launched()
        pools = {"prefill": {"expert_parallel": 1}, "decode": {"replicas": 2}}
        self._config = Config.model_validate({"pools": pools, "experts": {"parallel": parallel}, "control": config})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def do(self, work: Any) -> Any:
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)

    def die(self, peer: str) -> None:
        """Let a process die."""
        self._loop.call_soon_threadsafe(self.launched.processes[peer].die)

    async def _start(self) -> Credentials:
        self.controller = Controller(self._config, self.launched, SystemClock())
        scaling = Scaling(self._config, self.launched, self.controller)
        self.server = ControlServer(
            self.controller, scaling, Rebalancing(self._config, self.controller), self._config.control, self.folder
        )
        return await self.server.start()

    def __enter__(self) -> Served:
        self._thread.start()
        try:
            self.credentials = self.do(self._start())
        except TandemError:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self.server.stop())
        self.do(self.controller.stop(0))
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as served:
        served.do(served.controller.start())
        yield served


def test_an_operators_day(served: Served) -> None:
    with ControlClient(served.credentials) as client:
        workers = {worker.name: worker for worker in client.status()}
        assert set(workers) == {"prefill-0", "decode-0", "decode-1", "gateway-0"}
        assert (workers["decode-0"].peer, workers["decode-0"].phase) == ("decode-0#1", "ready")
        assert workers["decode-0"].load.queued_tokens == 3
        client.drain("decode-0", 5, restart=True)
        assert client.scale("decode", 1) == ([], ["decode-1"])
        assert client.scale("decode", 3) == (["decode-1", "decode-2"], [])
        with pytest.raises(
            WorkerError, match=r"prefill-0 is the last prefill worker that is ready.*tandem scale prefill"
        ):
            client.drain("prefill-0", 5, restart=False)
        with pytest.raises(WorkerError, match="there is no expert group"):
            client.rebalance("", 5)


def test_experts_are_placed_anew(tmp_path: Path) -> None:
    with Served(tmp_path, parallel=2) as served:
        served.do(served.controller.start())
        with ControlClient(served.credentials) as client:
            [group] = client.rebalance("", 5)
            assert (group.worker, group.outcome) == ("decode-0", "done: within 5 s")
            assert client.rebalance("decode", 7)[0].outcome == "done: within 7 s"
            with pytest.raises(WorkerError, match="no workers of the pool 'prefill' share experts"):
                client.rebalance("prefill", 5)
            with pytest.raises(WorkerError, match="timeout_s is 0, expected more than 0"):
                client.rebalance("", 0)
            got = client.expert_load("", 3)
            assert (got.entries[0].number, got.entries[0].tokens, got.num_experts) == (4, bytes(16), 2)
            with pytest.raises(WorkerError, match="give the first worker of a group that shares experts: decode-0"):
                client.expert_load("decode-1", 0)
            served.launched.processes["decode-0#1"].refuses = True
            assert client.rebalance("", 5)[0].outcome == "failed: experts.balance is off"
            served.do(served.controller.note("decode-0#1", "experts: done: 3 moved"))
            assert next(client.watch()).text == "decode-0#1: experts: done: 3 moved"


def test_events_come_as_they_happen(served: Served) -> None:
    with ControlClient(served.credentials) as client:
        events = client.watch()
        served.die("decode-1#1")
        first = next(events)
        assert (first.number, first.text) == (1, "decode-1#1 is gone: SIGKILL")
        assert "restarts in" in next(events).text
        client.scale("decode", 3)
        assert "decode-2#1 is ready" in (event.text for event in events)
        assert next(client.watch(after=1)).number == 2
        served.do(served.server.stop())
        with pytest.raises(WorkerError):
            list(events)
    assert not (served.folder / "control.json").exists()


def test_who_knows_nothing_learns_the_api_by_reflection(served: Served) -> None:
    """As grpcurl does: messages are made from what the server tells, and from nothing of ours."""
    with _channel(served.credentials) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) >= {"tandem.v1.Control", "grpc.health.v1.Health"}
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("tandem.v1.Control").methods_by_name["Scale"]
        call = channel.unary_unary(
            "/tandem.v1.Control/Scale",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = call(GetMessageClass(method.input_type)(pool="decode", replicas=3), timeout=TIMEOUT_S)
        assert list(answer.started) == ["decode-2"]


@pytest.mark.parametrize("header", [None, "", "Bearer ", "Bearer wrong", "TOKEN", "bearer TOKEN", "Bearer TOKENx"])
def test_without_the_token_only_health_answers(served: Served, header: str | None) -> None:
    token = served.credentials.token
    metadata = [] if header is None else [("authorization", header.replace("TOKEN", token))]
    with grpc.insecure_channel(served.credentials.address) as channel:
        unary = channel.unary_unary("/tandem.v1.Control/Scale")
        request = pb.ScaleRequest(pool="decode", replicas=1).SerializeToString()
        stream = channel.unary_stream("/tandem.v1.Control/Watch")
        both = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        unknown = channel.unary_unary("/tandem.v1.Control/Nothing")
        for call in (
            lambda: unary(request, metadata=metadata, timeout=TIMEOUT_S),
            lambda: next(stream(b"", metadata=metadata, timeout=TIMEOUT_S)),
            lambda: next(both(iter([b""]), metadata=metadata, timeout=TIMEOUT_S)),
            lambda: unknown(b"", metadata=metadata, timeout=TIMEOUT_S),
        ):
            assert _code(call) == grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == 1
    assert len(served.launched.order) == 4
    assert served.do(served.controller.status())[2].phase == "ready"


def test_health_tells_whether_requests_can_be_served(tmp_path: Path) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with Served(tmp_path) as served, grpc.insecure_channel(served.credentials.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watched).status == not_serving, "nothing has started"
        named = health_pb2.HealthCheckRequest(service="tandem.v1.Control")
        assert health.Check(named, timeout=TIMEOUT_S).status == serving
        served.do(served.controller.start())
        assert next(watched).status == serving
        served.die("prefill-0#1")
        assert next(watched).status == not_serving
        assert next(watched).status == serving, "it is started again"
        watched.cancel()
        unknown = health_pb2.HealthCheckRequest(service="nobody")
        assert _code(lambda: health.Check(unknown, timeout=TIMEOUT_S)) == grpc.StatusCode.NOT_FOUND


def test_hostile_bytes_harm_nobody(served: Served) -> None:
    host, port = served.credentials.address.split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))
        with _channel(served.credentials) as channel:
            scale = channel.unary_unary("/tandem.v1.Control/Scale")
            for garbage in (b"\xff" * 40, b"\x0a\xff\xff\xff\x7f", b"", b"\x0a\x06decode\x10\xff\xff\xff\xff\x0f"):
                code = _code(lambda: scale(garbage, timeout=TIMEOUT_S))  # noqa: B023
                assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            watch = channel.unary_stream("/tandem.v1.Control/Watch")
            header = (("authorization", f"Bearer {served.credentials.token}"),)
            assert _code(lambda: next(watch(b"\xff", metadata=header, timeout=TIMEOUT_S))) == (
                grpc.StatusCode.INVALID_ARGUMENT
            )
            assert _code(lambda: scale(bytes(1 << 17), timeout=TIMEOUT_S)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        with ControlClient(served.credentials) as client:
            assert len(client.status()) == 4


def test_the_token_is_for_this_user_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    note = served.folder / "control.json"
    assert note.stat().st_mode & 0o777 == 0o600
    assert Credentials.read(note) == served.credentials
    assert served.credentials.token not in repr(served.credentials) + caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="no Tandem of this user listens"):
        Credentials.find()
    for stamp, address in (("20260101-000000", served.credentials.address), ("20260102-000000", "127.0.0.1:9")):
        folder = tmp_path / "cache" / "tandem" / "logs" / stamp
        folder.mkdir(parents=True)
        Credentials(address, served.credentials.token, None).write(folder / "control.json")
    assert Credentials.find() == served.credentials, "what a killed cluster has left is passed over"


def test_a_port_in_use_is_not_shared(tmp_path: Path) -> None:
    with Served(tmp_path) as first:
        port = int(first.credentials.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"control.port: cannot listen on 127.0.0.1:{port}"):
            Served(tmp_path, port=port).__enter__()


def test_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with Served(tmp_path, tls_cert=str(certificate), tls_key=str(key)) as served:
        served.do(served.controller.start())
        with ControlClient(served.credentials) as client:
            assert len(client.status()) == 4
        plain = Credentials(served.credentials.address, served.credentials.token, None)
        (tmp_path / "other").mkdir()
        stranger = Credentials(plain.address, plain.token, self_signed(tmp_path / "other")[0].read_text())
        for wrong in (plain, stranger):
            with ControlClient(wrong) as client, pytest.raises(WorkerError, match="does not answer"):
                client.status()
    with pytest.raises(ConfigError, match=r"control\.tls_key: .*nowhere"):
        Served(tmp_path, tls_cert=str(certificate), tls_key="/nowhere").__enter__()
    with pytest.raises(ConfigError, match="tls_cert and tls_key"):
        Served(tmp_path, tls_cert=str(key), tls_key=str(certificate)).__enter__()
    with pytest.raises(ValueError, match="go together"):
        ControlConfig(tls_cert="x")


def test_what_protoc_made_is_what_the_proto_says(tmp_path: Path) -> None:
    folder = Path(pb.__file__).parent
    made = ["--python_out", "--pyi_out"]
    arguments = [f"-Itandem/v1={folder}", *(f"{kind}={tmp_path}" for kind in made), "tandem/v1/control.proto"]
    # In a process of its own: it brings a second protobuf, which does not get on with the first.
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
    for name in ("control_pb2.py", "control_pb2.pyi"):
        assert (tmp_path / "tandem" / "v1" / name).read_text() == (folder / name).read_text(), (
            "python -m grpc_tools.protoc -Itandem/v1=cluster/control --python_out=OUT --pyi_out=OUT "
            "tandem/v1/control.proto makes both anew"
        )


def _channel(credentials: Credentials) -> grpc.Channel:
    """A channel that brings the token, as any client's `-H` does."""
    token = (("authorization", f"Bearer {credentials.token}"),)
    return grpc.intercept_channel(grpc.insecure_channel(credentials.address), _Bring(token))


class _Details(grpc.ClientCallDetails):
    def __init__(self, old: Any, metadata: Any) -> None:
        self.method, self.timeout, self.metadata, self.credentials = old.method, old.timeout, metadata, old.credentials
        self.wait_for_ready, self.compression = old.wait_for_ready, old.compression


class _Bring(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    def __init__(self, metadata: Any) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, call: Any, details: Any, request: Any) -> Any:
        return call(_Details(details, self._metadata), request)

    intercept_stream_stream = intercept_unary_unary


def _code(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()
