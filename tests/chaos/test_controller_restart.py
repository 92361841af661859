"""The controller dies, and nobody else notices: its next life goes on where it ended."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from support.gateway import wait_for
from support.living import living
from support.load import Load, ask_all, body, check
from support.patience import stretched
from support.served import TANDEM, Served
from support.traces import Traces

pytestmark = pytest.mark.chaos

SETTINGS = (
    "--set", "pools.decode={replicas: 2, cpus_per_replica: 0.4}", "--set", "pools.prefill={cpus_per_replica: 0.4}",
    "--set", "kv.capacity=64MiB", "--set", "routing.local_prefill=never",
)  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, *SETTINGS)
    try:
        served.wait_ready()
        served.wait_routable()
        yield served
    finally:
        served.kill()


def told(served: Served) -> str:
    """What serve has printed, in one line."""
    return " ".join(served.text().split())


def tandem(served: Served, *arguments: str) -> str:
    """Run a command as the cluster's user."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(served.home), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [TANDEM, *arguments], capture_output=True, text=True, timeout=stretched(100), env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lives(served: Served) -> dict[str, tuple[str, str]]:
    """Of each worker, its life and state."""
    rows = [json.loads(line) for line in tandem(served, "status", "--json").splitlines()]
    return {row["worker"]: (row["peer"], row["phase"]) for row in rows}


def kill_controller(served: Served, times: int) -> None:
    """SIGKILL; returns when its next life, the ``times``-th after the first, has taken over."""
    before = served.controller()
    before.kill()
    taken = re.compile(r"and was started again; \d workers were taken over")
    wait_for(lambda: len(taken.findall(told(served))) == times, 60, "a next life")
    assert served.controller().pid != before.pid


