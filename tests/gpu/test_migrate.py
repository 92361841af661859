"""Experts move between GPUs, or between two ranks on one, while these compute: weights and maps are right to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from support.expert_threads import Ranks
from tandem.eplb.rebalance import Reason
from tandem.kv_transfer.transports import Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def over_cuda(notify: Notify) -> Mapping[str, Transport]:
    return {"cuda_ipc": CudaIpcTransport(notify, 0, 16)}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks(device=torch.device("cuda", 0), make=over_cuda, checksums=True)
    yield made
    made.close()


def test_experts_move_on_a_gpu(ranks: Ranks) -> None:
    busy = torch.randn(1024, 1024, device="cuda")
    for seed in range(1, 30):
        for _ in range(4):
            busy = torch.tanh(busy @ busy)  # so that the device is behind the host at each boundary
        assert {outcome.reason for outcome in ranks.rebalance(seed)} == {Reason.DONE}


def test_a_graph_sees_what_was_swapped_in(ranks: Ranks) -> None:
    weights, maps = ranks.stores[0].live[1]["weight"], ranks.maps[0].physical_to_logical
    seen = torch.zeros(len(weights), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen.copy_(weights[:, 0, 0].float() - maps[1, : len(weights)])
    for seed in range(1, 10):
        ranks.rebalance(seed)
        graph.replay()
        assert seen.tolist() == [11.0] * len(weights)
