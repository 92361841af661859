"""A real `tandem serve`, as a user starts it, and what tests want to know about its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .gateway import Gateway, free_port, wait_for
from .patience import stretched

TANDEM = str(Path(sys.executable).with_name("tandem"))
START_TIMEOUT_S = 120


class Served(Gateway):
    """One `tandem serve` in a process group of its own.

    Args:
        home: for its caches and logs.
        arguments: after `tandem serve`.
    """

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        super().__init__(free_port())
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

    def controller(self) -> psutil.Process:
        """The controller's process."""

        def find() -> psutil.Process | None:
            for process in self.tree():
                try:
                    if any(file.path.endswith("/controller.log") for file in process.open_files()):
                        return process
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            return None

        found = wait_for(find, 30, "the controller's process")
        assert isinstance(found, psutil.Process)
        return found

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal to the whole group, as a terminal does; returns the exit status."""
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        return self.process.wait(timeout=stretched(60))

    def kill(self) -> None:
        """Clean up after a failed test: whatever is left of the group."""
        self.client.close()
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(timeout=stretched(30))
