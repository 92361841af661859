"""What counts as RDMA, and what becomes of a fall-back to TCP where RDMA is required."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.pair import Pair
from tandem.cluster import controller as controller_module
from tandem.cluster.controller import Controller, Handle
from tandem.core.clock import ManualClock
from tandem.core.config import Config
from tandem.core.errors import ConfigError, WorkerError
from tandem.core.messages import Member, Membership, Report, decode, encode
from tandem.kv_transfer.rdma import RdmaPort, rdma_devices, rule_out_tcp
from tandem.kv_transfer.transports.inproc import InprocTransport

ACTIVE = RdmaPort("mlx5_0", "1", "ACTIVE", "InfiniBand", 400.0)
NO_REFUSAL: dict[str, str] = {}
DOWN = RdmaPort("mlx5_1", "1", "DOWN", "Ethernet", 100.0)


def make_port(root: Path, device: str, state: str, rate: str, link_layer: str) -> None:
    folder = root / device / "ports" / "1"
    folder.mkdir(parents=True)
    for name, text in (("state", state), ("rate", rate), ("link_layer", link_layer)):
        (folder / name).write_text(text + "\n")


def test_ports_are_read_from_the_kernel(tmp_path: Path) -> None:
    make_port(tmp_path, "mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand")
    make_port(tmp_path, "mlx5_1", "1: DOWN", "100 Gb/sec (4X EDR)", "Ethernet")
    make_port(tmp_path, "rxe0", "4: ACTIVE", "2.5 Gb/sec (1X SDR)", "Ethernet")
    assert rdma_devices(tmp_path) == [ACTIVE, DOWN, RdmaPort("rxe0", "1", "ACTIVE", "Ethernet", 2.5)]
    assert [port.active for port in rdma_devices(tmp_path)] == [True, False, True]


def test_a_host_without_devices_and_half_a_device(tmp_path: Path) -> None:
    assert rdma_devices(tmp_path / "nowhere") == []
    (tmp_path / "odd" / "ports" / "1").mkdir(parents=True)
    assert rdma_devices(tmp_path) == [RdmaPort("odd", "1", "", "", 0.0)]
    assert not rdma_devices(tmp_path)[0].active


@pytest.mark.parametrize(
    ("ports", "kept"),
    [([ACTIVE, DOWN], {"shm", "cuda_ipc", "nixl", "ucx"}), ([DOWN], {"shm", "cuda_ipc"}), ([], {"shm", "cuda_ipc"})],
)
def test_plain_tcp_is_ruled_out_and_says_why(ports: list[RdmaPort], kept: set[str]) -> None:
    offered = {name: InprocTransport(lambda: None) for name in ("shm", "cuda_ipc", "nixl", "ucx", "zmq", "new")}
    left, reasons = rule_out_tcp(offered, {"other": "not installed"}, ports)
    assert set(left) == kept
    assert set(reasons) == {"other", *offered} - kept
    assert reasons["other"] == "not installed"
    assert reasons["zmq"] == "it would move KV by plain TCP, which kv.require_rdma rules out"
    if ports == [DOWN]:
        assert reasons["ucx"].startswith("no active RDMA port here (mlx5_1/1 is DOWN), so it would")
    if not ports:
        assert "(/sys/class/infiniband has none)" in reasons["nixl"]
    for transport in left.values():
        transport.close()


# ---- at the start ---------------------------------------------------------------------------------------------------


class Process:
    """A process that reports what the test says; it and all others tell who has ended his trial."""

    def __init__(self, peer: str, role: str, report: Report, trial: dict[str, str] | None, ended: set[bytes]) -> None:
        self.peer, self.role, self.load, self.trial, self.ended = peer, role, report, trial, ended
        self.serves = asyncio.Event()
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def ready(self) -> Member:
        await self.serves.wait()
        return Member(self.peer, self.role, "node", "tcp://127.0.0.1:1")

    async def link_offer(self) -> bytes:
        return self.peer.encode()

    async def link_refusals(self, offers: list[bytes]) -> list[str]:
        if self.trial is None:
            raise WorkerError("died")
        await asyncio.sleep(0)  # as one that starts later
        return ["its end has gone" if offer in self.ended else self.trial.get(offer.decode(), "") for offer in offers]

    async def end_trial(self) -> None:
        self.ended.add(self.peer.encode())

    async def gone(self) -> str:
        return await asyncio.shield(self.death)

    async def follow(self, membership: Membership) -> None:
        pass

    async def report(self) -> Report | None:
        return self.load

    async def stop(self, grace_s: float) -> None:
        if not self.death.done():
            self.death.set_result("stopped")


class Launched:
    def __init__(self, decode_report: Report, trial: dict[str, str] | None, loads_for_ever: bool) -> None:
        self.processes: list[Process] = []
        self.ended: set[bytes] = set()
        self._report = decode_report
        self._trial = trial
        self._loads_for_ever = loads_for_ever

    def launch(self, peer: str, role: str, on_phase: object) -> Handle:
        report = self._report if role == "decode" else Report(0, 0, 0, 0, 0)
        self.processes.append(Process(peer, role, report, self._trial, self.ended))
        if not self._loads_for_ever:
            self.processes[-1].serves.set()
        return self.processes[-1]


def start(
    report: Report, trial: dict[str, str] | None = NO_REFUSAL, *, require: bool = True, loads_for_ever: bool = False
) -> Launched:
    """Start a controller over such decode workers, and stop it."""

    async def run() -> Launched:
        launched = Launched(report, trial, loads_for_ever)
        config = Config.model_validate({"kv": {"require_rdma": require}, "pools": {"prefill": {"replicas": 2}}})
        controller = Controller(config, launched, ManualClock())
        try:
            await controller.start()
        finally:
            await controller.stop(0)
            assert all(process.death.done() for process in launched.processes)
        return launched

    return asyncio.run(run())


def test_a_refused_pair_ends_the_start() -> None:
    refused = Report(
        0, 0, 0, 0, 0, peers=["prefill-1#1"], refused={"prefill-0#1": "zmq: it would move KV by plain TCP"}
    )
    with pytest.raises(ConfigError, match="decode-0#1 cannot read KV from prefill-0#1: zmq: it would") as caught:
        start(refused)
    assert "leave kv.require_rdma out" in caught.value.fix
    start(refused, require=False)


def test_it_ends_before_the_models_are_read() -> None:
    with pytest.raises(ConfigError, match="decode-0#1 cannot read KV from prefill-1#1: shm: another host"):
        start(Report(0, 0, 0, 0, 0), {"prefill-1#1": "shm: another host"}, loads_for_ever=True)


def test_pairs_that_came_to_terms_serve() -> None:
    both = Report(0, 0, 0, 0, 0, peers=["prefill-0#1", "prefill-1#1"])
    assert start(both).ended == {b"prefill-0#1", b"prefill-1#1", b"decode-0#1"}, "who serves first waits for the last"
    start(both, None)  # a trial that failed is not the last word


def test_a_pair_that_never_shakes_hands_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "_LINKS_TIMEOUT_S", 0.3)
    with pytest.raises(WorkerError, match=r"no handshake within 0\.3 s: decode-0#1 ← prefill-1#1"):
        start(Report(0, 0, 0, 0, 0, peers=["prefill-0#1"]))


# ---- later ----------------------------------------------------------------------------------------------------------


def test_a_peer_that_joins_later_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    pair = Pair(
        Config.model_validate(
            {
                "model": {"path": str(tmp_path), "max_model_len": 256},
                "kv": {"block_tokens": 8, "capacity": "4MiB"},
                "routing": {"local_prefill": "never"},
            }
        )
    )
    newcomer = pair.add("prefill-1#1", "prefill")
    # It offers nothing that is allowed.
    newcomer.connector._ends[0] = newcomer.connector._ends[0]._replace(transports={})
    why = {"zmq": "it would move KV by plain TCP, which kv.require_rdma rules out"}
    pair.decode.connector._ends[0] = pair.decode.connector._ends[0]._replace(missing=why)
    pair.announce()
    outputs = pair.generate([list(range(1, 40))], max_tokens=5)
    assert len(outputs[0]) == 5
    report = pair.decode.worker.report()
    assert report.peers == ["prefill-0#1"]
    assert "zmq: it would move KV by plain TCP, which kv.require_rdma rules out" in report.refused["prefill-1#1"]
    assert decode(encode(report)) == report
    assert pair.decode.metrics.load_failures.labels("refused")._value.get() == 1
    wanted = pair.submit(list(range(1, 60)), prefill="prefill-1#1")
    pair.run()
    assert len(pair.outputs[wanted].tokens[0]) == 8, "who asks for it is served by another"
    assert newcomer.worker.report().prompt_tokens == 0
    pair.remove("prefill-1#1")
    pair.run()
    assert pair.decode.worker.report().refused == {}
    pair.close()
