"""Who has which expert, and who meets whom, without processes."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
import torch
from tandem.cluster.expert_groups import ExpertGroups
from tandem.core.config import Config, load_config
from tandem.core.config_experts import ExpertsConfig
from tandem.core.environment import prepare_collectives_between_hosts
from tandem.core.errors import ConfigError, WorkerError
from tandem.engine.expert_balancer import first_placement
from tandem.engine.expert_parallel import ExpertPlace, make_group, open_rendezvous
from tandem.engine.models.experts import experts_spec
from tandem.engine.models.spec import parse_spec
from tandem.eplb.maps import ExpertMaps
from tandem.eplb.placement import Placement, Topology

CPU = torch.device("cpu")


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def config(**changes: object) -> Config:
    pools = {"prefill": {"expert_parallel": 1}, "decode": {"replicas": 4}}
    return Config.model_validate({"pools": pools, "experts": {"parallel": 2}} | changes)


# ---- maps -----------------------------------------------------------------------------------------------------------


def maps_of(rank: int, rows: list[list[int]], experts: int, ranks: int) -> ExpertMaps:
    topology = Topology(len(rows[0]), ranks)
    return ExpertMaps(Placement.from_physical(np.array(rows), experts), topology, rank, CPU)


def test_every_expert_is_somewhere_and_none_twice_on_a_rank() -> None:
    placement, topology = first_placement(2, 6, 4, ExpertsConfig(redundant=2), 1)
    maps = [ExpertMaps(placement, topology, rank, CPU) for rank in range(4)]
    assert [one.held(1) for one in maps] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert placement.replica_count[0].tolist() == [2, 2, 1, 1, 1, 1]


def test_replicas_share_the_tokens() -> None:
    """A rank's own go to its own replica, if it has one; those of others take turns."""
    rows = [[0, 1, 2, 3, 0, 1]]
    ids = torch.tensor([[0, 3]]).expand(1000, 2)
    for rank, wanted in ((0, {0}), (2, {4})):
        assert set(maps_of(rank, rows, 4, 3).slots(0, ids)[:, 0].tolist()) == wanted
    slots = maps_of(1, rows, 4, 3).slots(0, ids)
    assert set(slots[:, 1].tolist()) == {3}
    assert 400 < int((slots[:, 0] == 0).sum()) < 600
    assert set(slots[:, 0].tolist()) == {0, 4}


def test_slots_change_hands() -> None:
    maps = maps_of(0, [[0, 1, 2, 0], [0, 1, 2, 0]], 3, 2)
    memory = [tensor.data_ptr() for tensor in (maps.physical_to_logical, maps.choices, maps.num_choices)]
    maps.stage(0, np.array([2, 1, 0, 2], np.int32))
    assert maps.held(0) == [0, 1], "staged is not swapped in"
    maps.swap_in(0)
    assert (maps.held(0), maps.held(1)) == ([2, 1], [0, 1])
    assert set(maps.slots(0, torch.zeros(2, 1, dtype=torch.int64)).flatten().tolist()) == {2}
    assert set(maps.slots(0, torch.full((50, 1), 2)).flatten().tolist()) == {0}
    assert maps.slots(0, torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)
    assert memory == [tensor.data_ptr() for tensor in (maps.physical_to_logical, maps.choices, maps.num_choices)]


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks", "said", "fix"),
    [
        (6, 0, 4, "6 experts, 0 of them redundant, cannot be divided among 4 ranks", "experts.redundant: 2"),
        (7, 2, 2, "9 experts, 2 of them redundant", "experts.redundant: 3"),
        (4, 6, 2, "gives each of 2 ranks 5 experts, the model has 4", "at most 4"),
    ],
)
def test_experts_that_do_not_divide(experts: int, redundant: int, ranks: int, said: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        first_placement(1, experts, ranks, ExpertsConfig(redundant=redundant), 1)
    assert fix in caught.value.fix


def test_a_model_without_experts() -> None:
    dense = parse_spec(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        },
        {},
    )  # fmt: skip
    assert experts_spec(dense, torch.float32) is None
    with pytest.raises(ConfigError, match="2 workers are to share experts, and LlamaForCausalLM has none"):
        make_group(ExpertPlace(0, 2, str), dense, None, ExpertsConfig(), CPU, 8)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_experts_of_workers_with_several_processes_move(tensor_parallel: int) -> None:
    mixture = parse_spec(
        {
            "architectures": ["MixtralForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "num_local_experts": 6, "num_experts_per_tok": 2,
        },
        {},
    )  # fmt: skip
    asked, place = experts_spec(mixture, torch.float32, 1, 4), ExpertPlace(3, 4, str)
    group = make_group(place, mixture, asked, ExpertsConfig(redundant=2), CPU, 8, tensor_parallel)
    assert group.movable


# ---- configuration --------------------------------------------------------------------------------------------------


def test_pools_may_differ() -> None:
    asked = config()
    assert [asked.expert_parallel(role) for role in ("prefill", "decode", "colocated", "gateway")] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experts.parallel=2"], "pools.prefill.replicas: 1 is no multiple of 2 workers that share experts"),
        (["experts.parallel=0"], "experts.parallel"),
    ],
)
def test_pools_that_cannot(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, overrides)


