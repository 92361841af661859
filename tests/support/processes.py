"""Real worker and gateway processes, started in a second: the test is their controller, and there is no Ray.

Each worker can have a configuration of its own, and a test says who is told of whom.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from tandem.core.messages import Member, Membership
from tandem.core.wire import ClusterKeys, make_cluster_keys

from .forking import forking
from .gateway import Gateway, free_port, wait_for
from .worker_main import Who, main

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
        network: path of the network namespace that it lives in; "" for this one.
        host_tier: see `Processes`.
        environment: likewise.
    """

    def __init__(
        self,
        worker: str,
        life: int,
        config: Sections,
        keys: ClusterKeys,
        folder: Path,
        address: str,
        network: str,
        host_tier: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.worker = worker
        self.role = worker.rpartition("-")[0]
        self.life = life
        self.peer = f"{worker}#{life}"
        self.log = folder / f"{self.peer}.log"
        self.member: Member | None = None
        self._pipe, far_end = forking.Pipe()
        who = Who(self.peer, self.role, dict(config), keys, address, self.log, network, host_tier, dict(environment))
        self._process = forking.Process(target=main, args=(who, far_end), name=self.peer, daemon=True)
        self._process.start()
        far_end.close()
        assert self._process.pid is not None
        self.system = psutil.Process(self._process.pid)

    def wait_ready(self) -> None:
        """Until it serves."""
        try:
            self.member = msgspec.msgpack.decode(self._pipe.recv(), type=Member)
        except EOFError:
            log = self.log.read_text() if self.log.exists() else ""
            raise AssertionError(f"{self.peer} did not start: {log[-3000:]}") from None

    def tell(self, membership: bytes) -> None:
        """Pass a membership on; nobody minds when it is gone."""
        with contextlib.suppress(OSError):
            self._pipe.send(membership)

    def end(self, grace_s: float) -> None:
        """Have it finish or hand over what it has, for at most so long, and end. Idempotent."""
        with contextlib.suppress(OSError):
            self._pipe.send(grace_s)
        self._process.join()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class Processes(Gateway):
    """A gateway and workers.

    Args:
        folder: for the logs.
        config: what all share.
        workers: each worker's name, and what it has of its own.
        address: where all listen.
        elsewhere: of some, the network namespace that they live in, and where they listen in it.
        host_tier: folder of the node's host tier, which the test owns.
        environment: variables of all processes.
    """

    def __init__(
        self,
        folder: Path,
        config: Sections,
        workers: Mapping[str, Sections],
        address: str = "127.0.0.1",
        elsewhere: Mapping[str, tuple[str, str]] | None = None,
        host_tier: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(free_port(), address)
        self.folder = folder
        self.all: dict[str, Process] = {}
        self._config = merged({"gateway": {"port": self.port, "host": address}}, config)
        self._own = dict(workers)
        self._address = address
        self._elsewhere = elsewhere or {}
        self._host_tier = host_tier or folder
        self._environment = environment or {}
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
        network, address = self._elsewhere.get(worker, ("", self._address))
        return Process(
            worker, life, config, self._keys, self.folder, address, network, self._host_tier, self._environment
        )

    def announce(self, *workers: str, leaving: tuple[str, ...] = (), ending: tuple[str, ...] = ()) -> None:
        """Tell all processes that these workers, or all, and the gateway are the members; some may be about to leave, or
        to end and hand over what they have."""
        self._told = list(workers or self.all)
        self._version += 1
        told = [self.all[name] for name in dict.fromkeys((*self._told, "gateway-0")) if name in self.all]
        members = [
            msgspec.structs.replace(
                process.member, ready=process.worker not in leaving + ending, hands_over=process.worker in ending
            )
            for process in told
            if process.member is not None
        ]
        frame = msgspec.msgpack.encode(Membership(self._version, members))
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
        told = list(self._told)
        old = self.all[worker]
        self.kill(worker)
        self._begin(old, told)

    def end(self, worker: str, grace_s: float = 5.0) -> None:
        """What SIGTERM does: it hands over what it has, and then its next life starts."""
        told = list(self._told)
        old = self.all[worker]
        self.announce(*told, ending=(worker,))
        old.end(grace_s)
        self.kill(worker)
        self._begin(old, told)

    def _begin(self, old: Process, told: list[str]) -> None:
        worker = old.worker
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
