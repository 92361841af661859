"""Who is not of the cluster: turned away from every socket, and counted; and fields that only workers may use."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
import zmq
from prometheus_client import CollectorRegistry
from support.served import wait_for
from tandem.cluster.gateway.schema import ChatBody, CompletionBody, TokenizeBody, parse
from tandem.cluster.mesh import Mesh
from tandem.core import messages as wire
from tandem.core.errors import RequestError
from tandem.core.metrics import WorkerMetrics, render
from tandem.core.wire import ClusterKeys, SecureContext, make_cluster_keys
from tandem.kv_transfer.transports.zmq import ZmqTransport

KEYS = make_cluster_keys()
OTHERS = make_cluster_keys()


class Worker:
    """The sockets of a worker: messages and KV, as `WorkerRuntime` opens them."""

    def __init__(self) -> None:
        self.metrics = WorkerMetrics(CollectorRegistry())
        self.context = SecureContext(KEYS, self.metrics.bad_frames.labels("denied").inc)
        self.received: list[wire.Message] = []
        self.mesh = Mesh(
            "decode-0#1", self.context, "127.0.0.1", lambda _, message: self.received.append(message), lambda _: None,
            self.metrics.bad_frames.labels("mesh").inc,
        )  # fmt: skip
        self.mesh.start()
        self.kv = ZmqTransport(lambda: None, self.context, "127.0.0.1", self.metrics.bad_frames.labels("kv").inc)
        self.endpoints = {"mesh": self.mesh.endpoint, "kv": self.kv.endpoint}

    def denied(self) -> int:
        return int(self.metrics.bad_frames.labels("denied")._value.get())

    def close(self) -> None:
        self.kv.close()
        self.mesh.close()
        self.context.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def dealer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: ClusterKeys | None) -> zmq.Socket[bytes]:
    """A stranger's socket, made without the house's help."""
    sender = context.socket(zmq.DEALER)
    sender.setsockopt(zmq.LINGER, 0)
    sender.setsockopt(zmq.IDENTITY, b"gateway-0#1")
    if keys is not None:
        sender.curve_serverkey = keys.server_public
        sender.curve_publickey, sender.curve_secretkey = keys.client_public, keys.client_secret
    sender.connect(endpoint)
    return sender


STRANGERS = {
    "all keys are others": OTHERS,
    "the client's keys are others": ClusterKeys(KEYS.server_public, b"", OTHERS.client_public, OTHERS.client_secret),
    "the server's key is another": ClusterKeys(OTHERS.server_public, b"", KEYS.client_public, KEYS.client_secret),
    "no keys at all": None,
}


@pytest.mark.parametrize("which", ["mesh", "kv"])
@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_turned_away_and_counted(worker: Worker, which: str, who: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sender = dealer(context, worker.endpoints[which], STRANGERS[who])
        # A connection that has been refused already takes nothing, and sending would wait for another for ever.
        with contextlib.suppress(zmq.Again):
            sender.send(wire.encode(wire.Subscribe()), flags=zmq.NOBLOCK)
        wait_for(worker.denied, 5, "the stranger to be counted")
        assert sender.poll(200) == 0
        assert worker.received == []
        assert 'tandem_bad_frames_total{socket="denied"}' in render(worker.metrics.registry)
        friend = dealer(context, worker.endpoints["mesh"], KEYS)
        friend.send(wire.encode(wire.Subscribe()))
        wait_for(lambda: worker.received, 5, "a peer with the cluster's keys to be heard")
    finally:
        context.destroy(linger=0)


def test_a_stranger_who_speaks_something_else_is_counted(worker: Worker) -> None:
    for endpoint in worker.endpoints.values():
        before = worker.denied()
        host, _, port = endpoint.removeprefix("tcp://").partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(15) + b"\x00" + bytes(131))
            wait_for(lambda before=before: worker.denied() > before, 5, "the sender to be counted")  # type: ignore[misc]


def test_friends_are_not_counted(worker: Worker) -> None:
    context = SecureContext(KEYS)
    senders = [context.connect(f"friend-{i}", worker.mesh.endpoint) for i in range(5)]
    for sender in senders:
        sender.send(wire.encode(wire.Subscribe()))
    wait_for(lambda: len(worker.received) == 5, 5, "all to be heard")
    for sender in senders:
        sender.close()
    context.close()
    assert worker.denied() == 0


def test_a_guarded_context_closes_with_its_sockets_open_and_after_them() -> None:
    for close_first in (True, False):
        context = SecureContext(KEYS, lambda: None)
        listener, _ = context.bind("127.0.0.1")
        if close_first:
            listener.close()
        context.close()
        context.close()


def test_a_frame_beyond_the_bound_ends_its_connection(worker: Worker) -> None:
    context = SecureContext(KEYS)
    sender = context.connect("friend", worker.mesh.endpoint)
    sender.setsockopt(zmq.MAXMSGSIZE, -1)
    sender.send(b"\0" * (wire.MAX_MESSAGE_BYTES + 1))
    sender.send(wire.encode(wire.Subscribe()))
    friend = context.connect("another", worker.mesh.endpoint)
    friend.send(wire.encode(wire.Scrape(1)))
    wait_for(lambda: wire.Scrape(1) in worker.received, 10, "others to be heard")
    context.close()


# ---- public requests ------------------------------------------------------------------------------------------------

# Of Tandem's own messages, and of other servers that hand KV over by what a request says.
INTERNAL = [
    "kv_transfer_params", "do_remote_prefill", "do_remote_decode", "remote_engine_id", "remote_block_ids", "remote_host",
    "remote_port", "remote_request_id", "tp_size", "bootstrap_host", "bootstrap_port", "bootstrap_room",
    "data_parallel_rank", "disaggregated_params", "prefill_result", "prefill", "ticket", "children", "skip_tokens",
    "generations", "blocks", "lease_s", "salt", "peer", "request_id", "transports", "hidden_states_file",
]  # fmt: skip


@pytest.mark.parametrize("field", INTERNAL)
@pytest.mark.parametrize("kind", [CompletionBody, ChatBody, TokenizeBody])
def test_fields_of_the_kv_plane_are_refused_by_name(kind: type, field: str) -> None:
    bodies = {
        CompletionBody: {"prompt": "x"},
        ChatBody: {"messages": [{"role": "user", "content": "x"}]},
        TokenizeBody: {"prompt": "x"},
    }
    parse(kind, json.dumps(bodies[kind]).encode())
    for value in ({"remote_host": "10.0.0.1"}, [1, 2], "10.0.0.1", 7, None, True):
        with pytest.raises(RequestError) as caught:
            parse(kind, json.dumps({**bodies[kind], field: value}).encode())
        assert caught.value.status == 400
        assert caught.value.param == field
        assert f"unknown field {field!r}" in caught.value.message


@pytest.mark.parametrize("field", INTERNAL[:4])
def test_they_are_refused_inside_other_fields_too(field: str) -> None:
    for body in (
        {"messages": [{"role": "user", "content": "x", field: 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", field: 1}]}]},
        {"messages": [{"role": "user", "content": "x"}], "stream": True, "stream_options": {field: 1}},
    ):
        with pytest.raises(RequestError) as caught:
            parse(ChatBody, json.dumps(body).encode())
        assert caught.value.status == 400
        assert field in caught.value.message
