"""Which workers a request goes to."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from tandem.cluster.kv_view import KVView
from tandem.cluster.router import Placement, Router
from tandem.core.hashing import block_hashes, root_hash
from tandem.core.kv_messages import KVSnapshot
from tandem.core.messages import Member, Membership, Report
from tandem.core.urgency import LEAST, LEVELS

HIGH, NORMAL = LEVELS.index("high"), LEVELS.index("normal")
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


@pytest.mark.parametrize("policy", ["kv_aware", "least_loaded", "round_robin"])
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


# ---- where the KV is ------------------------------------------------------------------------------------------------

PROMPT = list(range(1000))


def cluster(policy: str, *peers: str, held: dict[str, int]) -> Router:
    """A router that knows who has how many blocks of `PROMPT`."""
    view = KVView(lambda peer, message: None)
    router = Router(policy, view)
    members = membership(*peers)
    view.follow(members)
    router.follow(members)
    hashes = block_hashes(PROMPT, 16, root_hash("f"))
    prefills = [peer for peer in peers if peer.startswith("prefill")]
    for peer in peers:
        router.report(peer, report(*prefills))
        blocks = b"".join(hashes[: held.get(peer, 0)])
        view.receive(peer, KVSnapshot(True, 0, "f", 16, "", False, blocks))
    return router


def test_a_prompt_goes_where_most_of_it_is() -> None:
    peers = [f"colocated-{n}#1" for n in range(64)]
    r = cluster("kv_aware", *peers, held={peers[7]: 10, peers[40]: 50})
    for _ in range(5):
        placement = r.place(PROMPT)
        assert placement == Placement(peers[40], "", 1000 - 50 * 16)
    # Another tenant has nothing anywhere.
    assert {r.place(PROMPT, "salt").decode for _ in range(64)} == set(peers)  # type: ignore[union-attr]


def test_what_waits_there_may_be_too_much() -> None:
    peers = [f"colocated-{n}#1" for n in range(4)]
    r = cluster("kv_aware", *peers, held={peers[2]: 60})
    counts: Counter[str] = Counter()
    for _ in range(100):
        placement = r.place(PROMPT)
        assert placement is not None
        r.sent(placement, 1, placement.num_left)
        counts[placement.decode] += 1
    assert counts[peers[2]] == max(counts.values())
    assert min(counts[peer] for peer in peers) > 0
    # What others send there counts, too.
    r = cluster("kv_aware", *peers, held={peers[2]: 60})
    r.report(peers[2], Report(0, 0, 5000, 10, 10))
    assert r.place(PROMPT).decode != peers[2]  # type: ignore[union-attr]


def test_both_ends_of_a_handoff_are_chosen_by_what_they_have() -> None:
    r = cluster("kv_aware", *DECODES, *PREFILLS, held={DECODES[1]: 20, PREFILLS[0]: 60})
    assert {r.place(PROMPT) for _ in range(4)} == {Placement(DECODES[1], PREFILLS[0], 1000 - 960)}


def test_where_all_are_busy_less_is_computed_twice() -> None:
    """On an idle cluster a prompt leaves its KV for a shorter queue; where all have something to do, not as soon."""
    peers = [f"colocated-{n}#1" for n in range(4)]
    r = cluster("kv_aware", *peers, held={peers[2]: 60})
    r.report(peers[2], Report(0, 0, 3000, 10, 10))
    assert r.place(PROMPT).decode != peers[2]  # type: ignore[union-attr]
    for peer in peers:
        r.report(peer, Report(0, 0, 3000 if peer == peers[2] else 10, 10, 10))
    assert r.place(PROMPT).decode == peers[2]  # type: ignore[union-attr]
    # Those that end are not counted any more.
    r.follow(membership(*peers[1:]))
    for peer in (peers[1], peers[3]):
        r.report(peer, Report(0, 0, 0, 10, 10))
    assert r.place(PROMPT).decode != peers[2]  # type: ignore[union-attr]


@pytest.mark.parametrize("told", ["by the worker", "by this gateway"])
def test_of_less_urgent_work_half_counts(told: str) -> None:
    peers = [f"colocated-{n}#1" for n in range(4)]
    r = cluster("kv_aware", *peers, held={peers[2]: 60})
    if told == "by the worker":
        r.report(peers[2], Report(0, 1, 3000, 10, 10, urgent=[(0, 0), (1, 3000)]))
    else:
        r.sent(Placement(peers[2], ""), 1, 3000, NORMAL)
    for level, goes_there in ((HIGH, True), (NORMAL, False), (LEAST, False)):
        assert (r.place(PROMPT, level=level).decode == peers[2]) is goes_there  # type: ignore[union-attr]
    if told == "by this gateway":
        # What is as urgent counts, from whatever gateway.
        r.report(peers[2], Report(0, 2, 5000, 10, 10, urgent=[(1, 2000), (2, 5000)]))
        assert r.place(PROMPT, level=HIGH).decode != peers[2]  # type: ignore[union-attr]


def test_an_output_that_has_begun_counts_for_all() -> None:
    peers = [f"decode-{n}#1" for n in range(2)]
    r = cluster("kv_aware", *peers, held={})
    waits, runs = Placement(peers[0], ""), Placement(peers[1], "")
    for placement in (waits, runs):
        r.sent(placement, 2, 0, NORMAL)
    r.begun(runs, 2, NORMAL)
    assert {r.place(PROMPT, level=HIGH).decode for _ in range(4)} == {peers[0]}  # type: ignore[union-attr]
    assert {r.place(PROMPT, level=NORMAL).decode for _ in range(4)} == set(peers)  # type: ignore[union-attr]
    r.done(runs, 2, 0)
    r.done(waits, 2, NORMAL)
    assert not any(any(load.values()) for load in r._decode_load)


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_of_all_is_taken_though_few_are_weighed(seed: int) -> None:
    rng = random.Random(seed)
    peers = [f"colocated-{n:02}#1" for n in range(12)]
    held = {peer: rng.choice((5, 20, 60)) for peer in rng.sample(peers, rng.randrange(5))}
    r = cluster("kv_aware", *peers, held=held)
    sent: list[tuple[Placement, int, int]] = []
    others: dict[str, list[int]] = {peer: [0, 0, 0] for peer in peers}

    def before(peer: str, level: int) -> int:
        """Prompt tokens."""
        own = sum(tokens for placement, tokens, of in sent if placement.decode == peer and of <= level)
        return own + sum(others[peer][: level + 1])

    def outputs(peer: str, level: int) -> int:
        return sum(placement.decode == peer and of <= level for placement, _, of in sent)

    for _ in range(60):
        level = rng.randrange(3)
        placement = r.place(PROMPT, level=level)
        assert placement is not None
        weight = 1 + 6 * sum(before(p, LEAST) > 0 for p in peers) / len(peers)
        costs = {
            p: weight * (1000 - 16 * held.get(p, 0))
            + (before(p, level) + before(p, LEAST)) // 2
            + 64 * (outputs(p, level) + outputs(p, LEAST)) // 2
            for p in peers
        }
        assert costs[placement.decode] == min(costs.values())
        num_tokens = rng.choice((10, 100, 1000))
        r.sent(placement, 1, num_tokens, level)
        sent.append((placement, num_tokens, level))
        if rng.random() < 0.4:
            done, num_tokens, level = sent.pop(rng.randrange(len(sent)))
            r.prompt_done(done, num_tokens, level)
            r.begun(done, 1, level)
            r.done(done, 1, 0)
        if rng.random() < 0.2:
            peer = rng.choice(peers)
            others[peer] = [rng.choice((0, 300)) for _ in range(3)]
            urgent = [(outputs(peer, level), before(peer, level)) for level in (HIGH, NORMAL)]
            r.report(peer, Report(0, outputs(peer, LEAST), before(peer, LEAST), 10, 10, urgent=urgent))


def test_gateways_of_one_cluster_agree() -> None:
    """Two gateways that have heard the same send a prompt to the same worker, in whatever order they heard it; one that
    has heard less sends it there as soon as it has caught up."""
    rng = random.Random(0)
    peers = [f"colocated-{n}#1" for n in range(8)]
    prompts = [[rng.randrange(1000) for _ in range(16 * blocks + 1)] for blocks in (1, 5, 20, 60, 300)]
    told: list[tuple[str, Report | KVSnapshot]] = []
    for number, peer in enumerate(peers):
        told.append((peer, Report(number % 3, 0, 50 * (number % 4), 10, 10)))
        # Beginnings of some prompts: of each, exactly one worker has the most.
        blocks = [
            key
            for at, prompt in enumerate(prompts)
            if number >= at
            for key in block_hashes(prompt, 16, root_hash("f"))[: len(prompt) // 16 // (1 + number - at)]
        ]
        told.append((peer, KVSnapshot(True, 0, "f", 16, "", False, b"".join(blocks))))
    gateways = []
    for _ in range(3):
        view = KVView(lambda peer, message: None)
        gateway = Router("kv_aware", view)
        for each in (view, gateway):
            each.follow(membership(*peers))
        gateways.append((gateway, view))
        rng.shuffle(told)
        for peer, message in told if len(gateways) < 3 else ():
            gateway.report(peer, message) if isinstance(message, Report) else view.receive(peer, message)
    (one, _), (other, _), (late, its_view) = gateways
    chosen = [placed_with(one, prompt).decode for prompt in prompts]
    assert [placed_with(other, prompt).decode for prompt in prompts] == chosen
    assert all(placed_with(late, prompt).decode in peers for prompt in prompts)
    for peer, message in told:
        late.report(peer, message) if isinstance(message, Report) else its_view.receive(peer, message)
    assert [placed_with(late, prompt).decode for prompt in prompts] == chosen
    assert chosen[-1] == peers[4]


def test_what_a_gateway_sends_others_learn_from_reports() -> None:
    """A gateway does not see what another has sent, until the worker reports it: then both spread as one would."""
    peers = ["colocated-0#1", "colocated-1#1"]
    one, other = (cluster("kv_aware", *peers, held={peers[0]: 30}) for _ in range(2))
    sent: Counter[str] = Counter()
    for turn in range(60):
        gateway = (one, other)[turn % 2]
        placement = placed_with(gateway, PROMPT)
        gateway.sent(placement, 1, placement.num_left)
        sent[placement.decode] += placement.num_left
        for peer in peers:
            for each in (one, other):
                each.report(peer, Report(0, 0, sent[peer], 10, 10))
    assert min(sent.values()) > 0.4 * max(sent.values())


def test_prompts_that_begin_alike_meet() -> None:
    peers = [f"colocated-{n}#1" for n in range(8)]
    r = cluster("prefix_hash", *peers, held={})
    beginnings = [[n] * 256 for n in range(64)]
    first = [r.place([*b, 1]).decode for b in beginnings]  # type: ignore[union-attr]
    assert [r.place([*b, 2, 3]).decode for b in beginnings] == first  # type: ignore[union-attr]
    assert len(set(first)) == 8
    # Without one of them, the others keep theirs.
    r.forget(peers[3])
    after = [r.place([*b, 1]).decode for b in beginnings]  # type: ignore[union-attr]
    assert all(new == old for old, new in zip(first, after, strict=True) if old != peers[3])
    # One beginning alone does not fill one worker while the others are idle.
    counts: Counter[str] = Counter()
    for _ in range(80):
        placement = placed_with(r, beginnings[0])
        r.sent(placement, 1, placement.num_left)
        counts[placement.decode] += 1
    assert max(counts.values()) <= 1.25 * 80 / 7 + 5


def placed_with(router: Router, tokens: list[int]) -> Placement:
    placement = router.place(tokens)
    assert placement is not None
    return placement
