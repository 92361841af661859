"""What the doctor makes of what it sees: parsing, verdicts, and its look at the machine that this runs on."""

from __future__ import annotations

import msgspec
import pytest
import torch
from tandem.cluster.doctor import gpus, network
from tandem.cluster.doctor.finding import Finding, Notes, Verdict
from tandem.cluster.doctor.gpus import Gpu, GpuLink, nvlink_gb_s, parse_gpus, parse_link, topology_of
from tandem.cluster.doctor.links import judge_link
from tandem.cluster.doctor.network import interface_of, ucx_transports
from tandem.cluster.doctor.probe import LinkReport, Measured, PlaceOffer, Probe
from tandem.cluster.doctor.tcp import TcpPlace, TcpSender, receive
from tandem.core.config import Config, KVConfig
from tandem.core.errors import ConfigError
from tandem.core.wire import make_cluster_keys
from tandem.kv_transfer.rdma import RdmaPort
from tandem.kv_transfer.trial import Rate

GB = 10**9
TCP_ONLY = "it would move KV by plain TCP, which kv.require_rdma rules out"


def measured(name: str, gb_s: float = 0.0, refused: str = "", error: str = "", ruled_out: str = "") -> Measured:
    return Measured(name, refused, Rate(0 if error else int(gb_s * GB), 1.0, error), ruled_out)


def judge(
    *transports: Measured,
    gpu_link: GpuLink | None = None,
    rdma_gb_s: float = 0.0,
    interface_gb_s: float = 0.0,
    **kv: object,
) -> dict[str, Finding]:
    report = LinkReport(
        list(transports), Rate(10 * GB, 1.0), Rate(3 * GB, 1.0), 8 * rdma_gb_s * GB, 8 * interface_gb_s * GB, gpu_link
    )
    found = judge_link("decode-0 ← prefill-0", KVConfig.model_validate(kv), report)
    assert all(finding.fix for finding in found if finding.verdict is not Verdict.OK), "every complaint has a fix"
    return {finding.check: finding for finding in found}


# ---- links ----------------------------------------------------------------------------------------------------------


def test_each_transport_stands_beside_its_line() -> None:
    rows = judge(measured("shm", 8), measured("nixl", 6), measured("zmq", 0.4), rdma_gb_s=50)
    assert rows["shm"].verdict is Verdict.OK
    assert "8.00 GB/s, 80% of copying in memory at 10.00 GB/s" in rows["shm"].measured
    assert "60% of copying in memory" in rows["nixl"].measured, "on one host it is memory too"
    assert rows["would be used"].measured == "shm"
    far = measured("shm", refused="another host")
    rows = judge(far, measured("nixl", 40), measured("ucx", 2), measured("zmq", 0.4), rdma_gb_s=50, interface_gb_s=1.25)
    assert rows["nixl"].verdict is Verdict.OK
    assert "80% of the RDMA port at 50.00 GB/s" in rows["nixl"].measured
    assert rows["ucx"].verdict is Verdict.WARN
    assert "4% of the RDMA port" in rows["ucx"].measured
    assert "32% of the interface at 1.25 GB/s" in rows["zmq"].measured
    assert rows["zmq"].verdict is Verdict.OK, "encryption is the limit"
    assert rows["would be used"].measured == "nixl (shm: another host)"


def test_without_an_rdma_port_the_line_is_tcp() -> None:
    rows = judge(measured("shm", refused="another host"), measured("ucx", 1), measured("zmq", 0.1))
    assert "33% of plain TCP at 3.00 GB/s" in rows["ucx"].measured
    assert rows["zmq"].verdict is Verdict.WARN


def test_why_the_others_were_refused() -> None:
    rows = judge(measured("shm", refused="the peer is on another host"), measured("zmq", 0.4))
    assert rows["shm"].verdict is Verdict.OK, "nothing is wrong with two hosts"
    assert rows["would be used"].measured == "zmq (shm: the peer is on another host)"


def test_what_the_configuration_asks_for_must_work() -> None:
    rows = judge(measured("shm", refused="another host"), measured("zmq", 0.4), transport="shm")
    assert rows["would be used"].verdict is Verdict.FAIL
    assert "nothing works: shm: another host" in rows["would be used"].measured
    assert judge(measured("shm", 5), measured("zmq", 0.4), transport="zmq")["would be used"].measured == "zmq"
    assert judge(measured("shm", 5), transport="zmq")["would be used"].verdict is Verdict.FAIL


