"""`tandem up` to the first token, on a Ray cluster of two nodes that runs already, and where the time goes. JSON lines.

The nodes are two of this machine's, on the loopback address, with one logical CPU each, so that prefill and decode are
on different ones. Everything is installed, and the first launch, which compiles kernels, is not counted.

Usage: python -m tandem.bench.launch [REPEATS] [NODES]
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from ..core.environment import separate_ray
from .machine import describe

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_TANDEM = [sys.executable, "-c", "from tandem.cluster.cli import main; main()"]
_MUST_S, _AIM_S = 45.0, 25.0
_LINE = re.compile(r"\[ *[\d.]+ s\] (.*)")


class _Nodes:
    """A Ray cluster of this machine.

    Args:
        count: of its nodes.
    """

    def __init__(self, count: int) -> None:
        # Sockets live below it, and their paths must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="launch-"))
        self.environment = separate_ray()
        address = f"127.0.0.1:{_free_port()}"
        try:
            for number in range(count):
                place = [f"--address={address}"]
                if number == 0:
                    port = address.rpartition(":")[2]
                    place = ["--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
                subprocess.run(
                    [*_RAY, "start", *place, "--num-cpus=1", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
                     "--object-store-memory=80000000"],
                    env=self.environment, check=True, capture_output=True, timeout=300,
                )  # fmt: skip
        except BaseException:
            self.close()
            raise
        self.environment["RAY_ADDRESS"] = address

    def close(self) -> None:
        """End its processes, and remove its files."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(file.path.startswith(f"{self._folder}/") for file in process.open_files()):
                    process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _launch(nodes: _Nodes) -> dict[str, object]:
    """One launch: seconds to the first token, and of each part. What it started has ended afterwards."""
    port = _free_port()
    marks: dict[str, float] = {}
    began_s = time.perf_counter()

    def mark(name: str) -> None:
        marks.setdefault(name, round(time.perf_counter() - began_s, 2))

    command = [*_TANDEM, "up", "--set", f"gateway.port={port}"]
    with subprocess.Popen(
        command, env=nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as up:
        assert up.stdout is not None
        told = []
        for line in up.stdout:
            told.append(line)
            found = _LINE.match(line)
            phase = found[1] if found else line.strip()
            if phase.startswith("starting the workers"):
                mark("command")
            for word, name in (("reading the model", "processes"), ("weights", "processes"), ("warm-up", "weights")):
                if word in phase:
                    mark(name)
            if phase == "ready":
                mark("ready")
        if up.wait() != 0:
            raise RuntimeError("".join(told))
    mark("told")
    body = {"model": "tandem-demo", "prompt": "import os", "max_tokens": 1, "temperature": 0, "stream": True}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(line for line in answer.iter_lines() if line.startswith("data: {"))
            mark("first_token")
    done = subprocess.run([*_TANDEM, "down"], env=nodes.environment, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    ends = sorted(marks.items(), key=lambda item: item[1])
    starts = [0.0, *(end for _, end in ends)]
    parts = {name: round(end - start, 2) for (name, end), start in zip(ends, starts, strict=False)}
    return {"seconds": marks["first_token"], "parts_s": parts, "load_average": round(psutil.getloadavg()[0], 1)}


def main() -> None:
    """Print a line a launch, and one of all."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    nodes = _Nodes(count)
    runs = []
    try:
        for number in range(-1, repeats):
            run = _launch(nodes)
            if number >= 0:
                runs.append(run)
                print(json.dumps({"bench": "launch", "run": number, **run}), flush=True)
    finally:
        nodes.close()
    seconds = [float(str(run["seconds"])) for run in runs]
    summary = {
        "bench": "launch",
        "nodes": count,
        "runs": repeats,
        "p50_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "must_s": _MUST_S,
        "aim_s": _AIM_S,
        "met": statistics.median(seconds) <= _MUST_S,
        "machine": describe(),
    }
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
