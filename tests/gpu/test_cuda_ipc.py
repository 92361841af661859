"""The transport between GPUs with its two ends in two processes: on one GPU, on two, and on two of which each process
sees one. Where there is no GPU, the host's memory and Triton's interpreter take its part.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch
from conformance.test_transports import (
    PEER,
    SIZE,
    Ends,
    Kit,
    runs,
    scattered,
    test_a_descriptor_of_something_else_is_refused,
    test_a_read_sees_what_the_owner_wrote_before_it,
    test_a_removed_peer_fails_its_reads_once,
    test_an_empty_read_ends,
    test_an_owner_that_goes_away_never_blocks_the_reader,
    test_bytes_arrive_where_they_belong_and_nowhere_else,
    test_cancelled_reads_write_no_more,
    test_cancelling_what_has_ended_is_harmless,
    test_closing_with_reads_under_way,
    test_large_reads,
    test_reads_that_overlap_in_time,
    test_unknown_regions_and_peers_are_errors,
    test_what_lies_outside_is_an_error_and_harms_nothing,
)
from support import host_as_gpu
from support.gpu_memory import OwnerProcess, SeenBuffer, prepare
from support.owners import GPUS, PLACES, ProcessKit, start
from tandem.core.errors import TransferError
from tandem.kernels import gather, on_gpu
from tandem.kv_transfer.layout import Runs
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport

__all__ = [
    "test_a_descriptor_of_something_else_is_refused",
    "test_a_read_sees_what_the_owner_wrote_before_it",
    "test_a_removed_peer_fails_its_reads_once",
    "test_an_empty_read_ends",
    "test_an_owner_that_goes_away_never_blocks_the_reader",
    "test_bytes_arrive_where_they_belong_and_nowhere_else",
    "test_cancelled_reads_write_no_more",
    "test_cancelling_what_has_ended_is_harmless",
    "test_closing_with_reads_under_way",
    "test_large_reads",
    "test_reads_that_overlap_in_time",
    "test_unknown_regions_and_peers_are_errors",
    "test_what_lies_outside_is_an_error_and_harms_nothing",
]

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")


@pytest.fixture(scope="module", params=PLACES)
def process(request: pytest.FixtureRequest) -> Iterator[OwnerProcess]:
    process = start(request.param, "cuda_ipc")
    yield process
    process.kill()


@pytest.fixture
def kit(process: OwnerProcess) -> Iterator[Kit]:
    kit = ProcessKit(process)
    yield kit
    kit.close()


@pytest.mark.parametrize("place", PLACES)
def test_what_a_dead_owner_left_can_still_be_read(place: str) -> None:
    """A mapping outlives its owner: reads in flight, and later ones, end well."""
    process = start(place, "cuda_ipc")
    kit = ProcessKit(process)
    ends = Ends(kit)
    kit._closers.remove(ends.owner.forget)
    first = [ends.read(runs((0, 0, SIZE))) for _ in range(5)]
    want = ends.source.get()
    process.kill()
    later = ends.read(runs((0, 0, SIZE)))
    assert {result.error for result in ends.wait(*first, later).values()} == {""}
    np.testing.assert_array_equal(ends.target.array.get(), want)
    ends.reader.remove_peer(PEER)
    number = ends.read(runs((0, 0, 8)))
    assert "gone" in ends.wait(number)[number].error
    kit.close()


@pytest.mark.parametrize(
    ("source_dtype", "target_dtype"),
    [("float32", "float16"), ("float16", "float32"), ("bfloat16", "fp8_e4m3"), ("bfloat16", "float16")],
)
def test_elements_change_type_on_the_way(kit: Kit, source_dtype: str, target_dtype: str) -> None:
    if not GPUS and {"bfloat16", "fp8_e4m3"} & {source_dtype, target_dtype}:
        pytest.skip("Triton's interpreter converts this wrongly")
    ends = Ends(kit)
    numbers = torch.randn(SIZE // 4).to(gather.DTYPES[source_dtype])
    content = numbers.view(torch.uint8).numpy()
    ends.source.array[: len(content)] = content
    plan = scattered(np.random.default_rng(3), 8, 4096, len(content))
    factor = gather.DTYPES[target_dtype].itemsize / numbers.itemsize
    plan = Runs(plan.source_offsets, (plan.target_offsets * factor).astype(np.int64), plan.sizes)
    want = torch.zeros(SIZE, dtype=torch.uint8)
    gather.reference(torch.from_numpy(content), want, *plan, source_dtype, target_dtype)
    number = ends.reader.submit(Read(PEER, "blocks", "landing", plan, source_dtype, target_dtype))
    assert ends.wait(number)[number].error == ""
    np.testing.assert_array_equal(ends.target.array.get(), want.numpy())
    odd = Runs(*(np.array([value], np.int64) for value in (1, 0, 8)))
    for read in (
        Read(PEER, "blocks", "landing", odd, source_dtype, target_dtype),
        Read(PEER, "blocks", "landing", plan, source_dtype, "int4"),
    ):
        number = ends.reader.submit(read)
        assert ends.wait(number)[number].error != ""


def test_the_hosts_regions_travel_too() -> None:
    """As generations do, in both directions, beside the GPU's; a GPU's bytes do not go to the host's memory."""
    kit = Kit("cuda_ipc")
    news = threading.Event()
    owner, _ = kit.owner(SIZE)
    numbers = Buffer(80)
    numbers.array.view(np.uint64)[:] = np.arange(10)
    owner.register(Region("generations", numbers))
    reader, fence, landing = kit.make(news.set), Buffer(80), SeenBuffer(SIZE)
    reader.register(Region("fence", fence))
    reader.register(Region("landing", landing))
    reader.add_peer(PEER, owner.descriptor())
    number = reader.submit(Read(PEER, "generations", "fence", runs((16, 8, 24))))
    assert news.is_set()
    assert [(result.number, result.error) for result in reader.poll()] == [(number, "")]
    assert fence.array.view(np.uint64)[:5].tolist() == [0, 2, 3, 4, 0]
    for wrong in (("blocks", "fence"), ("generations", "landing")):
        number = reader.submit(Read(PEER, *wrong, runs((0, 0, 8))))
        assert [result.error != "" for result in reader.poll()] == [True]
    kit.close()


