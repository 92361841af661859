"""Which node each worker goes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.controller import desired_workers
from tandem.cluster.placement import Room, Want, plan, rooms_of, wants_of
from tandem.core.config import Config
from tandem.core.errors import CapacityError


def room(number: int, cpus: float = 64, gpus: float = 8, *, used_gpus: float = 0, used_cpus: float = 0) -> Room:
    return Room(f"node{number}", f"10.0.0.{number}", cpus - used_cpus, gpus - used_gpus, cpus, gpus)


def wants(**pools: dict[str, object]) -> list[Want]:
    config = Config.model_validate({"pools": pools})
    return wants_of(config, desired_workers(config))


def nodes_of(wanted: list[Want], rooms: list[Room], near: str = "") -> dict[str, str]:
    return {worker: found.node for worker, found in plan(wanted, rooms, near).items()}


def gpu_pool(replicas: int, gpus: int = 1) -> dict[str, object]:
    return {"replicas": replicas, "gpus_per_replica": gpus, "tensor_parallel": gpus, "cpus_per_replica": 4}


def test_prefill_and_decode_share_nodes() -> None:
    placed = nodes_of(wants(prefill=gpu_pool(4), decode=gpu_pool(12)), [room(1), room(2)])
    for node in ("node1", "node2"):
        roles = [worker.partition("-")[0] for worker, where in placed.items() if where == node]
        assert (roles.count("prefill"), roles.count("decode")) == (2, 6)


def test_what_fits_on_one_node_is_on_the_smallest_that_has_room() -> None:
    rooms = [room(1), room(2, used_gpus=5), room(3, used_gpus=7)]
    assert set(nodes_of(wants(prefill=gpu_pool(1), decode=gpu_pool(1)), rooms).values()) == {"node2"}


def test_the_gateways_node_is_preferred_among_equals() -> None:
    assert set(nodes_of(wants(prefill=gpu_pool(1), decode=gpu_pool(1)), [room(1), room(2)], "node2").values()) == {
        "node2"
    }


def test_ranks_of_one_model_are_never_split() -> None:
    placed = nodes_of(wants(prefill=gpu_pool(2), decode=gpu_pool(3, gpus=4)), [room(1), room(2)])
    assert len(placed) == 5, "a first try that gives small ones the large ones' room is not the last"
    with pytest.raises(CapacityError) as caught:
        plan(wants(prefill=gpu_pool(6), decode=gpu_pool(3, gpus=4)), [room(1), room(2)])
    assert "prefill" in caught.value.message


def test_workers_without_gpus_are_spread() -> None:
    placed = nodes_of(wants(prefill={"replicas": 2}, decode={"replicas": 2}), [room(1, gpus=0), room(2, gpus=0)])
    assert sorted(placed.values()) == ["node1", "node1", "node2", "node2"]
    assert placed["prefill-0"] != placed["prefill-1"], "a node that dies does not take all of a role"
    assert placed["decode-0"] != placed["decode-1"]


def test_workers_without_gpus_leave_nodes_with_gpus_alone() -> None:
    assert set(nodes_of(wants(prefill={}, decode={}), [room(1), room(2, cpus=2, gpus=0)]).values()) == {"node2"}


def test_those_that_share_experts_go_to_as_few_nodes_as_they_can() -> None:
    config = Config.model_validate(
        {
            "experts": {"parallel": 8},
            "pools": {
                "prefill": {"gpus_per_replica": 1, "expert_parallel": 1},
                "decode": {"replicas": 16, "gpus_per_replica": 1},
            },
        }
    )
    rooms = [room(1), room(2), room(3, used_gpus=6)]
    placed = nodes_of(wants_of(config, desired_workers(config)), rooms)
    for group in (range(8), range(8, 16)):
        assert len({placed[f"decode-{number}"] for number in group}) == 1
    assert placed["prefill-0"] == "node3"


@pytest.mark.parametrize(
    ("pool", "rooms", "found", "fix"),
    [
        ({"gpus_per_replica": 1}, [room(1, gpus=0)], "decode-0 needs 1 GPU and 1 CPU on one node; none of the 1 nodes of the Ray cluster has a GPU", "ray start --num-gpus"),
        (gpu_pool(1, gpus=8), [room(1, gpus=4), room(2, gpus=2)], "decode-0 needs 8 GPUs and 4 CPUs on one node; the largest has 4 GPUs and 64 CPUs", "tensor_parallel"),
        ({"cpus_per_replica": 2}, [room(1, gpus=0, used_cpus=63)], "decode-0 needs 2 CPUs on one node, beside the other workers; free are 1 CPU at 10.0.0.1", "add nodes"),
        ({}, [], "decode-0 needs 1 CPU on one node; the Ray cluster has no node", "ray start"),
    ],
)  # fmt: skip
def test_what_lacks_is_named(pool: dict[str, object], rooms: list[Room], found: str, fix: str) -> None:
    with pytest.raises(CapacityError) as caught:
        plan(wants(prefill={"cpus_per_replica": 0}, decode=pool), rooms)
    if rooms:
        assert caught.value.message == found
        assert fix in caught.value.fix
    else:
        assert "has no node" in caught.value.message


def test_rooms_are_of_nodes_that_live() -> None:
    nodes = [
        {"NodeID": "b", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "c", "NodeManagerAddress": "10.0.0.3", "Alive": False, "Resources": {}},
    ]
    found = rooms_of(nodes, {"a": {"CPU": 3.0}, "b": {"CPU": 1.0}})
    assert found == [Room("a", "10.0.0.1", 3, 0, 4, 0), Room("b", "10.0.0.2", 1, 0, 4, 1)]


_POOL = st.fixed_dictionaries({"replicas": st.integers(1, 6), "cpus_per_replica": st.sampled_from([0, 0.5, 1, 3])})


@given(
    prefill=_POOL,
    decode=_POOL,
    gpus=st.tuples(st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 1, 2, 4])),
    sizes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), max_size=5),
)
def test_no_node_gets_more_than_it_has(
    prefill: dict[str, object], decode: dict[str, object], gpus: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    for pool, number in ((prefill, gpus[0]), (decode, gpus[1])):
        pool |= {"gpus_per_replica": number, "tensor_parallel": max(number, 1)}
    wanted = wants(prefill=prefill, decode=decode)
    rooms = [room(number, *size) for number, size in enumerate(sizes)]
    try:
        placed = plan(wanted, rooms)
    except CapacityError:
        return
    assert placed.keys() == {want.worker for want in wanted}
    for there in rooms:
        here = [want for want in wanted if placed[want.worker] == there]
        assert sum(want.cpus for want in here) <= there.cpus + 1e-3
        assert sum(want.gpus for want in here) <= there.gpus