def test_require_rdma_is_judged_as_the_workers_would() -> None:
    far = measured("shm", refused="another host"), measured("zmq", 0.4, ruled_out=TCP_ONLY)
    rows = judge(*far, require_rdma=True)
    assert rows["would be used"].verdict is Verdict.FAIL
    assert TCP_ONLY in rows["would be used"].measured
    assert "leave kv.require_rdma out" in rows["would be used"].fix
    assert judge(*far)["would be used"].measured.startswith("zmq")
    assert judge(measured("shm", 5), far[1], require_rdma=True)["would be used"].measured == "shm"


def test_wrong_bytes_fail() -> None:
    rows = judge(measured("shm", error="2 of 64 blocks are wrong"), measured("zmq", 0.4))
    assert rows["shm"].verdict is Verdict.FAIL
    assert rows["would be used"].measured == "zmq (shm: 2 of 64 blocks are wrong)"


# ---- what tools print -----------------------------------------------------------------------------------------------


def test_nvidia_smi_is_read() -> None:
    text = (
        "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 81004, 9.0\n1, Tesla T4, 570.86.15, 15360, 300, 7.5\nodd line\n\n"
    )
    assert parse_gpus(text) == [
        Gpu(0, "NVIDIA H100 80GB HBM3", "570.86.15", 81559, 81004, (9, 0)), Gpu(1, "Tesla T4", "570.86.15", 15360, 300, (7, 5)),
    ]  # fmt: skip
    assert parse_gpus("NVIDIA-SMI has failed") == []


def test_nvlink_rates_are_added_up() -> None:
    text = (
        "GPU 0: NVIDIA H200 (UUID: GPU-1)\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n"
        "GPU 1: NVIDIA H200 (UUID: GPU-2)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"
    )
    assert nvlink_gb_s(text) == {0: pytest.approx(53.124), 1: pytest.approx(26.562)}
    assert nvlink_gb_s("") == {}


TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\nGPU0\t X \tNV18\tPHB\tNODE\t0-63\t0\n"
    "GPU1\tNV18\t X \tSYS\tSYS\t64-127\t1\nGPU2\tPHB\tSYS\t X \tSYS\t0-63\t0\nNIC0\tNODE\tSYS\tSYS\t X \n\n"
    "Legend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)


def test_what_lies_between_two_gpus_is_told() -> None:
    assert topology_of(TOPOLOGY)[0, 1] == "NV18"
    assert topology_of(TOPOLOGY)[2, 1] == "SYS"
    assert topology_of("") == topology_of("nvidia-smi has failed") == {}
    seen = "0, GPU-aa, 5, 16\n1, GPU-bb, 5, 16\n2, GPU-cc, 4, 8\n3, GPU-dd, [N/A], [N/A]\nodd line\n"
    nvlinks = "GPU 0: NVIDIA H200\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n"
    link = parse_link("aa", "GPU-bb", seen, TOPOLOGY, nvlinks)
    assert link == GpuLink("18 NVLinks", pytest.approx(18 * 26.562e9))
    assert parse_link("aa", "cc", seen, TOPOLOGY, "") == GpuLink("PCIe (PHB)", pytest.approx(8 * 1.969e9))
    assert parse_link("aa", "bb", seen, "", "") == GpuLink("PCIe", pytest.approx(16 * 3.938e9))
    assert parse_link("aa", "bb", seen, TOPOLOGY, "") == GpuLink("18 NVLinks", 0.0)
    assert parse_link("bb", "bb", seen, TOPOLOGY, nvlinks) == GpuLink("the memory of one GPU", 0.0)
    assert parse_link("aa", "dd", seen, TOPOLOGY, nvlinks) == GpuLink("PCIe", 0.0)
    assert parse_link("aa", "elsewhere", seen, TOPOLOGY, nvlinks) is None


