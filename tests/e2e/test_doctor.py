"""`tandem doctor` as a user runs it: without Ray, beside a running server, with mistakes, and interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.patience import stretched
from support.served import TANDEM, Served, free_port, wait_for

pytestmark = pytest.mark.e2e

CLEANUP_S = 20


class Doctor:
    """Runs the command with a folder of its own for everything that it might leave."""

    def __init__(self, home: Path) -> None:
        # Sockets live below it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="d-"))
        self.environment = os.environ | {"XDG_CACHE_HOME": str(home), "TMPDIR": str(self.folder), "COLUMNS": "200"}
        self.environment.pop("RAY_ADDRESS", None)
        self.limit_s = round(stretched(60))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [TANDEM, "doctor", "--limit-s", str(self.limit_s), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, start_new_session=True,
        )  # fmt: skip

    def rows(self, *arguments: str, status: int) -> list[dict[str, Any]]:
        """Of a run that ends with this exit status; the last is the summary."""
        start_s = time.monotonic()
        process = self.start("--json", *arguments)
        out, err = process.communicate(timeout=self.limit_s + stretched(CLEANUP_S + 30))
        assert process.returncode == status, out + err
        assert time.monotonic() - start_s < self.limit_s + stretched(CLEANUP_S)
        assert "Traceback" not in err
        return [json.loads(line) for line in out.splitlines()]

    def check_clean(self) -> None:
        """No process uses its folder, and nothing is in it."""

        def users() -> list[psutil.Process]:
            found = []
            for process in psutil.process_iter():
                try:
                    if any(file.path.startswith(f"{self.folder}/") for file in process.open_files()):
                        found.append(process)
                except psutil.Error:
                    continue
            return found

        wait_for(lambda: not users(), 10, "the doctor's processes to end")
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def doctor(tmp_path: Path) -> Iterator[Doctor]:
    doctor = Doctor(tmp_path)
    yield doctor
    shutil.rmtree(doctor.folder, ignore_errors=True)


def test_without_ray_it_brings_its_own(doctor: Doctor) -> None:
    *rows, summary = doctor.rows("--set", f"gateway.port={free_port()}", status=0)
    assert summary["verdict"] == "ok"
    assert summary["fail"] == 0
    assert summary["ok"] + summary["warn"] == len(rows)
    assert {row["section"] for row in rows} == {"Ray", "gateway", "software", "host", "GPU", "network", "KV links"}
    assert all(row["fix"] for row in rows if row["verdict"] != "ok")
    checks = {row["check"]: row for row in rows}
    assert "a private one" in checks["Ray"]["measured"]
    assert {"place of prefill-0", "place of decode-0"} <= checks.keys()
    links = {row["check"]: row for row in rows if row["section"] == "KV links"}
    assert all(row["where"] == "decode-0 ← prefill-0" for row in links.values())
    for name in ("shm", "zmq"):
        assert "GB/s" in links[name]["measured"]
    assert links["would be used"]["measured"].partition(" ")[0] == "shm"
    doctor.check_clean()


def test_checks_that_fail_and_the_table(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = doctor.start(
            "--set", f"gateway.port={port}", "--set", "kv.transport=zmq", "--set", "kv.require_rdma=true"
        )
        out, err = process.communicate(timeout=doctor.limit_s + stretched(CLEANUP_S + 30))
    assert process.returncode == 1, out + err
    assert f"cannot listen on 127.0.0.1:{port}" in out
    assert "nothing works: zmq: it would move KV by plain" in out
    assert "or leave kv.require_rdma out" in out
    assert "2 fail" in out.splitlines()[-1]
    doctor.check_clean()


def test_bad_usage_is_status_2(doctor: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("kv: {block_token: 3}\n")
    for arguments in ([str(file)], ["--set", "kv.nope=1"], ["--limit-s", "0"], ["--nope"]):
        process = doctor.start(*arguments)
        _, err = process.communicate(timeout=stretched(60))
        assert process.returncode == 2, arguments
        assert err
        assert "Traceback" not in err
    doctor.check_clean()


def test_a_cluster_that_is_not_there_fails_and_the_host_is_looked_at(doctor: Doctor) -> None:
    *rows, summary = doctor.rows("--address", f"127.0.0.1:{free_port()}", status=1)
    failed = [row for row in rows if row["verdict"] == "fail"]
    assert summary["fail"] == len(failed)
    assert "no Ray cluster at" in next(row for row in failed if row["section"] == "Ray")["measured"]
    assert any(row["check"] == "shared memory" for row in rows)
    doctor.check_clean()


@pytest.mark.parametrize("after_s", [2.0, 5.0])
def test_a_signal_ends_it(doctor: Doctor, after_s: float) -> None:
    process = doctor.start("--set", f"gateway.port={free_port()}")
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=stretched(60))
    assert process.returncode == 1
    assert "Traceback" not in err
    doctor.check_clean()


def test_beside_a_running_server(served: Served, doctor: Doctor) -> None:
    doctor.environment["XDG_CACHE_HOME"] = str(served.home)
    before = {name: served.worker(name).pid for name in ("prefill-0", "decode-0", "gateway-0")}
    *rows, summary = doctor.rows(status=0)
    checks = {row["check"]: row for row in rows}
    assert "3 processes run here" in checks["Tandem"]["measured"]
    assert checks["port"]["measured"] == f"127.0.0.1:{served.port} is in use, as Tandem runs"
    assert checks["would be used"]["measured"].partition(" ")[0] == "shm"
    assert summary["fail"] == 0
    assert {name: served.worker(name).pid for name in before} == before
    used = served.worker("decode-0").parent()
    assert used is not None
    wait_for(lambda: not [p for p in used.children() if "Probe" in p.name()], 10, "the probes to end")
    served.complete(prompt=list(range(5, 100)), max_tokens=2)
    doctor.check_clean()