# ---- meeting --------------------------------------------------------------------------------------------------------


def test_a_group_meets_at_its_first_rank() -> None:
    async def run() -> None:
        groups = ExpertGroups(config())
        waiting = asyncio.create_task(groups.meet("decode-1#1", "b"))
        other = asyncio.create_task(groups.meet("decode-2#1", "c"))
        await settle()
        assert not waiting.done()
        assert await groups.meet("decode-0#1", "a") == await waiting == "a"
        assert groups.gone("prefill-0#1") == groups.gone("decode-2#1") == frozenset()
        with pytest.raises(WorkerError, match="decode-2#1 is gone"):
            await other
        assert groups.gone("decode-1#1") == {"decode-0#1"}
        assert groups.gone("decode-0#1") == frozenset(), "it went because of the other"
        with pytest.raises(WorkerError, match="prefill-0#1 shares no experts"):
            await groups.meet("prefill-0#1", "d")

    asyncio.run(run())


def test_a_new_life_takes_the_place_of_the_last() -> None:
    async def run() -> None:
        groups = ExpertGroups(config())
        old = asyncio.create_task(groups.meet("decode-0#1", "old"))
        await settle()
        new = asyncio.create_task(groups.meet("decode-0#2", "new"))
        await settle()
        with pytest.raises(WorkerError):
            await old
        assert groups.gone("decode-0#1") == frozenset()
        assert await groups.meet("decode-1#1", "b") == await new == "new"

    asyncio.run(run())


def test_what_a_group_leaves() -> None:
    """All of the next group get the same: nothing is kept between the end of one and the meeting of the next."""

    async def run() -> None:
        groups = ExpertGroups(config())
        groups.keep("decode-0#1", b"early")
        assert groups.learned("decode-0#1") == groups.learned("gateway-0#1") == b""
        await asyncio.gather(groups.meet("decode-0#1", "a"), groups.meet("decode-1#1", "b"))
        await asyncio.gather(groups.meet("decode-2#1", "c"), groups.meet("decode-3#1", "d"))
        groups.keep("decode-0#1", b"first")
        groups.keep("decode-0#1", b"second")
        groups.keep("decode-2#1", b"other")
        groups.gone("decode-1#1")
        assert groups.learned("decode-1#2") == b"second"
        groups.keep("decode-0#1", b"late")
        assert groups.learned("decode-0#2") == b"second"
        again = ExpertGroups(config())
        again.restore(*groups.state())
        again.keep("decode-0#1", b"late")
        assert [again.learned(f"decode-{n}#2") for n in range(4)] == [b"second", b"second", b"other", b"other"]
        again.keep("decode-3#1", b"newer")
        assert again.learned("decode-2#2") == b"newer"

    asyncio.run(run())


def test_where_others_find_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    prepare_collectives_between_hosts("192.0.2.77")  # nobody's
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    prepare_collectives_between_hosts("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"]
    assert open_rendezvous("127.0.0.1").startswith("tcp://127.0.0.1:")