def test_gpus_stand_beside_the_line_between_them() -> None:
    nvlink = GpuLink("18 NVLinks", 478 * GB)
    rows = judge(measured("cuda_ipc", 370), measured("nixl", 90), gpu_link=nvlink)
    assert rows["cuda_ipc"].verdict is Verdict.OK
    assert "370.00 GB/s, 77% of 18 NVLinks at 478.00 GB/s" in rows["cuda_ipc"].measured
    assert rows["nixl"].verdict is Verdict.OK, "nobody asked for it"
    assert "90.00 GB/s, 19% of 18 NVLinks" in rows["nixl"].measured
    assert rows["would be used"].measured.startswith("cuda_ipc")
    slow = judge(measured("cuda_ipc", 100), measured("nixl", 90), gpu_link=nvlink)["cuda_ipc"]
    assert slow.verdict is Verdict.WARN
    assert "nvlink --status" in slow.fix
    asked = judge(measured("nixl", 90), gpu_link=nvlink, transport="nixl")["nixl"]
    assert asked.verdict is Verdict.WARN
    assert "auto takes cuda_ipc" in asked.fix
    unknown = judge(measured("cuda_ipc", 20), gpu_link=GpuLink("PCIe", 0.0))["cuda_ipc"]
    assert unknown.verdict is Verdict.OK
    assert "20.00 GB/s, over PCIe" in unknown.measured


def test_a_place_without_its_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    config = Config.model_validate({"pools": {"prefill": {"gpus_per_replica": 1}, "decode": {"gpus_per_replica": 1}}})
    probe = Probe("decode-0", config.model_dump_json(), msgspec.msgpack.encode(make_cluster_keys()), "127.0.0.1")
    with pytest.raises(ConfigError, match="no CUDA device"):
        probe.open(1 << 20, 1)
    probe.close()


def test_ucx_info_is_read() -> None:
    text = "#      Transport: self\n#         Device: memory\n#      Transport: rc_mlx5\n#\n#      Transport: rc_mlx5\n"
    assert ucx_transports(text) == ["self", "rc_mlx5"]


def test_gpus_that_are_busy_or_old_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*arguments: str) -> str:
        if arguments[0] == "nvlink":
            return "GPU 0: a\n\t Link 0: 25 GB/s\n\t Link 1: 25 GB/s\nGPU 1: b\n\t Link 0: 25 GB/s\n"
        return "0, NVIDIA H200, 570, 143771, 143000, 9.0\n1, NVIDIA H200, 570, 143771, 20000, 9.0\n2, Tesla T4, 570, 15360, 15000, 7.5\n"

    monkeypatch.setattr(gpus, "_nvidia_smi", say)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = {finding.check: finding for finding in gpus.look_at_gpus("n", Config())}
    assert rows["GPU 0"].verdict is Verdict.OK
    assert "139.6 of 140.4 GiB free" in rows["GPU 0"].measured
    assert rows["GPU 1"].verdict is rows["GPU 2"].verdict is Verdict.WARN
    assert rows["GPU 2"].expected == "compute capability ≥ 8.0"
    assert rows["NVLink"].verdict is Verdict.WARN
    assert "links of GPU [1] are down" in rows["NVLink"].fix
    assert rows["torch and CUDA"].verdict is Verdict.WARN


def test_rdma_ports_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_ucx_info", lambda: "# Transport: tcp\n")
    ports = [RdmaPort("mlx5_0", "1", "ACTIVE", "InfiniBand", 400.0), RdmaPort("mlx5_1", "1", "DOWN", "Ethernet", 100.0)]
    rows = {finding.check: finding for finding in network.look_at_network("n", "127.0.0.1", Config(), ports)}
    assert rows["RDMA mlx5_0/1"].verdict is Verdict.OK
    assert rows["RDMA mlx5_0/1"].measured == "ACTIVE, InfiniBand, 400 Gbit/s"
    assert rows["RDMA mlx5_1/1"].verdict is Verdict.WARN
    assert rows["UCX"].verdict is Verdict.WARN, "UCX sees no RDMA, and there is a port"
    monkeypatch.setattr(network, "_ucx_info", lambda: "# Transport: tcp\n# Transport: rc_verbs\n")
    rows = {finding.check: finding for finding in network.look_at_network("n", "203.0.113.9", Config(), ports)}
    assert rows["UCX"].verdict is Verdict.OK
    assert rows["address"].verdict is Verdict.FAIL, "workers cannot listen on an address of another host"


