"""A Ray cluster of two nodes on two networks, and `tandem` on it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from .gateway import free_port
from .netns import Network
from .patience import stretched
from .served import TANDEM

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class RayNodes:
    """The head on this host, the other node in the network's namespace; one logical CPU each.

    Args:
        home: for Tandem's caches and logs.
        network: between them.
    """

    def __init__(self, home: Path, network: Network) -> None:
        # Sockets live below it, and their paths must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-test-"))
        port = free_port()
        self._environment = os.environ | {
            "XDG_CACHE_HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200",
        }  # fmt: skip
        common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=80000000"]
        address = f"{network.near}:{port}"
        try:
            self._run(
                *_RAY, "start", "--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false",
                f"--node-ip-address={network.near}", *common,
            )  # fmt: skip
            self._run(
                *network.prefix, *_RAY, "start", f"--address={address}", f"--node-ip-address={network.far}", *common
            )
        except BaseException:
            self.close()
            raise
        self._environment["RAY_ADDRESS"] = address

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tandem(self, *arguments: str) -> str:
        """Run `tandem`, which must succeed; returns what it prints."""
        return self._run(TANDEM, *arguments)

    def restarts(self) -> dict[str, int]:
        """Of each worker."""
        rows = [json.loads(line) for line in self.tandem("status", "--json").splitlines()]
        return {row["worker"]: row["restarts"] for row in rows}

    def close(self) -> None:
        """End every process that uses the cluster's folder, and remove it."""
        for process in psutil.process_iter():
            try:
                if any(file.path.startswith(str(self._folder)) for file in process.open_files()):
                    process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=stretched(180))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
