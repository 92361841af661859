"""The controller dies, and nobody else notices: its next life goes on where it ended."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

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
    """SIGKILL; returns when its next life has taken over."""
    before = served.controller()
    before.kill()
    wait_for(lambda: told(served).count("and was started again; 3 workers were taken over") == times, 60, "a next life")
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
        processes = served.tree()
        assert served.stop() == 0, served.text()
        wait_for(lambda: not living(processes), 5, "all processes to end")
        assert watcher.wait(stretched(5)) == 1, "its cluster has ended"
    finally:
        watcher.kill()
        watcher.wait()
    traces.check()
