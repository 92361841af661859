"""The doctor's round over a cluster, with probes that the test makes answer as it likes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from support.patience import stretched
from tandem.cluster.doctor.examination import Examination
from tandem.cluster.doctor.finding import Finding, Verdict
from tandem.cluster.doctor.probe import LinkReport, Measured
from tandem.cluster.doctor.tcp import TcpPlace
from tandem.cluster.probe_actors import Node
from tandem.core.config import Config
from tandem.core.errors import WorkerError
from tandem.kv_transfer.trial import Rate

NODES = [Node("aaaaaaaaaa", "10.0.0.1", 8, 0), Node("bbbbbbbbbb", "10.0.0.2", 8, 2)]
REPORT = LinkReport(
    [Measured("shm", "", Rate(10**9, 1.0), ""), Measured("zmq", "", Rate(10**9, 1.0), "")],
    Rate(10**9, 1.0), Rate(10**9, 1.0), 0.0, 0.0,
)  # fmt: skip

Answers = dict[str, Callable[..., Any]]


class Place:
    def __init__(self, peer: str, node_id: str, answers: Answers, calls: list[tuple[str, str]]) -> None:
        self.peer, self._node_id, self._answers, self._calls = peer, node_id, answers, calls

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        assert timeout_s > 0
        self._calls.append((self.peer, method))
        if method in self._answers:
            return self._answers[method](self.peer, *arguments)
        return {
            "node": self._node_id,
            "look": msgspec.msgpack.encode([Finding("software", self.peer, "torch", Verdict.OK, "2.13")]),
            "wall_s": time.time(),
            "open": self.peer.encode(),
            "send_tcp": msgspec.msgpack.encode(TcpPlace("127.0.0.1", 1, b"")),
            "measure": msgspec.msgpack.encode(REPORT),
        }[method]


class Probes:
    """Prefill workers live on the first node, decode workers on the second; ``answers`` overrides methods, and those
    ``without_room`` find none."""

    def __init__(self, without_room: tuple[str, ...] = (), **answers: Callable[..., Any]) -> None:
        self.calls: list[tuple[str, str]] = []
        self._without_room = without_room
        self._answers = answers

    def nodes(self) -> list[Node]:
        return NODES

    def lacking(self) -> str:
        return f"{self._without_room[0]} needs 1 CPU" if self._without_room else ""

    def has_room(self, peer: str) -> bool:
        return peer not in self._without_room

    def on_node(self, peer: str, node_id: str) -> Place:
        return Place(peer, node_id, self._answers, self.calls)

    def as_worker(self, peer: str, role: str) -> Place:
        return Place(peer, NODES[role == "decode"].node_id, self._answers, self.calls)


def examine(
    probes: Probes, pools: dict[str, Any] | None = None, *, running: dict[str, str] | None = None, limit_s: float = 60
) -> list[Finding]:
    config = Config.model_validate({"pools": pools or {}})
    deadline_s = time.monotonic() + limit_s
    found = list(Examination(config, probes, running or {}, deadline_s, lambda _: None).run())  # type: ignore[arg-type]
    assert all(finding.fix for finding in found if finding.verdict is not Verdict.OK)
    return found


def test_every_pair_is_measured_and_one_of_each_pair_of_nodes_first() -> None:
    probes = Probes()
    found = examine(probes, {"prefill": {"replicas": 2}, "decode": {"replicas": 3}})
    assert {f.where for f in found if f.section == "KV links"} == {
        f"decode-{d} ← prefill-{p}" for d in range(3) for p in range(2)
    }
    assert all(finding.verdict is Verdict.OK for finding in found)
    assert sum(method == "look" for _, method in probes.calls) == 2


def test_what_is_left_over_at_the_deadline_is_told() -> None:
    def slow(peer: str, *_: Any) -> bytes:
        time.sleep(0.2)
        return msgspec.msgpack.encode(REPORT)

    start_s = time.monotonic()
    found = examine(Probes(measure=slow), {"decode": {"replicas": 50}}, limit_s=0.5)
    assert time.monotonic() - start_s < stretched(5)
    last = found[-1]
    assert last.verdict is Verdict.WARN
    assert "of 50 measured, then the time was over" in last.measured


def test_a_clock_that_is_off_is_told() -> None:
    found = examine(Probes(wall_s=lambda peer: time.time() + (3.0 if "10.0.0.2" in peer else 0.0)))
    clocks = {finding.check: finding for finding in found if finding.check.startswith("clock")}
    assert clocks["clock of 10.0.0.1"].verdict is Verdict.OK
    assert clocks["clock of 10.0.0.2"].verdict is Verdict.WARN
    assert clocks["clock of 10.0.0.2"].measured.startswith(("+3000", "+2999"))


def test_versions_that_differ_are_told() -> None:
    def look(peer: str, *_: Any) -> bytes:
        version = "2.12" if "10.0.0.2" in peer else "2.13"
        return msgspec.msgpack.encode([Finding("software", peer, "torch", Verdict.OK, version)])

    row = next(f for f in examine(Probes(look=look)) if f.where == "cluster" and f.section == "software")
    assert row.measured == "2.12 and 2.13"
    assert row.verdict is Verdict.WARN


def test_a_place_that_does_not_come_and_a_probe_that_dies_are_told_and_the_rest_goes_on() -> None:
    def node(peer: str) -> str:
        if peer == "decode-1":
            raise WorkerError("decode-1: no answer within 60 s")
        return NODES[0].node_id

    def measure(peer: str, offer: bytes, *_: Any) -> bytes:
        if offer == b"prefill-0":
            raise WorkerError("decode-0 died")
        return msgspec.msgpack.encode(REPORT)

    found = examine(Probes(node=node, measure=measure), {"prefill": {"replicas": 2}, "decode": {"replicas": 2}})
    failed = {finding.check: finding.measured for finding in found if finding.verdict is Verdict.FAIL}
    assert failed == {"place of decode-1": "decode-1: no answer within 60 s", "measurement": "decode-0 died"}
    assert any(f.where == "decode-0 ← prefill-1" and f.check == "would be used" for f in found)


def test_who_finds_no_room_is_told_and_not_waited_for() -> None:
    probes = Probes(without_room=("prefill-1",))
    found = examine(probes, {"prefill": {"replicas": 2}})
    failed = {finding.check: finding.measured for finding in found if finding.verdict is Verdict.FAIL}
    assert failed == {"place of prefill-1": "prefill-1 needs 1 CPU"}
    assert ("prefill-1", "node") not in probes.calls
    assert any(f.where == "decode-0 ← prefill-0" and f.check == "would be used" for f in found)


def test_a_node_without_a_working_tandem_is_told() -> None:
    def look(peer: str, *_: Any) -> bytes:
        raise WorkerError("ModuleNotFoundError: tandem")

    found = examine(Probes(look=look))
    assert sum(f.verdict is Verdict.FAIL and f.check == "probe" for f in found) == 2


def test_beside_a_running_tandem_the_probes_stand_where_its_workers_do() -> None:
    running = {"prefill-0": "10.0.0.2", "decode-0": "10.0.0.2", "prefill-1": "", "gateway-0": "10.0.0.1"}
    found = examine(Probes(), {"prefill": {"replicas": 2}}, running=running)
    checks = {finding.check: finding for finding in found}
    assert checks["place of prefill-0"].measured.startswith("10.0.0.2")
    assert checks["place of prefill-1"].verdict is Verdict.WARN
    assert {f.where for f in found if f.section == "KV links"} == {"decode-0 ← prefill-0"}


def test_colocated_workers_have_no_links() -> None:
    found = examine(Probes(), {"colocated": {"replicas": 2}})
    assert found[-1].measured == "none: colocated workers hand no KV over"
    assert {"place of colocated-0", "place of colocated-1"} <= {finding.check for finding in found}
