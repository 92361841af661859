"""`tandem drain`, `scale` and `watch` on a real cluster under load."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest
from support.load import Load, ask_all, body, check
from support.patience import stretched
from support.served import TANDEM, Served, wait_for

pytestmark = pytest.mark.e2e


class Operator:
    """Runs commands as the user of a served cluster."""

    def __init__(self, served: Served) -> None:
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(served.home), "PYTHONUNBUFFERED": "1"}

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run one, which must end with ``status``; what it says."""
        done = subprocess.run(
            [TANDEM, *arguments],
            capture_output=True,
            text=True,
            timeout=stretched(100),
            env=self.environment,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if status == 0 else done.stderr


def test_workers_come_and_go_under_load_and_no_request_fails(tmp_path: Path) -> None:
    served = Served(tmp_path, "--set", "pools.decode.cpus_per_replica=0.4", "--set", "kv.capacity=64MiB")
    try:
        served.wait_ready()
        operator = Operator(served)
        bodies = [body(i, max_tokens=48) for i in range(24)]
        golden = [answer.tokens for answer in ask_all(served.url, bodies, at_once=6)]
        watch_out = tmp_path / "watch.out"
        with watch_out.open("w") as output:
            watcher = subprocess.Popen([TANDEM, "watch"], stdout=output, env=operator.environment)
        assert "decode-0 is the last decode worker that is ready" in operator.run("drain", "decode-0", status=1)
        assert "needs 0.4 CPUs on one node" in operator.run("scale", "decode", "1000", status=1)
        assert operator.run("scale", "decode", "2") == "starting decode-1\n"
        wait_for(lambda: "decode-1#1 is ready" in watch_out.read_text(), 60, "decode-1")
        wait_for(lambda: served.metric("tandem_members", role="decode") == 2, 10, "the gateway to know")
        over = threading.Event()
        endless = itertools.takewhile(lambda _: not over.is_set(), itertools.cycle(bodies))
        with Load(served.url, endless, at_once=6) as load:
            try:
                wait_for(lambda: served.metric("tandem_requests_in_flight") > 3, 20, "load")
                assert operator.run("drain", "decode-0", "--restart") == "decode-0 is ready again\n"
                assert operator.run("drain", "decode-1", "--grace-s", "0.2") == "decode-1 is drained\n"
            finally:
                over.set()
        answers = load.answers()
        assert len(answers) > len(bodies)
        check(answers, itertools.islice(itertools.cycle(golden), len(answers)))
        operator.run("drain", "decode-1")
        assert operator.run("scale", "decode", "1") == "the decode pool has 1 already\n"
        text = watch_out.read_text()
        for event in ("decode-0#1 was asked to end", "decode-0#2 is ready", "decode-1 is drained"):
            assert event in text, text
        token = json.loads(next(tmp_path.glob("tandem/logs/*/control.json")).read_text())["token"]
        assert token not in served.logs() + served.text()
        for process in served.tree():
            assert token not in " ".join([*process.cmdline(), *process.environ().values()])
        served.wait_idle()
        assert served.stop() == 0, served.text()
        assert watcher.wait(stretched(20)) == 1, "its cluster has ended"
        assert not list(tmp_path.glob("tandem/logs/*/control.json"))
    finally:
        served.kill()
