"""When experts move."""

from __future__ import annotations

import numpy as np
import pytest
from tandem.core.clock import ManualClock
from tandem.core.errors import IllegalTransition, PlacementError
from tandem.eplb.placement import Placement, Topology, initial_placement, plan
from tandem.eplb.trigger import Trigger, TriggerSettings, TriggerState

TOPOLOGY = Topology(8, 4)
LOAD = np.array([[8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
NOW = initial_placement(1, 8, TOPOLOGY)
BETTER = plan(LOAD, TOPOLOGY, NOW)
"""16 on the fullest rank of 5.5 in the mean, and then 9."""


def trigger(clock: ManualClock | None = None, **changes: object) -> Trigger:
    settings = {"expert_bytes": 1000, "bytes_per_s": 1e3, "interval_steps": 100, "first_steps": 10, **changes}
    return Trigger(TriggerSettings(**settings), TOPOLOGY, clock or ManualClock())  # type: ignore[arg-type]


def test_steps_are_counted_from_the_end_of_the_last_attempt() -> None:
    clock = ManualClock()
    subject = trigger(clock)
    assert [subject.step() for _ in range(10)] == [False] * 9 + [True]
    assert subject.state is TriggerState.PLANNING
    assert not subject.step(1000)
    assert subject.decide(LOAD, NOW, BETTER, 1.0).go
    assert subject.state is TriggerState.MOVING
    clock.advance(5)
    assert subject.age_s == 5
    assert not subject.step(1000)
    assert not subject.demand()
    subject.ended()
    assert (subject.age_s, subject.outcomes) == (0, {"moved": 1, "declined": 0, "failed": 0})
    assert not subject.step(99)
    assert subject.step()


def test_it_moves_if_that_saves_more_than_it_costs() -> None:
    # Of 16 on the fullest rank 7 go, 7/16 of 0.1 s in each of 100 steps; one rank receives one expert for one second.
    subject = trigger()
    subject.step(10)
    decision = subject.decide(LOAD, NOW, BETTER, 0.1)
    assert (decision.go, decision.num_moved, decision.num_bytes) == (True, 2, 2000)
    assert decision.saved_s == pytest.approx(100 * 0.1 * 7 / 16)
    assert decision.cost_s == pytest.approx(1.0)
    assert decision.balancedness == pytest.approx(5.5 / 16)
    assert decision.predicted == pytest.approx(5.5 / 9)
    subject.ended()
    subject.step(100)
    decision = subject.decide(LOAD, NOW, BETTER, 0.02)
    assert not decision.go
    assert "≤ 1 × 1 s" in decision.reason
    assert (subject.state, subject.outcomes["declined"]) == (TriggerState.WATCHING, 1)
    assert subject.last == decision


@pytest.mark.parametrize(
    ("mode", "forced", "go"), [("gain", False, False), ("gain", True, True), ("interval", False, True)]
)
def test_an_interval_or_a_person_asks_for_no_gain(mode: str, forced: bool, go: bool) -> None:
    subject = trigger(mode=mode)
    assert subject.demand()
    assert subject.decide(LOAD, NOW, BETTER, 1e-9, forced=forced).go is go


def test_nothing_moves_where_nothing_would() -> None:
    subject = trigger(mode="interval")
    subject.demand()
    assert subject.decide(LOAD, BETTER, BETTER, 1.0).reason == "nothing would move"
    subject.demand()
    assert not subject.decide(LOAD * 0, NOW, NOW, 1.0).go


def test_a_failed_attempt_ends() -> None:
    subject = trigger()
    subject.demand()
    subject.decide(LOAD, NOW, BETTER, 1.0)
    subject.ended(error="rank 3 is dead")
    assert (subject.state, subject.outcomes["failed"]) == (TriggerState.WATCHING, 1)
    subject.demand()
    with pytest.raises(PlacementError, match="has 6 slots"):
        subject.decide(LOAD[:, :6], Placement.from_physical(np.arange(6)[None], 6), BETTER, 1.0)
    assert (subject.state, subject.outcomes["failed"]) == (TriggerState.WATCHING, 2)


def test_events_out_of_turn_are_bugs() -> None:
    subject = trigger()
    with pytest.raises(IllegalTransition, match="decide while watching"):
        subject.decide(LOAD, NOW, BETTER, 1.0)
    subject.demand()
    with pytest.raises(IllegalTransition, match="watching → planning: demanded"):
        subject.ended()
    with pytest.raises(PlacementError, match="bytes_per_s is 0"):
        trigger(bytes_per_s=0)


def test_seconds_in_place_of_steps() -> None:
    clock = ManualClock()
    subject = trigger(clock, interval_s=40.0)
    clock.advance(9)
    assert not subject.step(1000)
    clock.advance(1)
    assert subject.step()
    assert subject.decide(LOAD, NOW, BETTER, 1.0).saved_s == pytest.approx(40 * 7 / 16)
    subject.ended()
    clock.advance(39)
    assert not subject.step()
    clock.advance(1)
    assert subject.step()


def test_by_hand_alone() -> None:
    subject = trigger(mode="manual")
    assert not subject.step(10_000)
    assert subject.demand()
    assert subject.decide(LOAD, NOW, BETTER, 1.0, forced=True).go


def test_too_little_to_gain() -> None:
    subject = trigger(min_gain=0.5)
    subject.step(10)
    decision = subject.decide(LOAD, NOW, BETTER, 1e6)
    assert (decision.go, decision.reason) == (False, "the fullest ranks become 43.75% less full, less than 50.00%")


def test_without_a_plan_the_next_interval_begins() -> None:
    subject = trigger()
    assert subject.step(10)
    subject.give_up("no plan")
    assert subject.state is TriggerState.WATCHING
    assert subject.outcomes["failed"] == 1
    assert subject.step(100)
    with pytest.raises(IllegalTransition):
        trigger().give_up("nobody planned")


@pytest.mark.parametrize("wrong", [{"interval_s": 0.0}, {"min_gain": 1.0}, {"min_gain": -0.1}])
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(PlacementError, match=next(iter(wrong))):
        trigger(**wrong)
