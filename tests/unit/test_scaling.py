"""Drains and scales, with processes that the test lets die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from support.launched import Launched, settle
from tandem.cluster import rolling_restart
from tandem.cluster.controller import Controller
from tandem.cluster.scaling import Scaling
from tandem.cluster.state import ControllerState, ScalingState
from tandem.core.clock import ManualClock
from tandem.core.config import Config
from tandem.core.errors import CapacityError, NotFoundError, RequestError, TandemError, WorkerError
from tandem.core.messages import Member

Body = Callable[[Controller, Scaling, Launched], Awaitable[None]]
TWO = {"prefill": {}, "decode": {"replicas": 2}}


def play(body: Body, pools: dict[str, Any] = TWO, **sections: Any) -> None:
    """Run a test on a controller of which everybody is ready."""

    async def run() -> None:
        launched, config = Launched(), Config.model_validate({"pools": pools} | sections)
        controller = Controller(config, launched, ManualClock())
        await controller.start()
        await body(controller, Scaling(config, launched, controller), launched)
        await controller.stop(0)

    asyncio.run(run())


def told(launched: Launched) -> dict[str, bool]:
    """Whom the gateway knows, and whether they take requests."""
    members: list[Member] = launched.processes["gateway-0#1"].memberships[-1].members
    return {member.peer: member.ready for member in members if member.role == "decode"}


def test_who_is_drained_finishes_ends_and_stays_away() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.lingers = True
        launched.processes["decode-1#1"].lingers = True
        drain = asyncio.create_task(scaling.drain("decode-1", 30))
        await settle()
        assert told(launched) == {"decode-0#1": True, "decode-1#1": False}
        assert launched.processes["decode-1#1"].grace_s == 30
        assert controller.phases()["decode-1"] == "leaving"
        assert not drain.done(), "it has requests to finish"
        launched.processes["decode-1#1"].die("stopped")
        await drain
        assert controller.phases()["decode-1"] == "drained"
        assert launched.released == ["decode-1"], "and nothing is kept for it"
        assert told(launched) == {"decode-0#1": True}
        await settle()
        assert "decode-1#2" not in launched.processes
        await scaling.drain("decode-1", 30)  # is no error
        texts = [event.text for event in await controller.events(0, 0.1)]
        assert texts[:3] == ["decode-1#1 was asked to end", "decode-1#1 is gone: stopped", "decode-1 is drained"]

    play(body)


def test_a_restart_ends_with_another_life_at_once() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        await asyncio.wait_for(scaling.drain("decode-0", 30, restart=True), 1)
        assert told(launched) == {"decode-0#2": True, "decode-1#1": True}
        assert controller.phases()["decode-0"] == "ready"

    play(body)


def test_a_drain_goes_on_when_its_caller_leaves() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        drain = asyncio.create_task(scaling.drain("decode-0", 30))
        await asyncio.sleep(0)
        drain.cancel()
        await settle()
        assert controller.phases()["decode-0"] == "drained"

    play(body)


def test_the_last_one_stays() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        drains = [scaling.drain(f"decode-{number}", 30) for number in (0, 1)]
        results = await asyncio.gather(*drains, return_exceptions=True)
        assert results[0] is None
        assert isinstance(results[1], CapacityError)
        assert "decode-1 is the last decode worker that is ready" in str(results[1])

    play(body)


def test_a_pool_grows_shrinks_and_grows_again() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        assert await scaling.scale("decode", 4) == (["decode-2", "decode-3"], [])
        await settle()
        assert set(told(launched)) == {"decode-0#1", "decode-1#1", "decode-2#1", "decode-3#1"}
        assert await scaling.scale("decode", 4) == ([], [])
        await scaling.drain("decode-0", 0)
        assert await scaling.scale("decode", 1) == ([], ["decode-2", "decode-3"])
        await settle()
        assert told(launched) == {"decode-1#1": True}
        assert await scaling.scale("decode", 3) == (["decode-0", "decode-2"], [])
        await settle()
        assert set(told(launched)) == {"decode-0#2", "decode-1#1", "decode-2#2"}, "a life's name is used once"
        launched.processes["decode-2#2"].die()  # as any other, it is started again
        await settle()
        assert controller.phases()["decode-2"].startswith("restarts in")

    play(body)


def test_who_is_called_back_while_it_leaves_begins_another_life() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.processes["decode-1#1"].lingers = True
        await scaling.scale("decode", 1)
        await settle()
        assert await scaling.scale("decode", 2) == (["decode-1"], [])
        await settle()
        assert told(launched) == {"decode-0#1": True, "decode-1#1": False}
        launched.processes["decode-1#1"].die("stopped")
        await settle()
        assert told(launched) == {"decode-0#1": True, "decode-1#2": True}

    play(body)


def test_who_is_not_ready_leaves_first() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.processes["decode-0#1"].die()
        await settle()
        assert controller.phases()["decode-0"].startswith("restarts in")
        assert await scaling.scale("decode", 1) == ([], ["decode-0"])
        assert told(launched) == {"decode-1#1": True}

    play(body)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda s: s.drain("decode-7"), NotFoundError, "no worker is called 'decode-7'; there are prefill-0, decode-0"),
        (lambda s: s.drain("gateway-0"), RequestError, "a gateway cannot be drained"),
        (lambda s: s.drain("decode-0", float("nan")), RequestError, "grace_s is nan, expected 0 to 86400"),
        (lambda s: s.drain("prefill-0"), CapacityError, "first `tandem scale prefill N`"),
        (lambda s: anext(s.restart("host")), NotFoundError, "no pool 'host'; there are decode, gateway, prefill"),
        (lambda s: anext(s.restart("decode", -1)), RequestError, "grace_s is -1"),
        (lambda s: s.scale("colocated", 2), NotFoundError, "no pool 'colocated'; there are decode, prefill"),
        (lambda s: s.scale("gateway", 2), NotFoundError, "no pool 'gateway'"),
        (lambda s: s.scale("decode", 0), RequestError, "replicas is 0, expected 1 to 1024"),
        (lambda s: s.scale("decode", 6), CapacityError, "decode-5 finds no room"),
        (lambda s: s.scale("prefill", 2), RequestError, "the s3 tier's capacity is divided among the workers"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    call: Callable[[Scaling], Awaitable[object]], kind: type[TandemError], says: str
) -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.room = 3
        with pytest.raises(kind) as caught:
            await call(scaling)
        assert says in str(caught.value)
        await settle()
        assert set(controller.phases().values()) == {"ready"}
        assert len(launched.order) == 4

    tiers = {"tiers": [{"kind": "s3", "capacity": "1GiB", "bucket": "b"}]}
    play(body, TWO, **({"offload": tiers} if "tier's" in says else {}))


def test_a_finishing_drain_keeps_what_runs() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.processes["decode-0#1"].lingers = launched.processes["decode-1#1"].lingers = True
        for number, finish in ((0, False), (1, True)):
            scaling_on = asyncio.create_task(scaling.drain(f"decode-{number}", 30, finish=finish))
            await settle()
            members = launched.processes["gateway-0#1"].memberships[-1].members
            assert [m.hands_over for m in members if m.peer == f"decode-{number}#1"] == [not finish]
            launched.processes[f"decode-{number}#1"].die("stopped")
            await scaling_on
            await scaling.scale("decode", 2)
            await settle()

    play(body)


def test_a_rolling_restart_takes_one_after_the_other() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        seen = []
        async for worker in scaling.restart():
            seen.append(worker)
            assert {role for role, ready in count_ready(controller).items() if not ready} == set()
            with pytest.raises(CapacityError, match="another restart"):
                await anext(scaling.restart())
        await settle()
        assert seen == ["prefill-0", "decode-0", "decode-1", "gateway-0"]
        begun = ["prefill-1#1", "prefill-0#2", "decode-0#2", "decode-1#2", "gateway-1#1", "gateway-0#2"]
        assert launched.order[4:] == begun
        assert controller.phases()["prefill-1"] == "drained", "it lived for the restart alone"
        assert [worker async for worker in scaling.restart("prefill")] == ["prefill-0"]
        assert launched.order[10:] == ["prefill-1#2", "prefill-0#3"]

    play(body)


def count_ready(controller: Controller) -> dict[str, int]:
    counts: dict[str, int] = {}
    for worker in controller.desired:
        counts[worker.role] = counts.get(worker.role, 0) + (worker.phase == "ready")
    return counts


def test_the_second_worker_stays_until_the_first_is_back() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.hold = True
        restart = asyncio.ensure_future(anext(scaling.restart("prefill")))
        await settle()
        launched.processes["prefill-1#1"].is_ready.set()
        await settle()
        assert controller.phases() | {"prefill-0": "reading the model", "prefill-1": "ready"} == controller.phases()
        restart.cancel()
        await settle()
        assert controller.phases()["prefill-1"] == "ready"
        launched.processes["prefill-0#2"].is_ready.set()
        await settle()
        assert (controller.phases()["prefill-0"], controller.phases()["prefill-1"]) == ("ready", "drained")

    play(body)


def test_without_room_the_only_worker_is_restarted_all_the_same() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.room = 0
        assert [worker async for worker in scaling.restart("prefill", 600)] == ["prefill-0"]
        assert launched.order[4:] == ["prefill-0#2"]
        assert launched.processes["prefill-0#1"].grace_s == 5, "who comes meanwhile waits, and not for long"

    play(body)


def test_a_rolling_restart_ends_with_the_first_that_does_not_come_back() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        launched.fails["decode-0#2"] = WorkerError("no memory")
        with pytest.raises(WorkerError, match="decode-0 does not come back"):
            async for _ in scaling.restart("decode"):
                pass
        assert controller.phases()["decode-1"] == "ready"
        assert launched.processes["decode-1#1"].grace_s is None, "it was not touched"

    play(body)


def test_whoever_stops_listening_stops_a_rolling_restart() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        restart = scaling.restart("decode")
        assert await anext(restart) == "decode-0"
        await restart.aclose()
        await settle()
        assert launched.order[4:] == ["decode-0#2"]
        assert [worker async for worker in scaling.restart("decode")] == ["decode-0", "decode-1"]

    play(body)


class Reigned:
    """Lives of a controller, each of which ends without a word when the next begins."""

    def __init__(self, pools: dict[str, Any] = TWO) -> None:
        self.launched = Launched()
        self._config = Config.model_validate({"pools": pools})
        self._state = b""

    async def begin(self) -> tuple[Controller, Scaling]:
        """Another life."""
        if self._state:
            await self._kill()
        self._controller = Controller(self._config, self.launched, ManualClock(), self._keep)
        self._scaling = Scaling(self._config, self.launched, self._controller, self._keep)
        if self._state:
            controller, scaling = msgspec.msgpack.decode(self._state, type=tuple[ControllerState, ScalingState])
            await self._controller.take_over(controller, [], "SIGKILL")
            self._scaling.take_over(scaling)
        else:
            await self._controller.start()
            self._keep()
        await settle()
        return self._controller, self._scaling

    def _keep(self) -> None:
        self._state = msgspec.msgpack.encode((self._controller.state(), self._scaling.state()))

    async def _kill(self) -> None:
        state = self._state
        self._controller._stopping = True
        for task in self._controller._tasks:
            task.cancel()
        await asyncio.gather(*self._controller._tasks, return_exceptions=True)
        self._state = state


def reigned(body: Callable[[Reigned], Awaitable[None]], pools: dict[str, Any] = TWO) -> None:
    async def run() -> None:
        reigned = Reigned(pools)
        await body(reigned)
        await reigned._controller.stop(0)

    asyncio.run(run())


async def all_of(workers: AsyncIterator[str]) -> list[str]:
    return [worker async for worker in workers]


@pytest.mark.parametrize("when", ["before its spare serves", "before it ends", "before it is back", "when it is back"])
def test_a_next_life_goes_on_with_a_rolling_restart(when: str) -> None:
    async def body(reigned: Reigned) -> None:
        launched = reigned.launched
        _, scaling = await reigned.begin()
        launched.hold = True
        launched.processes["prefill-0#1"].lingers = True
        cut_off = asyncio.create_task(all_of(scaling.restart(key="k")))
        await settle()
        if when != "before its spare serves":
            launched.processes["prefill-1#1"].is_ready.set()
            await settle()
            assert launched.processes["prefill-0#1"].grace_s == 600
        if when in ("before it is back", "when it is back"):
            launched.processes["prefill-0#1"].die("stopped")
            await settle()
        if when == "when it is back":
            launched.processes["prefill-0#2"].is_ready.set()
            await settle()
        launched.hold = False
        controller, scaling = await reigned.begin()
        cut_off.cancel()
        with pytest.raises(CapacityError, match="another restart"):
            await anext(scaling.restart(key="another"))
        back = asyncio.create_task(all_of(scaling.restart(key="k")))
        await settle()
        for process in list(launched.processes.values()):
            process.is_ready.set()
        await settle()
        launched.processes["prefill-0#1"].die("stopped")
        assert await asyncio.wait_for(back, 5) == ["prefill-0", "decode-0", "decode-1", "gateway-0"]
        await settle()
        lives = {worker.peer: worker.phase for worker in controller.desired}
        assert lives == {
            "prefill-0#2": "ready", "decode-0#2": "ready", "decode-1#2": "ready", "gateway-0#2": "ready",
            "prefill-1#1": "drained", "gateway-1#1": "drained",
        }  # fmt: skip
        assert await all_of(scaling.restart(key="k")) == ["prefill-0", "decode-0", "decode-1", "gateway-0"]
        assert len(launched.order) == 10, "who asks once more is told, and nothing is begun"
        controller, scaling = await reigned.begin()
        assert len(await all_of(scaling.restart(key="k"))) == 4, "also by a life that has not seen it"
        assert len(launched.order) == 10

    reigned(body)


def test_a_caller_who_does_not_come_back_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling_restart, "_RETURN_S", 0.05)

    async def body(reigned: Reigned) -> None:
        launched = reigned.launched
        _, scaling = await reigned.begin()
        launched.hold = True
        cut_off = asyncio.create_task(all_of(scaling.restart("decode", key="k")))
        await settle()
        controller, scaling = await reigned.begin()
        cut_off.cancel()
        await asyncio.sleep(0.1)
        launched.processes["decode-0#2"].is_ready.set()
        await settle()
        assert launched.order[4:] == ["decode-0#2"]
        assert controller.phases()["decode-0"] == "ready"
        asked_again = scaling.restart("decode", key="k")
        assert await anext(asked_again) == "decode-0"
        with pytest.raises(WorkerError, match="has left; to come were decode-1"):
            await anext(asked_again)

    reigned(body)


def test_who_was_cut_off_asks_again_and_nothing_is_done_twice() -> None:
    async def body(reigned: Reigned) -> None:
        launched = reigned.launched
        _, scaling = await reigned.begin()
        launched.processes["decode-0#1"].lingers = True
        assert await scaling.scale("decode", 3, "s") == (["decode-2"], [])
        drains = [
            asyncio.create_task(scaling.drain("decode-0", 30, restart=True, key="r")),
            asyncio.create_task(scaling.drain("decode-1", 30, key="d")),
        ]
        await settle()
        _, scaling = await reigned.begin()
        for drain in drains:
            drain.cancel()
        assert await scaling.scale("decode", 3, "s") == (["decode-2"], [])
        assert await scaling.scale("decode", 2, "t") == ([], [])
        await asyncio.wait_for(scaling.drain("decode-1", 30, key="d"), 5)
        back = asyncio.create_task(scaling.drain("decode-0", 30, restart=True, key="r"))
        await settle()
        assert not back.done()
        launched.processes["decode-0#1"].die("stopped")
        await asyncio.wait_for(back, 5)
        await asyncio.wait_for(scaling.drain("decode-0", 30, restart=True, key="r"), 5)
        assert launched.order[4:] == ["decode-2#1", "decode-0#2"]

    reigned(body)


def test_nothing_is_scaled_before_the_first_start_is_over() -> None:
    async def run() -> None:
        launched, config = Launched(hold=True), Config()
        controller = Controller(config, launched, ManualClock())
        start = asyncio.create_task(controller.start())
        scaling = Scaling(config, launched, controller)
        await settle()
        assert scaling.lacking() == ["decode", "gateway", "prefill"]
        with pytest.raises(CapacityError, match="still starting"):
            await scaling.scale("decode", 2)
        for process in launched.processes.values():
            process.is_ready.set()
        await start
        assert scaling.lacking() == []
        await controller.stop(0)

    asyncio.run(run())


def test_workers_that_share_experts_come_and_go_together() -> None:
    async def body(controller: Controller, scaling: Scaling, launched: Launched) -> None:
        for attempt in (scaling.drain("decode-0"), scaling.scale("decode", 3), anext(scaling.restart("decode"))):
            with pytest.raises(RequestError, match="share experts in groups of 2"):
                await attempt

    play(body, {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}, experts={"parallel": 2})
