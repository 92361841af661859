"""Several hosts on one machine: namespaces on a bridge, each with an address of its own, whose links can be cut and slowed.
And a Ray cluster on them. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from .served import TANDEM

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_BOOT = """
mount -t proc proc /proc && mount --bind "$1" "$2" && exec "$3" -c "
import os, time
print('up', flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
"
"""
_LEFT = """
import json, ray
from ray.util import placement_group_table
ray.init(address="auto", namespace="tandem", log_to_driver=False, configure_logging=False)
groups = [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
print(json.dumps({"groups": groups, "named": ray.util.list_named_actors()}))
"""
_ACTORS = """
import json, ray
from ray._private.state import actors
ray.init(address="auto", namespace="tandem", log_to_driver=False, configure_logging=False)
print(json.dumps([actor["ActorClassName"] for actor in actors(actor_state_name="ALIVE").values()]))
"""


class Host:
    """One namespace for its network, and one for its processes, which see no others."""

    def __init__(self, name: str, address: str, folder: Path, ray_folder: Path) -> None:
        self.name = name
        self.address = address
        self._folders = [str(folder), str(ray_folder)]
        self._init: subprocess.Popen[bytes] | None = None
        self._first = 0

    @property
    def prefix(self) -> list[str]:
        """What runs with it runs in the host. Boots it if need be."""
        if self._init is None:
            command = [
                "ip",
                "netns",
                "exec",
                self.name,
                "unshare",
                "-m",
                "-p",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                _BOOT,
            ]
            self._init = subprocess.Popen(
                [*command, "sh", *self._folders, sys.executable], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert self._init.stdout is not None
            assert self._init.stdout.readline() == b"up\n"
            [first] = psutil.Process(self._init.pid).children()
            self._first = first.pid
        return ["nsenter", "-t", str(self._first), "-m", "-p", "-n", "--"]

    def pids(self) -> list[int]:
        """Of the processes in it."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def process(self, log: str) -> psutil.Process:
        """The process here that writes a log whose name begins so."""
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if any(Path(file.path).name.startswith(log) for file in process.open_files()):
                    return process
        raise AssertionError(f"no process of {log} at {self.address}")

    def kill(self) -> None:
        """Everything in it dies at once. Idempotent."""
        if self._init is not None and self._init.stdout is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)
            self._init.wait(timeout=30)
            self._init.stdout.close()
            self._init = None

    def cut(self) -> None:
        """Every packet is lost from now on."""
        _run("ip", "link", "set", f"{self.name}v", "down")

    def restore(self) -> None:
        """The link is back."""
        _run("ip", "link", "set", f"{self.name}v", "up")

    def slow(self, rate: str) -> None:
        """What comes to it comes at this rate."""
        _run(
            "tc",
            "qdisc",
            "add",
            "dev",
            f"{self.name}v",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "64kb",
            "latency",
            "400ms",
        )

    def full_speed(self) -> None:
        """As before `slow`."""
        _run("tc", "qdisc", "del", "dev", f"{self.name}v", "root")


class Hosts:
    """So many hosts; this machine reaches them, too."""

    def __init__(self, count: int) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
            pytest.skip("network namespaces need root and iproute2")
        name, third = f"th{secrets.token_hex(3)}", secrets.randbelow(200) + 20
        self._bridge = f"{name}b"
        self._folder = Path(tempfile.mkdtemp(prefix="h"))
        self.ray_folder = self._folder / "r"
        """Ray notes there which node it belongs to, and has its sockets there, whose paths must be short: each host has
        a folder of its own in its place."""
        self.ray_folder.mkdir()
        self.hosts: list[Host] = []
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "addr", "add", f"10.214.{third}.1/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            for number in range(count):
                (self._folder / str(number)).mkdir()
                self._add(
                    Host(
                        f"{name}{number}", f"10.214.{third}.{10 + number}", self._folder / str(number), self.ray_folder
                    )
                )
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")

    def _add(self, host: Host) -> None:
        _run("ip", "netns", "add", host.name)
        self.hosts.append(host)
        _run("ip", "link", "add", f"{host.name}v", "type", "veth", "peer", "eth0", "netns", host.name)
        _run("ip", "link", "set", f"{host.name}v", "master", self._bridge, "up")
        _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run("ip", "-n", host.name, "link", "set", "eth0", "up")
        _run("ip", "-n", host.name, "link", "set", "lo", "up")
        # It leads nowhere; Ray asks the system which address it would be left by.
        _run("ip", "-n", host.name, "route", "add", "default", "via", host.address.rpartition(".")[0] + ".1")

    def close(self) -> None:
        """Kill what runs in them, and remove them."""
        for host in self.hosts:
            host.kill()
            subprocess.run(["ip", "link", "del", f"{host.name}v"], capture_output=True)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)


class RayHosts:
    """A Ray cluster over hosts: the first is its head, and computes nothing. `tandem` runs on the second.

    Args:
        home: for Tandem's caches and logs.
        hosts: at least two.
        cpus: logical ones of each but the head.
    """

    def __init__(self, home: Path, hosts: Hosts, cpus: int) -> None:
        self.hosts = hosts.hosts
        self._ray_folder = hosts.ray_folder
        self._cpus = cpus
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "XDG_CACHE_HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200", "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(hosts.ray_folder / "gcs"), "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
        }  # fmt: skip
        self.address = f"{self.hosts[0].address}:6379"
        try:
            self.start_head()
            for host in self.hosts[1:]:
                self.start(host)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayHosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_head(self) -> None:
        """Or start it again."""
        self._ray_start(
            self.hosts[0],
            "--head",
            "--port=6379",
            f"--temp-dir={self._ray_folder}",
            "--include-dashboard=false",
            "--num-cpus=0",
        )

    def start(self, host: Host) -> None:
        """Have a host join."""
        self._ray_start(host, f"--address={self.address}", f"--num-cpus={self._cpus}")

    def _ray_start(self, host: Host, *arguments: str) -> None:
        done = subprocess.run(
            [*host.prefix, *_RAY, "start", *arguments, f"--node-ip-address={host.address}", "--disable-usage-stats",
             "--object-store-memory=80000000"],
            env=self.environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def tandem(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `tandem` on the second host."""
        return subprocess.run(
            [*self.hosts[1].prefix, TANDEM, *arguments], capture_output=True, text=True, timeout=300,
            env=self.environment | {"RAY_ADDRESS": self.address} | environment,
        )  # fmt: skip

    def status(self) -> dict[str, dict[str, Any]]:
        """Rows of `tandem status`, by worker."""
        done = self.tandem("status", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return {row["worker"]: row for row in map(json.loads, done.stdout.splitlines())}

    def left(self) -> dict[str, list[str]]:
        """Placement groups and named actors that Ray knows."""
        return dict(self._told(_LEFT))

    def actors(self) -> Counter[str]:
        """How many live actors Ray knows, by class."""
        return Counter(self._told(_ACTORS))

    def _told(self, program: str) -> Any:
        done = subprocess.run(
            [*self.hosts[1].prefix, sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
            env=self.environment | {"RAY_ADDRESS": self.address},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def close(self) -> None:
        """End every process of the cluster."""
        for host in self.hosts:
            host.kill()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