def test_who_cannot_be_read_is_refused_with_the_reason() -> None:
    kit = Kit("cuda_ipc")
    owner, _ = kit.owner(SIZE)
    reader = kit.make()
    told = msgspec.msgpack.decode(owner.descriptor())
    region = told["device_regions"]["blocks"]
    for change, reason in (
        ({"host": "another"}, "on another host"),
        ({"process": "another", "region": {"handle": b"\1" * 64}}, "cannot be opened: cudaIpcOpenMemHandle"),
        (
            {"process": "another", "region": {"uuid": "x", "handle": b"\1" * 64}},
            "GPU x, which this process does not see,",
        ),
        ({"process": "another", "region": {"handle": b"short"}}, "cannot be opened"),
        ({"region": {"address": 4096}}, "memory is gone"),
    ):
        regions = {"blocks": region | change.pop("region", {})}
        with pytest.raises(TransferError, match=reason):
            reader.add_peer(PEER, msgspec.msgpack.encode(told | change | {"device_regions": regions}))
    for nonsense in (b"", b"\xc1", owner.descriptor()[:-3]):
        with pytest.raises(TransferError, match="describes no GPU memory"):
            reader.add_peer(PEER, nonsense)
    kit.close()


@pytest.mark.skipif(GPUS > 0, reason="copies are slowed down in the stand-in for a GPU")
def test_copies_in_flight_hold_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's memory stays mapped until the last copy out of it has ended, in whatever order things happen; cancelled
    copies drain; the waiter tells of each end."""
    monkeypatch.setattr(host_as_gpu.CopyQueue, "delay_s", 0.1)
    process = start("one GPU", "cuda_ipc")
    kit = ProcessKit(process)
    before = len(host_as_gpu.mapped)
    try:
        ends = Ends(kit)
        first, second = ends.read(runs((0, 0, 4096))), ends.read(runs((0, 4096, 4096)))
        assert ends.reader.poll() == []
        assert ends.reader.cancel([first]) == {first}
        ends.reader.remove_peer(PEER)
        assert len(host_as_gpu.mapped) == before + 1
        results = ends.wait(first, second)
        assert (results[first].error, results[second].error) == ("cancelled", f"{PEER} is gone")
        assert len(host_as_gpu.mapped) == before
        ends.reader.add_peer(PEER, ends.owner.descriptor())
        number = ends.read(runs((0, 0, 4096)))
        started_s = time.monotonic()
        assert ends.news.wait(5)
        assert time.monotonic() - started_s > 0.05
        assert ends.reader.cancel([number]) == set(), "it had ended"
        assert ends.reader.poll() == []
        ends.read(runs((0, 0, 4096)))
        ends.reader.close()
        assert len(host_as_gpu.mapped) == before
    finally:
        kit.close()
        process.kill()


def test_a_reader_in_the_same_process_keeps_the_memory() -> None:
    prepare()
    owner, reader = CudaIpcTransport(lambda: None, 0, 4), CudaIpcTransport(lambda: None, 0, 4)
    source, target = SeenBuffer(4096), SeenBuffer(4096)
    source.array[:] = 5
    owner.register(Region("blocks", source))
    reader.register(Region("landing", target))
    descriptor = owner.descriptor()
    reader.add_peer(PEER, descriptor)
    del source.array
    source.close()
    owner.close()
    number = reader.submit(Read(PEER, "blocks", "landing", runs((0, 0, 4096))))
    while not (results := reader.poll()):
        time.sleep(0.001)
    assert results == [(number, "")]
    assert (target.array == 5).all()
    reader.remove_peer(PEER)
    with pytest.raises(TransferError, match="gone"):
        reader.add_peer(PEER, descriptor)
    reader.close()