def test_nobody_notices_that_the_controller_dies(served: Served, tmp_path: Path) -> None:
    traces = Traces()
    bodies = [body(i, max_tokens=100) for i in range(12)]
    golden = [answer.tokens for answer in ask_all(served.url, bodies, at_once=6)]
    assert tandem(served, "scale", "decode", "1") == "draining decode-1\n"
    wait_for(lambda: "decode-1 is drained" in told(served), 30, "decode-1 to leave")
    names = ("prefill-0", "decode-0", "gateway-0")
    before = {name: served.worker(name).pid for name in names}
    [note] = tmp_path.glob("tandem/logs/*/control.json")
    credentials = note.read_text()
    watch_out = tmp_path / "watch.out"
    with watch_out.open("w") as output:
        watcher = subprocess.Popen(
            [TANDEM, "watch", "--control", str(note)], stdout=output, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
    try:
        wait_for(lambda: "decode-1 is drained" in watch_out.read_text(), 30, "watch")
        over = threading.Event()
        endless = itertools.takewhile(lambda _: not over.is_set(), itertools.cycle(bodies))
        with Load(served.url, endless, at_once=6) as load:
            try:
                wait_for(lambda: served.metric("tandem_requests_in_flight") > 3, 20, "load")
                kill_controller(served, 1)
                kill_controller(served, 2)
                assert told(served).count("3 workers were taken over") == 2
                assert {name: served.worker(name).pid for name in names} == before
                states = lives(served)
                assert states["decode-1"] == ("decode-1#1", "drained")
                assert {states[name] for name in names} == {(f"{name}#1", "ready") for name in names}
                psutil.Process(before["prefill-0"]).kill()
                wait_for(lambda: "prefill-0#2 is ready" in told(served), 60, "prefill-0's next life")
                assert tandem(served, "scale", "decode", "2") == "starting decode-1\n"
                wait_for(lambda: served.metric("tandem_members", role="decode") == 2, 60, "decode-1 to come back")
            finally:
                over.set()
        answers = load.answers()
        assert len(answers) > len(bodies)
        check(answers, itertools.islice(itertools.cycle(golden), len(answers)))
        served.complete(prompt=list(range(5, 400)), max_tokens=2)
        assert lives(served) == {
            "prefill-0": ("prefill-0#2", "ready"), "decode-0": ("decode-0#1", "ready"),
            "decode-1": ("decode-1#2", "ready"), "gateway-0": ("gateway-0#1", "ready"),
        }  # fmt: skip
        assert note.read_text() == credentials
        served.wait_idle()
        wait_for(lambda: "decode-1#2 is ready" in watch_out.read_text(), 30, "watch to go on")
        assert watch_out.read_text().count("was started again") == 2
        assert "Task ControllerActor" not in served.text()
        assert "(raylet)" not in served.text(), "of prefill-0's death we tell ourselves"
        processes = served.tree()
        assert served.stop() == 0, served.text()
        wait_for(lambda: not living(processes), 5, "all processes to end")
        assert watcher.wait(stretched(5)) == 1, "its cluster has ended"
    finally:
        watcher.kill()
        watcher.wait()
    traces.check()


def test_a_rolling_restart_goes_on_when_the_controller_dies(served: Served, tmp_path: Path) -> None:
    bodies = [body(i, max_tokens=100) for i in range(12)]
    golden = [answer.tokens for answer in ask_all(served.url, bodies, at_once=6)]
    over, restart_out = threading.Event(), tmp_path / "restart.out"
    endless = itertools.takewhile(lambda _: not over.is_set(), itertools.cycle(bodies))
    with Load(served.url, endless, at_once=6) as load, restart_out.open("w") as output:
        restart = None
        try:
            wait_for(lambda: served.metric("tandem_requests_in_flight") > 3, 20, "load")
            environment = {**os.environ, "XDG_CACHE_HOME": str(served.home), "PYTHONUNBUFFERED": "1"}
            restart = subprocess.Popen([TANDEM, "restart"], stdout=output, stderr=subprocess.STDOUT, env=environment)
            # While the only prefill worker has a second one beside it, in the midst, and while the gateways change.
            for times, event in enumerate(
                ("prefill-0#1 was asked to end", "decode-0 is ready again", "gateway-0#1 was asked to end"), 1
            ):
                wait_for(lambda event=event: event in told(served) + restart_out.read_text(), 100, event)
                kill_controller(served, times)
            assert restart.wait(stretched(100)) == 0, restart_out.read_text()
        finally:
            over.set()
            if restart is not None:
                restart.kill()
                restart.wait()
    names = ("prefill-0", "decode-0", "decode-1", "gateway-0")
    assert restart_out.read_text().splitlines() == [f"{name} is ready again" for name in names]
    answers = load.answers()
    assert len(answers) > len(bodies)
    assert check(answers, itertools.islice(itertools.cycle(golden), len(answers))) == 0
    spares = dict.fromkeys(("prefill-1", "gateway-1"), "drained")
    wait_for(lambda: {name: lives(served)[name][1] for name in spares} == spares, 30, "spare workers to leave")
    states = lives(served)
    assert {name: states[name] for name in names} == {name: (f"{name}#2", "ready") for name in names}
    assert set(states) == {*names, *spares}
    served.wait_idle()
    assert served.stop() == 0, served.text()


@pytest.mark.parametrize("replicas", [1, 2])
def test_gateways_are_restarted_and_nobody_is_refused(tmp_path: Path, replicas: int) -> None:
    """Neither those whose connections stay, nor those who connect for each request."""
    served = Served(tmp_path, *SETTINGS, "--set", f"gateway.replicas={replicas}")
    try:
        served.wait_ready()
        served.wait_routable()
        bodies = [body(i, max_tokens=100) for i in range(12)]
        golden = [answer.tokens for answer in ask_all(served.url, bodies, at_once=6)]
        over = threading.Event()
        endless = itertools.takewhile(lambda _: not over.is_set(), itertools.cycle(bodies))
        statuses: Counter[int] = Counter()

        def connect() -> None:
            while not over.wait(0.01):
                with httpx.Client(timeout=60, trust_env=False, verify=False) as client:
                    statuses[client.get(f"{served.url}/livez").status_code] += 1

        with Load(served.url, endless, at_once=3) as load, ThreadPoolExecutor(2) as clients:
            try:
                connecting = [clients.submit(connect) for _ in range(2)]
                for turn in (2, 3):
                    names = [f"gateway-{number}" for number in range(replicas)]
                    assert tandem(served, "restart", "gateway").splitlines() == [f"{n} is ready again" for n in names]
                    states = lives(served)
                    assert {name: states[name] for name in names} == {n: (f"{n}#{turn}", "ready") for n in names}
            finally:
                over.set()
            for client in connecting:
                client.result()
        answers = load.answers()
        assert len(answers) > len(bodies)
        assert check(answers, itertools.islice(itertools.cycle(golden), len(answers))) == 0
        assert set(statuses) == {200}
        assert statuses[200] > 20
        served.wait_idle()
        assert served.stop() == 0, served.text()
    finally:
        served.kill()
