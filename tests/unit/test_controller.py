"""Desired against actual state, with processes that the test kills by hand."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from support.launched import Launched, settle
from tandem.cluster.controller import Controller, desired_workers
from tandem.cluster.scaling import Scaling
from tandem.cluster.state import ControllerState
from tandem.core.clock import ManualClock
from tandem.core.config import Config
from tandem.core.errors import ConfigError, WorkerError
from tandem.core.ids import worker_of
from tandem.core.messages import Member


def test_every_configured_worker_is_wanted() -> None:
    config = Config.model_validate({"pools": {"prefill": {"replicas": 2}, "decode": {}}})
    assert desired_workers(config) == [
        ("prefill-0", "prefill"), ("prefill-1", "prefill"), ("decode-0", "decode"), ("gateway-0", "gateway"),
    ]  # fmt: skip
    assert desired_workers(Config.model_validate({"pools": {"colocated": {}}}))[0] == ("colocated-0", "colocated")


def test_all_are_told_of_all() -> None:
    async def run() -> None:
        launched = Launched()
        controller = Controller(Config(), launched, ManualClock())
        await controller.start()
        assert set(launched.processes) == {"prefill-0#1", "decode-0#1", "gateway-0#1"}
        for process in launched.processes.values():
            assert {member.peer for member in process.memberships[-1].members} == set(launched.processes)
        versions = [membership.version for membership in launched.processes["gateway-0#1"].memberships]
        assert versions == sorted(set(versions))
        status = await controller.status()
        assert (status[0].worker, status[0].phase, status[0].restarts) == ("prefill-0", "ready", 0)
        await controller.stop(1)
        assert all(process.death.done() for process in launched.processes.values())

    asyncio.run(run())


def test_host_tiers_that_come_and_go_are_told() -> None:
    async def run() -> None:
        launched = Launched()
        controller = Controller(Config(), launched, ManualClock())
        await controller.start()
        tier = Member("tandem-host-a", "host", "10.0.0.1", "tcp://10.0.0.1:7")
        told = launched.processes["decode-0#1"].memberships
        for tiers in ([tier], []):
            version = told[-1].version
            await controller.follow_host_tiers(tiers)
            assert told[-1].host_tiers == tiers
            assert told[-1].version > version
        await controller.follow_host_tiers([tier])
        launched.processes["prefill-0#1"].die()
        await settle()
        assert told[-1].host_tiers == [tier], "whatever else changes"
        await controller.stop(1)

    asyncio.run(run())


def test_progress_is_told() -> None:
    async def run() -> None:
        launched = Launched(hold=True)
        controller = Controller(Config(), launched, ManualClock())
        start = asyncio.create_task(controller.start())
        await settle()
        assert controller.phases() == dict.fromkeys(("prefill-0", "decode-0", "gateway-0"), "reading the model")
        for process in launched.processes.values():
            process.is_ready.set()
        await start
        assert set(controller.phases().values()) == {"ready"}
        await controller.stop(1)

    asyncio.run(run())


def test_a_dead_worker_comes_back_as_a_new_incarnation() -> None:
    async def run() -> None:
        clock = ManualClock()
        launched = Launched()
        controller = Controller(Config(), launched, clock)
        await controller.start()
        clock.advance(60)
        launched.processes["decode-0#1"].die("SIGKILL")
        await settle()
        assert "decode-0#2" in launched.processes
        gateway = launched.processes["gateway-0#1"]
        told = [{member.peer for member in membership.members} for membership in gateway.memberships]
        assert {"prefill-0#1", "gateway-0#1"} in told, "its death was told"
        assert told[-1] == {"prefill-0#1", "decode-0#2", "gateway-0#1"}
        texts = [event.text for event in await controller.events(0, 0.1)]
        assert texts == ["decode-0#1 is gone: SIGKILL", "decode-0#2 is ready"]
        assert (await controller.status())[1].restarts == 1
        assert await controller.events(2, 0.01) == []
        await controller.stop(1)

    asyncio.run(run())


def test_a_crash_loop_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def instant(seconds: float) -> None:
            if seconds:
                pauses.append(seconds)
            await sleep(0)

        monkeypatch.setattr(asyncio, "sleep", instant)
        launched = Launched()
        controller = Controller(Config(), launched, ManualClock())
        await controller.start()
        for life in range(1, 9):
            launched.processes[f"prefill-0#{life}"].die()
            await settle()
        assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
        await controller.stop(1)

    asyncio.run(run())


@pytest.mark.parametrize("error", [ConfigError("kv.capacity: too small"), WorkerError("died while it started")])
def test_a_first_start_that_fails_stops_everything_and_says_why(error: Exception) -> None:
    async def run() -> None:
        launched = Launched({"decode-0#1": error})
        controller = Controller(Config(), launched, ManualClock())
        with pytest.raises(type(error), match=str(error)):
            await controller.start()
        assert all(p.death.done() for p in launched.processes.values() if worker_of(p.peer) != "decode-0")
        assert len(launched.order) == 3

    asyncio.run(run())


def test_a_later_start_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        sleep = asyncio.sleep
        monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
        launched = Launched({"decode-0#2": WorkerError("no memory"), "decode-0#3": ConfigError("no file")})
        controller = Controller(Config(), launched, ManualClock())
        await controller.start()
        launched.processes["decode-0#1"].die()
        await settle()
        assert "decode-0#4" in launched.processes
        assert controller.phases()["decode-0"] == "ready"
        texts = " ".join(event.text for event in await controller.events(0, 0.1))
        assert "no memory" in texts
        assert "no file" in texts
        await controller.stop(1)

    asyncio.run(run())


def test_who_leaves_is_a_member_that_gets_nothing_new() -> None:
    async def run() -> None:
        launched = Launched()
        controller = Controller(Config(), launched, ManualClock())
        await controller.start()
        await controller.leaving("decode-0#7")
        await controller.leaving("decode-0#1")
        told = launched.processes["gateway-0#1"].memberships[-1]
        assert {member.peer: member.ready for member in told.members} == {
            "prefill-0#1": True, "decode-0#1": False, "gateway-0#1": True,
        }  # fmt: skip
        assert controller.phases()["decode-0"] == "leaving"
        await controller.stop(0)

    asyncio.run(run())


def test_nothing_is_started_again_once_stopped() -> None:
    async def run() -> None:
        launched = Launched()
        controller = Controller(Config(), launched, ManualClock())
        await controller.start()
        await controller.stop(0)
        await controller.stop(0)
        await settle()
        assert len(launched.order) == 3

    asyncio.run(run())


def test_one_death_takes_its_group_along_and_no_other() -> None:
    async def run() -> None:
        pools = {"prefill": {"expert_parallel": 1}, "decode": {"replicas": 4}}
        config = Config.model_validate({"pools": pools, "experts": {"parallel": 2}})
        launched, clock = Launched(hold=True), ManualClock()
        controller = Controller(config, launched, clock)
        starting = asyncio.create_task(controller.start())
        await settle()
        await asyncio.gather(*(controller.meet(f"decode-{index}#1", str(index)) for index in range(4)))
        for process in launched.processes.values():
            process.is_ready.set()
        await starting
        clock.advance(60)
        launched.processes["decode-3#1"].die("SIGKILL")
        await settle()
        assert [peer for peer in launched.order if peer.endswith("#2")] == ["decode-3#2", "decode-2#2"]
        assert not launched.processes["decode-0#1"].death.done()
        texts = [event.text for event in await controller.events(0, 0.1)]
        assert "decode-2#1 shared experts with decode-3#1, and start anew" in texts
        await controller.stop(0)

    asyncio.run(run())


async def killed(controller: Controller) -> ControllerState:
    """End a controller without a word; returns what it has kept."""
    state = msgspec.msgpack.encode(controller.state())
    controller._stopping = True
    for task in controller._tasks:
        task.cancel()
    await asyncio.gather(*controller._tasks, return_exceptions=True)
    return msgspec.msgpack.decode(state, type=ControllerState)


def test_a_next_life_takes_over_all_that_live() -> None:
    async def run() -> None:
        launched = Launched()
        first = Controller(Config(), launched, ManualClock())
        await first.start()
        await first.note("decode-0#1", "something")
        state = await killed(first)
        told = {peer: len(process.memberships) for peer, process in launched.processes.items()}
        version = launched.processes["gateway-0#1"].memberships[-1].version
        tier = Member("tandem-host-a", "host", "10.0.0.1", "tcp://10.0.0.1:7")

        next_life = Controller(Config(), launched, ManualClock())
        await next_life.take_over(state, [tier], "SIGKILL")
        assert len(launched.order) == 3, "nobody is launched"
        for peer, process in launched.processes.items():
            for membership in process.memberships[told[peer] :]:
                assert {member.peer for member in membership.members} == set(launched.processes), "nobody is missed"
                assert membership.version > version
                assert membership.host_tiers == [tier]
        assert set(next_life.phases().values()) == {"ready"}
        texts = [event.text for event in await next_life.events(0, 0.1)]
        assert texts == [
            "decode-0#1: something", "the controller ended (SIGKILL) and was started again; 3 workers were taken over",
        ]  # fmt: skip
        assert len(await next_life.events(state.num_events, 0.1)) == 1, "who heard the first hears the second"

        launched.processes["decode-0#1"].die("SIGKILL")
        await settle()
        await next_life.until(lambda: next_life.phases()["decode-0"] == "ready")
        await settle()
        assert launched.order[3:] == ["decode-0#2"]
        told_last = launched.processes["gateway-0#1"].memberships[-1].members
        assert {member.peer for member in told_last} == {"prefill-0#1", "decode-0#2", "gateway-0#1"}
        await next_life.stop(0)
        assert all(process.death.done() for process in launched.processes.values())

    asyncio.run(run())


def test_who_died_while_the_controller_was_away_is_started_again() -> None:
    async def run() -> None:
        launched = Launched()
        first = Controller(Config(), launched, ManualClock())
        await first.start()
        state = await killed(first)
        launched.processes["decode-0#1"].die("SIGKILL")
        before = len(launched.processes["gateway-0#1"].memberships)

        next_life = Controller(Config(), launched, ManualClock())
        await next_life.take_over(state, [], "SIGKILL")
        await settle()
        assert launched.order[3:] == ["decode-0#2"]
        told = [
            {member.peer for member in membership.members}
            for membership in launched.processes["gateway-0#1"].memberships[before:]
        ]
        living = {"prefill-0#1", "gateway-0#1"}
        assert told == [living, living | {"decode-0#2"}]
        texts = [event.text for event in await next_life.events(0, 0.1)]
        assert texts[0].endswith("2 workers were taken over")
        assert texts[1:] == ["decode-0#1 ended meanwhile", "decode-0#2 is ready"]
        await next_life.stop(0)

    asyncio.run(run())


def test_a_next_life_goes_on_with_starts_drains_and_sizes() -> None:
    async def run() -> None:
        config = Config.model_validate({"pools": {"prefill": {}, "decode": {"replicas": 3}}})
        launched = Launched()
        first = Controller(config, launched, ManualClock())
        await first.start()
        scaling = Scaling(config, launched, first)
        await scaling.drain("decode-0")
        launched.processes["decode-1#1"].lingers = True
        first.take_out(first.desired[2], 30, restart=False)
        launched.hold = True
        await scaling.scale("decode", 2)  # decode-0 is called back, and still starts
        await settle()
        assert first.phases() == {
            "prefill-0": "ready", "decode-0": "reading the model", "decode-1": "leaving", "decode-2": "ready",
            "gateway-0": "ready",
        }  # fmt: skip
        state = await killed(first)

        next_life = Controller(config, launched, ManualClock())
        await next_life.take_over(state, [], "SIGKILL")
        await settle()
        assert next_life.phases()["decode-1"] == "leaving"
        assert next_life.phases()["decode-0"] != "ready"
        told = launched.processes["gateway-0#1"].memberships[-1].members
        assert {member.peer: member.ready for member in told if member.role == "decode"} == {
            "decode-1#1": False, "decode-2#1": True,
        }  # fmt: skip
        launched.processes["decode-0#2"].is_ready.set()
        launched.processes["decode-1#1"].die("stopped")
        await settle()
        assert next_life.phases() == {
            "prefill-0": "ready", "decode-0": "ready", "decode-1": "drained", "decode-2": "ready", "gateway-0": "ready",
        }  # fmt: skip
        assert "decode-1" in launched.released
        assert launched.order[5:] == ["decode-0#2"], "nobody else was launched"
        await next_life.stop(0)

    asyncio.run(run())


def test_a_group_is_known_after_a_restart() -> None:
    async def run() -> None:
        pools = {"prefill": {"expert_parallel": 1}, "decode": {"replicas": 2}}
        config = Config.model_validate({"pools": pools, "experts": {"parallel": 2}})
        launched, clock = Launched(hold=True), ManualClock()
        first = Controller(config, launched, clock)
        starting = asyncio.create_task(first.start())
        await settle()
        await asyncio.gather(*(first.meet(f"decode-{index}#1", f"at {index}") for index in range(2)))
        for process in launched.processes.values():
            process.is_ready.set()
        await starting
        state = await killed(first)
        next_life = Controller(config, launched, clock)
        await next_life.take_over(state, [], "SIGKILL")
        assert await next_life.meet("decode-1#1", "at 1") == "at 0", "its answer was lost with the last life"
        clock.advance(60)
        launched.processes["decode-0#1"].die("SIGKILL")
        await settle()
        assert launched.processes["decode-1#1"].death.done(), "it cannot go on alone"
        await next_life.stop(0)

    asyncio.run(run())
