"""What the doctor says of GPUs: reads between the places of two workers, each a process that sees one GPU; both on one
GPU, and on two. Where there is no GPU, an end reads from another over the host's memory, which takes a GPU's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from support.gpu_memory import prepare
from support.places import Place
from support.transports import missing
from tandem.cluster.doctor.finding import Verdict
from tandem.cluster.doctor.gpus import look_at_gpus
from tandem.cluster.doctor.links import judge_link
from tandem.cluster.doctor.probe import LinkReport
from tandem.core.config import Config, KVConfig
from tandem.core.wire import make_cluster_keys
from tandem.kernels import on_gpu
from tandem.kv_transfer import trial
from tandem.kv_transfer.memory import DeviceBuffer
from tandem.kv_transfer.trial import BLOCK_BYTES, Offer, TrialEnd

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

GPUS = torch.cuda.device_count()
KEYS = make_cluster_keys()
PROBE_BYTES = 256 << 20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is here, or the host."""
    prepare()
    if not GPUS:
        monkeypatch.setattr(DeviceBuffer, "tensor", lambda self: torch.from_numpy(self.memory.array))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setitem(trial._ROUNDS, "cuda", 2)


def test_reads_between_gpus_memories_are_measured_and_checked(gpu: None) -> None:
    size = 16 * BLOCK_BYTES
    owner, reader = (TrialEnd(peer, KEYS, "127.0.0.1", KVConfig(), size, "cuda") for peer in ("prefill-0", "decode-0"))
    try:
        offer = msgspec.msgpack.decode(msgspec.msgpack.encode(owner.offer()), type=Offer)
        assert owner.gpu == reader.gpu != ""
        why = reader.connect(offer)
        assert why["cuda_ipc"] == ""
        assert "does not move KV in cuda memory" in why["shm"]
        rate = reader.measure(offer, "cuda_ipc", 30.0)
        assert (rate.error, rate.num_bytes) == ("", size * trial._ROUNDS["cuda"])
        owner._blocks[3, 7] = 77
        owner._settle()
        assert reader.measure(offer, "cuda_ipc", 30.0).error == "1 of 16 blocks are wrong"
        assert reader.memory_rate().bytes_per_s > 0
    finally:
        reader.close()
        owner.close()


@pytest.fixture
def places() -> Iterator[Callable[..., list[Place]]]:
    made: list[Place] = []

    def make(devices: tuple[int, int], transport: str) -> list[Place]:
        pool = {"gpus_per_replica": 1}
        kv = {"transport": transport}
        config = Config.model_validate({"pools": {"prefill": pool, "decode": pool}, "kv": kv}).model_dump_json()
        made.extend(
            Place(peer, device, config, KEYS) for peer, device in zip(("prefill-0", "decode-0"), devices, strict=True)
        )
        return made

    yield make
    for place in made:
        place.close()


@pytest.mark.parametrize("transport", ["auto", "nixl"])
@pytest.mark.parametrize("devices", [(0, 0), (1, 0)], ids=["one GPU", "two GPUs"])
def test_two_places_on_gpus(places: Callable[..., list[Place]], devices: tuple[int, int], transport: str) -> None:
    """Every byte is right, and between two GPUs of one host cuda_ipc gets half of the line and more."""
    if max(devices) >= GPUS:
        pytest.skip(f"{GPUS} CUDA devices are here, and this needs {max(devices) + 1}")
    if transport == "nixl" and missing("nixl"):
        pytest.skip(missing("nixl"))
    owner, reader = places(devices, transport)
    offer = owner.ask("open", PROBE_BYTES, 1)
    reader.ask("open", PROBE_BYTES, 1)
    report = msgspec.msgpack.decode(
        reader.ask("measure", offer, owner.ask("send_tcp", 1 << 20), 5.0), type=LinkReport
    )  # fmt: skip
    rows = judge_link("decode-0 ← prefill-0", KVConfig.model_validate({"transport": transport}), report)
    found = {row.check: row for row in rows}
    for row in rows:
        print(f"{row.verdict:5} {row.check}: {row.measured}; expected {row.expected}; {row.fix}")
    assert report.gpu_link is not None, "nvidia-smi lists both GPUs"
    assert found["cuda_ipc"].verdict is not Verdict.FAIL
    assert "GB/s" in found["cuda_ipc"].measured
    if devices[0] != devices[1]:
        assert found["cuda_ipc"].verdict is Verdict.OK, found["cuda_ipc"]
        assert report.gpu_link.bytes_per_s > 0
    assert found["would be used"].measured.startswith("cuda_ipc" if transport == "auto" else "nixl")
    if transport == "nixl":
        assert found["nixl"].verdict is not Verdict.FAIL, found["nixl"]


@pytest.mark.skipif(not GPUS, reason="this needs a CUDA device")
def test_each_gpu_and_each_pair_has_a_row() -> None:
    rows = {finding.check: finding for finding in look_at_gpus("here", Config())}
    for number in range(GPUS):
        assert torch.cuda.get_device_name(number) in rows[f"GPU {number}"].measured
        assert "driver" in rows[f"GPU {number}"].measured
        assert "GiB free" in rows[f"GPU {number}"].measured
    assert rows["torch and CUDA"].verdict is Verdict.OK
    if GPUS > 1:
        assert f"of {GPUS * (GPUS - 1)} pairs" in rows["peer access"].measured


@pytest.mark.skipif(GPUS > 0, reason="a CUDA device is here")
def test_a_place_that_sees_no_gpu_says_so(places: Callable[..., list[Place]]) -> None:
    owner, _ = places((0, 0), "auto")
    with pytest.raises(RuntimeError, match="ConfigError: no CUDA device is seen here"):
        owner.ask("open", PROBE_BYTES, 1)
