"""Real worker and gateway processes, started in two seconds: the test is their controller, and there is no Ray.

Each worker can have a configuration of its own, and a test says who is told of whom.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from tandem.core.messages import Member, Membership
from tandem.core.wire import ClusterKeys, make_cluster_keys

from .gateway import Gateway, free_port, wait_for

MAIN = str(Path(__file__).with_name("worker_main.py"))

Sections = Mapping[str, Mapping[str, Any]]


def merged(*configs: Sections) -> dict[str, dict[str, Any]]:
    """Sections of a configuration, the later ones' keys over the earlier ones'."""
    result: dict[str, dict[str, Any]] = {}
    for config in configs:
        for name, section in config.items():
            result[name] = {**result.get(name, {}), **section}
    return result


class Process:
    """One life of a worker or gateway.

    Args:
        worker: "prefill-0".
        life: which, counted from 1.
        config: its own.
        keys: the cluster's.
        folder: for its log.
        address: where it listens.
        prefix: what its command line begins with.
    """

    def __init__(
        self, worker: str, life: int, config: Sections, keys: ClusterKeys, folder: Path, address: str, prefix: list[str]
    ) -> None:
        self.worker = worker
        self.life = life
        self.role = worker.rpartition("-")[0]
        self.peer = f"{worker}#{life}"
        self.log = folder / f"{self.peer}.log"
        self.member: Member | None = None
        self._process = subprocess.Popen(
            [*prefix, sys.executable, MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        who = {
            "peer": self.peer, "role": self.role, "config": config, "keys": msgspec.msgpack.encode(keys).hex(),
            "address": address, "node": address, "log": str(self.log),
        }  # fmt: skip
        self.tell(json.dumps(who))
        self.system = psutil.Process(self._process.pid)

    def wait_ready(self) -> None:
        """Until it serves."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self.peer} did not start: {self.log.read_text()[-3000:] if self.log.exists() else ''}"
        self.member = msgspec.msgpack.decode(bytes.fromhex(line), type=Member)

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        self._process.kill()
        self._process.communicate()

    def stop(self, grace_s: float) -> int:
        """Let it drain and end; returns its exit status."""
        self.tell(f"stop {grace_s}")
        self._process.communicate(timeout=grace_s + 30)
        return int(self._process.returncode)


class Processes(Gateway):
    """A gateway and workers.

    Args:
        folder: for the logs.
        config: what all share.
        workers: each worker's name, and what it has of its own.
        address: where all listen.
        prefixes: what the command lines of some begin with.
        addresses: where some listen instead.
    """

    def __init__(
        self,
        folder: Path,
        config: Sections,
        workers: Mapping[str, Sections],
        address: str = "127.0.0.1",
        prefixes: Mapping[str, list[str]] | None = None,
        addresses: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(free_port(), address)
        self.folder = folder
        self.all: dict[str, Process] = {}
        self._config = merged({"gateway": {"port": self.port, "host": address}}, config)
        self._own = dict(workers)
        self._address = address
        self._prefixes = prefixes or {}
        self._addresses = addresses or {}
        self._keys = make_cluster_keys()
        self._version = 0
        self._told: list[str] = []
        try:
            for worker in (*workers, "gateway-0"):
                self.all[worker] = self.spawn(worker, 1)
            for process in self.all.values():
                process.wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spawn(self, worker: str, life: int) -> Process:
        """Start a life of a worker; nobody is told of it."""
        config = merged(self._config, self._own.get(worker, {}))
        address = self._addresses.get(worker, self._address)
        prefix = list(self._prefixes.get(worker, ()))
        return Process(worker, life, config, self._keys, self.folder, address, prefix)

    def announce(self, *workers: str, leaving: tuple[str, ...] = ()) -> None:
        """Tell all processes that these workers, or all, and the gateway are the members; some may be about to leave."""
        self._told = list(workers or self.all)
        self._version += 1
        told = [self.all[name] for name in dict.fromkeys((*self._told, "gateway-0")) if name in self.all]
        members = [
            msgspec.structs.replace(process.member, ready=process.worker not in leaving)
            for process in told
            if process.member is not None
        ]
        frame = msgspec.msgpack.encode(Membership(self._version, members)).hex()
        for process in self.all.values():
            process.tell(frame)

    def serve(self, *workers: str) -> None:
        """`announce`, and wait until the first of them that decode have greeted those that prefill."""
        self.announce(*workers)
        self.wait_routable()

    def kill(self, worker: str) -> None:
        """SIGKILL, and tell the others."""
        self.all.pop(worker).kill()
        self.announce(*(name for name in self._told if name != worker))

    def replace(self, worker: str) -> None:
        """SIGKILL, and start its next life, of which everybody is told when it is ready."""
        old = self.all[worker]
        told = list(self._told)
        self.kill(worker)
        fresh = self.spawn(worker, old.life + 1)
        fresh.wait_ready()
        self.all[worker] = fresh
        self.announce(*told)

    def logs(self) -> str:
        """What all lives of all have logged."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def workers(self) -> Iterator[Process]:
        """Those that live, the gateway left out."""
        yield from (process for process in self.all.values() if process.role != "gateway")

    def wait_metric(self, name: str, at_least: float, timeout_s: float = 30, **labels: str) -> None:
        """Until a metric has grown so far."""
        wait_for(lambda: self.metric(name, **labels) >= at_least, timeout_s, f"{name} {labels} ≥ {at_least}")

    def close(self) -> None:
        """End all."""
        self.client.close()
        for process in self.all.values():
            process.kill()
