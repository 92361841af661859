"""Operators' endpoints: who may call them, what they take, and what a recorded trace says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tandem.cluster.gateway.generation import Model
from tandem.cluster.gateway.live import LiveRequest
from tandem.cluster.gateway.operators import Operators
from tandem.cluster.gateway.recorder import TraceRecorder
from tandem.cluster.gateway.timeline import Timelines
from tandem.core.clock import ManualClock
from tandem.core.config import GatewayConfig
from tandem.core.kv_messages import KVClear, KVControlled, KVPin, KVUnpin
from tandem.core.messages import Child, Message, Sampling, Stopping
from tandem.core.metrics import GatewayMetrics
from tandem.kv_transfer.offload.trace import read_trace


class World:
    def __init__(self, **config: Any) -> None:
        self.clock = ManualClock(50.0)
        self.orders: list[Message] = []
        self.answer: Callable[[], dict[str, KVControlled | None]] = lambda: {"decode-0#1": KVControlled(1, 7)}
        self.recorder = TraceRecorder(self.clock)
        model = Model("m", None, 1000, 4096, ())
        metrics = GatewayMetrics(CollectorRegistry())
        operators = Operators(GatewayConfig(**config), model, self._control, self.recorder, metrics)
        self.app = Starlette(routes=operators.routes())

    async def _control(self, order: Callable[[int], Message]) -> dict[str, KVControlled | None]:
        self.orders.append(order(1))
        return self.answer()

    def post(self, path: str, body: Any = None, key: str = "", host: str = "127.0.0.1") -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with TestClient(self.app, client=(host, 1)) as client:
            return client.post(path, json=body or {}, headers=headers)


def test_orders_reach_the_workers() -> None:
    world = World()
    assert world.post("/admin/kv/clear").json() == {"blocks": {"decode-0": 7}, "unanswered": []}
    world.post("/admin/kv/clear", {"tenant": "a"})
    world.post("/admin/kv/pin", {"tenant": "a", "prompt": [1, 2, 3], "ttl_s": 5})
    world.post("/admin/kv/unpin", {"prompt": [1, 2, 3]})
    assert world.orders == [
        KVClear(1, None),
        KVClear(1, "a"),
        KVPin(1, "a", [1, 2, 3], 5.0),
        KVUnpin(1, None, [1, 2, 3]),
    ]
    world.answer = lambda: {"decode-0#1": None}
    answer = world.post("/admin/kv/clear")
    assert (answer.status_code, answer.json()["unanswered"]) == (504, ["decode-0"])


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("pin", {"prompt": [1], "ttl_s": -1}, "ttl_s"),
        ("pin", {"prompt": []}, "prompt"),
        ("pin", {"prompt": [1000]}, "token id 1000 is not within 0 … 999"),
        ("pin", {"prompt": "text"}, "this model has no tokenizer"),
        ("pin", {}, "prompt"),
        ("clear", {"tenants": "a"}, "unknown field 'tenants'; did you mean tenant?"),
        ("clear", {"tenant": "a" * 200}, "tenant"),
        ("unpin", {"tenant": 5}, "tenant"),
    ],
)
def test_bad_input_is_told(path: str, body: Any, reason: str) -> None:
    world = World()
    answer = world.post(f"/admin/kv/{path}", body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
    assert not world.orders


def test_what_a_worker_refuses_is_told() -> None:
    world = World()
    world.answer = lambda: {"decode-0#1": KVControlled(1, 0, "fills no block")}
    answer = world.post("/admin/kv/pin", {"prompt": [1]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "fills no block")


@pytest.mark.parametrize(
    "path", ["/admin/kv/clear", "/admin/kv/pin", "/admin/kv/unpin", "/admin/trace/start", "/admin/trace/stop"]
)
def test_who_may_call(path: str) -> None:
    body = {"prompt": [1]} if "pin" in path else {}
    # Without keys: whoever is on this host, and is not a user.
    world = World(api_keys=("user",))
    assert world.post(path, body, host="10.0.0.7").status_code == 401
    assert world.post(path, body, "user").status_code == 401
    assert world.post(path, body, host="::1").status_code != 401
    # With keys: whoever has one.
    world = World(api_keys=("user",), admin_keys=("operator",))
    for key in ("", "user", "operato"):
        assert world.post(path, body, key).status_code == 401
    assert not world.orders
    assert world.post(path, body, "operator", host="10.0.0.7").status_code != 401


def finish(world: World, tokens: list[int], num_output: int, salt: str = "", after_s: float = 1.0) -> None:
    live = LiveRequest(
        "r", tokens, [Child(0, 0)], Sampling(), Stopping(9), -1, salt, Timelines("g", world.clock).open("r")
    )  # fmt: skip
    live.outputs[0].tokens = [1] * num_output
    world.clock.advance(after_s)
    world.recorder.finished(live)


def test_a_recorded_trace_can_be_replayed(tmp_path: Path) -> None:
    world = World()
    finish(world, [1], 1)
    assert world.post("/admin/trace/stop").status_code == 409
    assert world.post("/admin/trace/start", {"max_requests": 3}).status_code == 200
    assert world.post("/admin/trace/start").status_code == 409
    shared = [n % 100 for n in range(1024)]
    finish(world, [*shared, 7], 5, after_s=2.0)
    finish(world, [*shared, 8, 9], 3)
    finish(world, shared, 1, salt="another tenant")
    finish(world, [1], 1)  # one too many
    answer = world.post("/admin/trace/stop")
    (tmp_path / "trace.jsonl").write_bytes(answer.content)
    trace = read_trace(tmp_path / "trace.jsonl")
    assert [(r.timestamp, r.input_length, r.output_length) for r in trace.requests] == [
        (0.0, 1025, 5), (2000.0, 1026, 3), (3000.0, 1024, 1),
    ]  # fmt: skip
    assert [r.hash_ids for r in trace.requests] == [(0, 1, 2), (0, 1, 3), (4, 5)]
    assert trace.without_limit() == (1024, 2)
    # Nothing is left of it.
    world.post("/admin/trace/start")
    assert world.post("/admin/trace/stop").content == b""
