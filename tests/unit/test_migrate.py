"""The migrator around the protocol: what it refuses, what it finds wrong, what it tells."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.expert_threads import NUM_LAYERS, SLOTS, TENSORS, Ranks
from tandem.core.clock import ManualClock
from tandem.core.errors import CapacityError, ConfigError, IllegalTransition, PlacementError, WorkerError
from tandem.core.metrics import render
from tandem.eplb.placement import Placement
from tandem.eplb.rebalance import Phase, Reason
from tandem.eplb.standing import agree
from tandem.eplb.store import ExpertLayout, ExpertTensor


@pytest.fixture
def make() -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def start(**options: Any) -> Ranks:
        made.append(Ranks(**options))
        return made[-1]

    yield start
    for ranks in made:
        ranks.close()


@pytest.mark.parametrize(("size", "checksums"), [(2, False), (2, True), (3, True)])
def test_experts_move_whole(make: Callable[..., Ranks], size: int, checksums: bool) -> None:
    ranks = make(size=size, checksums=checksums)
    for seed in range(1, 8):
        outcomes = ranks.rebalance(seed)
        assert {outcome.reason for outcome in outcomes} == {Reason.DONE}
        assert (
            ranks.maps[0].placement.physical_to_logical.tolist() == ranks.placement(seed).physical_to_logical.tolist()
        )
    text = render(ranks.metrics[1].registry)
    assert 'tandem_expert_rebalances_total{outcome="done"} 7.0' in text
    moved = sum(outcome.num_experts for outcome in ranks.outcomes[1])
    assert moved > 0
    assert f"tandem_experts_moved_total {moved:.1f}" in text


def test_a_plan_that_changes_nothing_is_done_at_once(make: Callable[..., Ranks]) -> None:
    ranks = make()
    assert [outcome[1:6] for outcome in ranks.rebalance(0)] == [(Reason.DONE, rank, None, 0, 0) for rank in range(2)]


def test_what_cannot_be_is_refused(make: Callable[..., Ranks]) -> None:
    ranks = make()
    leader = ranks.migrators[0]
    larger = Placement.from_physical(np.zeros((NUM_LAYERS, 6), np.int32), 1)
    with pytest.raises(PlacementError, match="the plan is for 2 layers, 6 slots and 1 experts, expected 2, 4 and 3"):
        leader.propose(larger)
    with pytest.raises(IllegalTransition, match="rank 1"):
        ranks.migrators[1].propose(ranks.placement(1))
    leader.propose(ranks.placement(1))
    with pytest.raises(CapacityError, match="already"):
        leader.propose(ranks.placement(2))
    assert ranks.until_ended(1)[0].reason is Reason.DONE
    leader.close()
    with pytest.raises(CapacityError):
        leader.propose(ranks.placement(2))


def test_ranks_with_other_experts_do_not_begin(make: Callable[..., Ranks]) -> None:
    wrong = ExpertLayout((*TENSORS[:-1], ExpertTensor("scale", (2,), "float32")), NUM_LAYERS, SLOTS)
    with pytest.raises(ConfigError, match="rank 0: rank 1 has other experts"):
        make(layouts={1: wrong})


@pytest.mark.parametrize("what", ["plan", "generation", "checksum", "size", "exception"])
def test_what_is_wrong_on_one_rank_ends_the_attempt_on_all(make: Callable[..., Ranks], what: str) -> None:
    ranks = make(checksums=True)
    assert ranks.rebalance(1)[0].reason is Reason.DONE
    zero, one = ranks.migrators
    original = one._stager.stage

    def strike(*arguments: Any) -> Any:
        one._stager.stage = original  # type: ignore[method-assign]
        if what == "generation":
            zero._ledger.generations += 1
        elif what == "checksum":
            zero._ledger.sums[:] ^= 1
        elif what == "size":
            arguments = (arguments[0], [move._replace(source=99) for move in arguments[1]], *arguments[2:])
        else:
            raise MemoryError("as told")
        return original(*arguments)

    ranks.propose(2)
    if what == "plan":
        zero._ledger.plan[0, 0] += 1  # after its digest was taken
    else:
        one._stager.stage = strike  # type: ignore[method-assign]
    outcomes = ranks.until_ended(2)
    expected = {
        "plan": Reason.PLAN, "generation": Reason.GENERATION, "checksum": Reason.CORRUPTED, "size": Reason.TRANSFER,
        "exception": Reason.EXCEPTION,
    }[what]  # fmt: skip
    assert {outcome.reason for outcome in outcomes} == {expected}
    assert {outcome.num_layers for outcome in outcomes} == {0}
    if what == "generation":
        zero._ledger.generations -= 1
    if what == "checksum":
        zero._ledger.sums[:] ^= 1
    assert ranks.rebalance(3)[0].reason is Reason.DONE


def test_a_thread_that_hangs_holds_nobody_up(make: Callable[..., Ranks]) -> None:
    clock = ManualClock()
    ranks = make(clock=clock, timeout_s=5.0)
    stuck, go = threading.Event(), threading.Event()
    original = ranks.migrators[1]._stager.stage

    def hang(*arguments: Any) -> Any:
        stuck.set()
        assert go.wait(30)
        return original(*arguments)

    ranks.migrators[1]._stager.stage = hang  # type: ignore[method-assign]
    ranks.propose(1)
    # The other rank is ready in time: its clock is the same.
    while not stuck.is_set() or ranks.migrators[0]._machine.phase is not Phase.READY:
        ranks.step()
    clock.advance(5.1)
    assert [outcome[1:4] for outcome in ranks.until_ended(1)] == [(Reason.TIMEOUT, 1, 0)] * 2
    # Until the thread is back nothing begins, and that is told, too.
    ranks.migrators[1]._stager.stage = original  # type: ignore[method-assign]
    while ranks.migrators[0]._machine.phase:
        ranks.step()
    ranks.propose(1)
    for _ in range(10):
        ranks.step()
    clock.advance(5.1)
    while len(ranks.outcomes[0]) < 2:
        ranks.step()
    assert ranks.outcomes[0][1].reason is Reason.NOT_BEGUN
    go.set()
    ranks.outcomes[1].append(ranks.outcomes[0][1])  # so that both have two
    while ranks.migrators[1]._machine.phase:
        ranks.step()
    assert ranks.rebalance(2)[0].reason is Reason.DONE


def test_a_commit_that_one_rank_missed_is_made_up_for(make: Callable[..., Ranks]) -> None:
    ranks = make()
    zero, one = ranks.migrators
    zero.propose(ranks.placement(1))
    while not zero._machine.promised or not one._machine.promised:
        ranks.step()
    zero.step_boundary()  # decides to commit
    assert ranks.maps[0].placement is not ranks.maps[1].placement
    with pytest.raises(AssertionError):
        ranks.check()
    zero.close()
    one.close()
    agreed = agree([zero.standing(), one.standing(), None])
    assert agreed is not None
    assert agreed.attempt == 1
    assert sum(agreed.generations) == 1
    zero.settle(agreed)
    one.settle(agreed)
    ranks.check()
    assert ranks.maps[1].placement.physical_to_logical.tolist() == agreed.rows


def test_closing_while_a_layer_is_staged(make: Callable[..., Ranks]) -> None:
    ranks = make()
    stuck = threading.Event()
    one = ranks.migrators[1]

    def hang(layer: int, moves: Any, checksums: bool, deadline_s: float, wanted: Callable[[], bool]) -> Any:
        # As a read that never ends.
        one._peers.poll = lambda: {}  # type: ignore[method-assign]
        one._peers.cancel = lambda tickets: set()  # type: ignore[method-assign]
        stuck.set()
        one._stager._finish({("inproc", 1 << 40): 0}, deadline_s, wanted)
        raise AssertionError

    one._stager.stage = hang  # type: ignore[method-assign]
    ranks.propose(1)
    while not stuck.is_set():
        ranks.step()
    one.close()
    assert not one._thread.is_alive()
    assert ranks.outcomes[1][0].reason is Reason.CLOSED
    with pytest.raises(WorkerError):
        one.step_boundary()
    ranks.migrators[0].step_boundary()
    with pytest.raises(WorkerError, match="only ranks"):
        ranks.migrators[0].step_boundary()
    assert ranks.outcomes[0][0].reason is Reason.PEER_LOST
    ranks.check()
