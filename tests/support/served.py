"""A real `tandem serve`, as a user starts it, and what tests want to know about its processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

TANDEM = str(Path(sys.executable).with_name("tandem"))
START_TIMEOUT_S = 120


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until ``condition`` gives something true, and return that."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)


class Served:
    """One `tandem serve` in a process group of its own.

    Args:
        home: for its caches and logs.
        arguments: after `tandem serve`.
    """

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = home / "serve.out"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [TANDEM, "serve", "--set", f"gateway.port={self.port}", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"XDG_CACHE_HOME": str(home), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self.started_s = time.monotonic()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait_ready(self) -> None:
        """Until the URL is printed."""

        def ready() -> bool:
            assert self.process.poll() is None, f"serve ended:\n{self.text()}"
            return "stop: Ctrl-C" in self.text()

        wait_for(ready, START_TIMEOUT_S, "serve to be ready")

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text()

    def logs(self) -> str:
        """What its processes have logged."""
        return "".join(path.read_text() for path in sorted(self.home.glob("tandem/logs/*/*.log")))

    def tree(self) -> list[psutil.Process]:
        """Every process that it started, itself included, as found by the session that they share or their parents."""
        try:
            root = psutil.Process(self.process.pid)
        except psutil.NoSuchProcess:
            return []
        return [root, *root.children(recursive=True)]

    def worker(self, name: str) -> psutil.Process:
        """The process of "prefill-0", "decode-0" or "gateway-0": found by its log file."""

        def find() -> psutil.Process | None:
            newest = None
            for process in self.tree():
                try:
                    if any(re.search(rf"/{name}#\d+\.log$", file.path) for file in process.open_files()):
                        newest = process
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            return newest

        found = wait_for(find, 30, f"a process of {name}")
        assert isinstance(found, psutil.Process)
        return found

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions; must succeed."""
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
                if all(found.get(key) == value for key, value in labels.items()):
                    total += float(match[2])
        return total

    def stages(self, request_id: str) -> list[str]:
        """What has happened to a request so far."""
        answer = self.client.get(f"/debug/requests/{request_id}")
        return [stage["stage"] for stage in answer.json()["stages"]] if answer.status_code == 200 else []

    def used_blocks(self) -> dict[str, float]:
        """Blocks in use, by worker."""
        return {w: self.metric("tandem_kv_blocks", worker=w, state="used") for w in ("prefill-0", "decode-0")}

    def wait_idle(self, timeout_s: float = 10) -> None:
        """Until no request, block or lease is left on either side."""

        def idle() -> bool:
            return (
                not any(self.used_blocks().values())
                and self.metric("tandem_leases") == 0
                and self.metric("tandem_requests_in_flight") == 0
            )

        wait_for(idle, timeout_s, "blocks and leases back at zero")

    def wait_routable(self, timeout_s: float = 60) -> None:
        """Until prefill and decode serve together."""

        def routable() -> bool:
            try:
                return self.client.get("/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(routable, timeout_s, "/readyz")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal to the whole group, as a terminal does; returns the exit status."""
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """Clean up after a failed test: whatever is left of the group."""
        self.client.close()
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(timeout=30)