# ---- this machine ---------------------------------------------------------------------------------------------------


def test_two_places_of_this_machine() -> None:
    keys = msgspec.msgpack.encode(make_cluster_keys())
    config = Config.model_validate({"kv": {"transport": "zmq"}})
    owner, reader = (Probe(peer, config.model_dump_json(), keys, "127.0.0.1") for peer in ("prefill-0", "decode-0"))
    try:
        offer = owner.open(4 << 20, 1)
        assert msgspec.msgpack.decode(offer, type=PlaceOffer).trial.num_bytes == 4 << 20
        reader.open(4 << 20, 1)
        report = msgspec.msgpack.decode(reader.measure(offer, owner.send_tcp(4 << 20), 5.0), type=LinkReport)
        rates = {m.transport: m.rate for m in report.transports if not m.refused}
        assert {"shm", "zmq"} <= rates.keys(), "all are measured, whatever the configuration chooses"
        assert all(rate.error == "" and rate.num_bytes == 4 << 20 for rate in rates.values())
        assert report.tcp.num_bytes == 4 << 20
        assert {m.transport for m in report.transports if m.ruled_out} >= {"zmq"}
        rows = judge_link("x", config.kv, report)
        assert rows[-1].measured == "zmq"
    finally:
        owner.close()
        reader.close()
        reader.close()


def test_the_host_that_this_runs_on() -> None:
    config = Config()
    probe = Probe("here", config.model_dump_json(), msgspec.msgpack.encode(make_cluster_keys()), "127.0.0.1")
    rows = msgspec.msgpack.decode(probe.look(2), type=list[Finding])
    by_check = {row.check: row for row in rows}
    assert {"software", "host", "GPU", "network"} == {row.section for row in rows}
    for check in ("python", "torch", "pyzmq", "shared memory", "/proc/PID/fd", "address", "model", "free memory"):
        assert by_check[check].verdict is Verdict.OK, by_check[check]
    assert abs(probe.wall_s() - probe.wall_s()) < 10


def test_more_kv_than_memory_fails() -> None:
    config = Config.model_validate({"kv": {"capacity": "900TiB"}})
    probe = Probe("here", config.model_dump_json(), msgspec.msgpack.encode(make_cluster_keys()), "127.0.0.1")
    row = next(r for r in msgspec.msgpack.decode(probe.look(2), type=list[Finding]) if r.check == "free memory")
    assert row.verdict is Verdict.FAIL
    assert "900.0 TiB of KV" in row.expected
    assert "lower kv.capacity" in row.fix


def test_a_model_that_is_not_on_the_node_fails() -> None:
    config = Config.model_validate({"model": {"path": "/nowhere"}})
    probe = Probe("here", config.model_dump_json(), msgspec.msgpack.encode(make_cluster_keys()), "127.0.0.1")
    row = next(r for r in msgspec.msgpack.decode(probe.look(1), type=list[Finding]) if r.check == "model")
    assert row.verdict is Verdict.FAIL


def test_plain_tcp_is_for_who_knows_the_token() -> None:
    sender = TcpSender("127.0.0.1", 1 << 20, 5.0)
    wrong = TcpPlace("127.0.0.1", sender.place.port, b"0" * 16)
    assert receive(wrong, 2.0).num_bytes == 0
    assert receive(sender.place, 2.0).error, "one try, and it is gone"
    sender.close()
    sender = TcpSender("127.0.0.1", 3 << 20, 5.0)
    assert receive(sender.place, 5.0).num_bytes == 3 << 20
    sender.close()


def test_interfaces_have_names() -> None:
    assert interface_of("127.0.0.1")[0] == "lo"
    assert interface_of("203.0.113.9") == ("", 0.0)


def test_notes_keep_their_order() -> None:
    notes = Notes("host", "n")
    notes.ok("a", "1")
    notes.judge("b", False, "2", "3", "do", fatal=True)
    notes.judge("c", True, "2", "3", "do", fatal=True)
    notes.warn("d", "4", "5", "do")
    assert [finding.verdict.value for finding in notes.findings] == ["ok", "fail", "ok", "warn"]
    assert notes.findings[2].fix == ""
