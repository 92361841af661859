"""Which workers a request goes to."""

from __future__ import annotations

from collections import Counter

import pytest
from tandem.cluster.router import Placement, Router
from tandem.core.messages import Member, Membership, Report

DECODES = ["decode-0#1", "decode-1#1"]
PREFILLS = ["prefill-0#1", "prefill-1#1"]


def membership(*peers: str) -> Membership:
    return Membership(1, [Member(peer, peer.split("-")[0], "n", "tcp://x:1") for peer in peers])


def report(*peers: str, waiting: int = 0) -> Report:
    return Report(0, waiting, 0, 10, 10, peers=list(peers))


def router(policy: str = "least_loaded", reachable: list[str] | None = None) -> Router:
    router = Router(policy)
    router.follow(membership(*DECODES, *PREFILLS, "gateway-0#1"))
    for peer in DECODES:
        router.report(peer, report(*(PREFILLS if reachable is None else reachable)))
    return router


def placed(router: Router) -> Placement:
    placement = router.place()
    assert placement is not None
    return placement


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin"])
def test_an_idle_cluster_is_used_evenly(policy: str) -> None:
    r = router(policy)
    placements = [placed(r) for _ in range(40)]
    assert set(Counter(p.decode for p in placements).values()) == {20}
    assert set(Counter(p.prefill for p in placements).values()) == {20}


def test_load_decides() -> None:
    r = router()
    busy = Placement(DECODES[0], PREFILLS[1])
    r.sent(busy, 5, 1000)
    assert {placed(r) for _ in range(4)} == {Placement(DECODES[1], PREFILLS[0])}
    r.prompt_done(busy, 1000)
    assert {placed(r).prefill for _ in range(4)} == set(PREFILLS)
    r.done(busy, 5)
    assert {placed(r).decode for _ in range(4)} == set(DECODES)
    r.report(DECODES[0], report(*PREFILLS, waiting=9))
    assert {placed(r).decode for _ in range(4)} == {DECODES[1]}


def test_only_prefills_that_decode_can_read_from() -> None:
    r = router(reachable=[PREFILLS[1], "prefill-9#9"])
    assert {placed(r).prefill for _ in range(4)} == {PREFILLS[1]}
    r.follow(membership(*DECODES, PREFILLS[0]))
    assert {placed(r).prefill for _ in range(4)} == {""}
    assert not r.routable(wants_prefill=True)
    assert r.routable(wants_prefill=False)


def test_nobody_there() -> None:
    r = router()
    assert r.routable(wants_prefill=True)
    r.follow(membership(*PREFILLS))
    assert r.place() is None
    assert not r.routable(wants_prefill=False)


def test_the_lost_are_left_out_at_once() -> None:
    r = router()
    r.forget(DECODES[0])
    assert {placed(r).decode for _ in range(4)} == {DECODES[1]}
    assert DECODES[0] not in {member.peer for member in r.members()}


def test_the_silent_are_left_out_until_they_report() -> None:
    """A worker that was stopped is a member all the time; connecting to it again proves nothing."""
    r = router()
    r.forget(DECODES[0])
    r.forget(PREFILLS[0])
    r.follow(membership(*DECODES, *PREFILLS))
    assert {placed(r) for _ in range(4)} == {Placement(DECODES[1], PREFILLS[1])}
    r.forget(PREFILLS[1])
    assert not r.routable(wants_prefill=True)
    r.report(PREFILLS[0], report())
    r.report(DECODES[0], report(*PREFILLS))
    assert {placed(r).decode for _ in range(4)} == set(DECODES)
    assert {placed(r).prefill for _ in range(4)} == {PREFILLS[0]}
    assert r.routable(wants_prefill=True)


def test_colocated_workers_need_no_other() -> None:
    r = Router("least_loaded")
    r.follow(membership("colocated-0#1"))
    r.report("colocated-0#1", report())
    assert placed(r) == Placement("colocated-0#1", "")
    assert r.routable(wants_prefill=False)


def test_reports_of_strangers_are_ignored() -> None:
    r = router()
    r.report("decode-7#1", report())
    assert {placed(r).decode for _ in range(4)} == set(DECODES)
