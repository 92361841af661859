"""NIXL between GPUs' memories, with its two ends in two processes: on one GPU, on two, and on two of which each process
sees one. Where there is no GPU, the host's memory takes their part; all else is NIXL's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from conformance.test_transports import (
    PEER,
    SIZE,
    Ends,
    Kit,
    runs,
    test_a_peer_that_is_made_again_under_the_same_name,
    test_a_read_of_many_small_runs,
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
from support.gpu_memory import OwnerProcess, RemoteOwner
from support.owners import GPUS, PLACES, ProcessKit, start
from support.transports import missing
from tandem.core.errors import ConfigError
from tandem.core.wire import SecureContext, make_cluster_keys
from tandem.kernels import on_gpu
from tandem.kv_transfer.layout import Runs
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region
from tandem.kv_transfer.transports.offer import offer

__all__ = [
    "test_a_peer_that_is_made_again_under_the_same_name",
    "test_a_read_of_many_small_runs",
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

pytestmark = pytest.mark.skipif(bool(missing("nixl")) or not on_gpu.AVAILABLE, reason="NIXL or Triton is not installed")

LEAST_BYTES_PER_S = 20e9
"""Between two GPUs that see each other: far above what UCX reaches through the host's memory."""


@pytest.fixture(scope="module", params=PLACES)
def process(request: pytest.FixtureRequest) -> Iterator[OwnerProcess]:
    process = start(request.param, "nixl")
    yield process
    process.kill()


@pytest.fixture
def kit(process: OwnerProcess) -> Iterator[Kit]:
    kit = ProcessKit(process)
    yield kit
    kit.close()


def test_a_dead_owner_ends_reads(process: OwnerProcess) -> None:
    """Those on their way, well or not, and later ones; the reader lives on, and reads from others."""
    doomed = OwnerProcess(0, transport="nixl")
    kit = ProcessKit(doomed)
    try:
        ends = Ends(kit)
        assert ends.wait(number := ends.read(runs((0, 0, SIZE))))[number].error == ""
        numbers = [ends.read(runs((0, 0, SIZE))) for _ in range(20)]
        doomed.kill()
        ends.wait(*numbers, timeout_s=30)
        ends.reader.remove_peer(PEER)
        number = ends.read(runs((0, 0, 8)))
        assert "gone" in ends.wait(number)[number].error
        again = RemoteOwner(process, SIZE)
        again[:] = 7
        ends.reader.add_peer(PEER, again.descriptor())
        number = ends.read(runs((0, 0, SIZE)))
        assert ends.wait(number)[number].error == ""
        assert (ends.target.array == 7).all()
        again.close()
        again.forget()
    finally:
        kit._closers = [closer for closer in kit._closers if getattr(closer, "__self__", None) is not ends.owner]
        kit.close()


def test_memory_of_the_host_travels_beside_that_of_gpus(kit: Kit) -> None:
    """As generations do: each region says where it lies."""
    ends = Ends(kit)
    fence = Buffer(SIZE)
    ends.reader.register(Region("fence", fence))
    number = ends.reader.submit(Read(PEER, "blocks", "fence", runs((64, 0, 256))))
    assert ends.wait(number)[number].error == ""
    np.testing.assert_array_equal(fence.array[:256], np.asarray(ends.source.array)[64:320])
    assert not fence.array[256:].any()
    fence.close()


@pytest.mark.skipif(not GPUS, reason="host memory takes the GPUs' part")
def test_memory_that_is_none_is_refused_with_the_reason() -> None:
    kit = Kit("nixl-cuda")
    buffer = kit.buffer(SIZE)
    buffer.address += 1 << 44
    with pytest.raises(ConfigError, match=f"nixl: {SIZE} bytes of cuda memory could not be registered"):
        kit.make().register(Region("blocks", buffer))
    kit.close()


@pytest.mark.skipif(not GPUS, reason="this needs a CUDA device")
def test_gpus_offer_it_to_who_asks_for_it() -> None:
    context = SecureContext(make_cluster_keys())
    found, _ = offer(lambda: None, context, "127.0.0.1", "cuda", "nixl")
    assert found.keys() == {"nixl"}
    assert {"cuda", "host"} <= found["nixl"].memory
    found["nixl"].close()
    context.close()


@pytest.mark.skipif(GPUS < 2, reason="this needs two CUDA devices")
@pytest.mark.parametrize("place", PLACES[1:])
def test_the_link_between_gpus_is_used(place: str) -> None:
    """A gigabyte in blocks of 1 MiB, as a layer group's blocks are: over NVLink or PCIe, not through the host."""
    process = start(place, "nixl")
    kit = ProcessKit(process)
    try:
        size, block = 1 << 30, 1 << 20
        owner = RemoteOwner(process, size)
        kit._closers += [owner.close, owner.forget]
        target = kit.buffer(size)
        reader = kit.make()
        reader.register(Region("landing", target))
        reader.add_peer(PEER, owner.descriptor())
        rng = np.random.default_rng(0)
        order = rng.permutation(size // block).astype(np.int64) * block
        places = np.arange(0, size, block, dtype=np.int64)
        best_s = float("inf")
        for _ in range(5):
            start_s = time.perf_counter()
            reader.submit(Read(PEER, "blocks", "landing", Runs(order, places, np.full(len(places), block, np.int64))))
            while not (results := reader.poll()):
                assert time.perf_counter() < start_s + 60
                time.sleep(1e-4)
            assert results[0].error == ""
            best_s = min(best_s, time.perf_counter() - start_s)
        print(f"nixl, {place}: {size / best_s / 1e9:.1f} GB/s")
        assert size / best_s > LEAST_BYTES_PER_S, f"{size / best_s / 1e9:.1f} GB/s"
    finally:
        kit.close()
        process.kill()
