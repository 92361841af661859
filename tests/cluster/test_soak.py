"""A Ray cluster of three hosts, and everything at once, for as long as it is asked for.

`pytest tests/cluster/test_soak.py --soak MINUTES`. Workers, gateways, controllers, a host and Ray's head die; links are
cut and slow; workers are drained, restarted and scaled by commands; a part of all loads fails; clients leave. Answers
are the undisturbed ones, and what the cluster has taken of the hosts stays what it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import statistics
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from support.footprint import held
from support.gateway import Gateway, wait_for
from support.golden import Golden
from support.hosts import Hosts, RayHosts
from support.load import Load, ask_all, body, check
from support.processes import Processes

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
SETTLED_S = 150.0
CONTROLLERS_S = 90.0
"""A controller is killed no sooner again: one that ends five times within a minute each is given up."""
NOTHING: dict[str, list[str]] = {"groups": [], "named": []}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, compiled_kernels: None) -> Iterator[Golden]:
    pools = {"pools": {"colocated": {}}, "kv": {"capacity": "256MiB"}}
    with Processes(tmp_path_factory.mktemp("golden"), pools, {"colocated-0": {}}) as quiet:
        quiet.serve()
        yield Golden(quiet)


class Cluster:
    """A Tandem on hosts that are harmed: the first has Ray's head, the second the gateways."""

    def __init__(self, home: Path, hosts: Hosts) -> None:
        self.ray = RayHosts(home, hosts, cpus=6)
        self.near, self.far = self.ray.hosts[1:]
        self.gateway = Gateway(8000, self.near.address)
        self.policy = ""

    def up(self, rng: random.Random) -> None:
        """Start it, with other faults and another way to go on after them each time."""
        self.policy = rng.choice(["recompute", "fail"])
        faults = (
            f"{{share: {rng.choice([0.01, 0.05])}, kind: {rng.choice(['error', 'delay', 'corrupt'])}, delay_s: 1.0, "
            f"seed: {rng.randrange(1000)}}}"
        )
        self._tandem(
            "up", "--set", f"gateway={{host: {self.near.address}, replicas: 2}}",
            "--set", "pools={prefill: {replicas: 2, max_batched_tokens: 128, threads: 1}, decode: {replicas: 2, threads: 1}}",
            "--set", "model.max_model_len=512", "--set", f"routing.local_prefill={rng.choice(['never', 'auto'])}",
            "--set", f"kv={{capacity: 16MiB, poison_freed: true, on_load_failure: {self.policy}, inject_faults: {faults}}}",
        )  # fmt: skip
        self.gateway.wait_routable()

    def down(self) -> None:
        self._tandem("down")
        assert self.ray.left() == NOTHING
        assert not self.processes(), self.processes()

    def _tandem(self, *arguments: str) -> None:
        done = self.ray.tandem(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> dict[str, psutil.Process]:
        """By their names in the cluster, as their logs tell: ``decode-1``, ``controller``."""
        found: dict[str, psutil.Process] = {}
        for host in (self.near, self.far):
            for pid in host.pids():
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    logs = [Path(file.path) for file in process.open_files() if "/tandem/logs/" in file.path]
                    found |= {re.sub(r"(#\d+)?\.log$", "", log.name): process for log in logs if log.suffix == ".log"}
        return found

    def all_there(self) -> bool:
        """Every worker is ready, and there is none too many."""
        try:
            rows = self.ray.status()
        except (AssertionError, subprocess.TimeoutExpired):  # the controller's next life, or the head's, comes
            return False
        workers = {name for name in rows if not name.startswith("gateway")}
        return workers == set(WORKERS) and all(row["phase"] == "ready" for row in rows.values())

    def settle(self) -> None:
        """Wait until all are there, and nothing is under way."""
        wait_for(self.all_there, SETTLED_S, "all workers")
        self.gateway.wait_routable()
        self.gateway.wait_idle(60)


class Harm:
    """What happens to a cluster, one thing after the other, until it is left; what is under way then is finished."""

    def __init__(self, cluster: Cluster, rng: random.Random, done: Counter[str]) -> None:
        self._cluster = cluster
        self._rng = rng
        self._done = done
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(1, "harm")
        self.broken = False
        """Whether connections may have broken."""

    def __enter__(self) -> Harm:
        self._harming = self._thread.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.shutdown()
        self._harming.result()

    def _run(self) -> None:
        often: list[tuple[Callable[[], object], int]] = [
            (self.kill, 8), (self.end, 4), (self.stop, 6), (self.cut, 3), (self.slow, 3), (self.kill_gateway, 2),
            (self.kill_supervisor, 1), (self.kill_controller, 2), (self.drain, 3), (self.restart, 1), (self.scale, 2),
            (self.kill_head, 1),
        ]  # fmt: skip
        kinds, weights = zip(*often, strict=True)
        while not self._over.wait(self._rng.uniform(0.5, 3)):
            [kind] = self._rng.choices(kinds, weights)
            kind()
            self._done[kind.__name__] += 1

    def _victim(self, among: tuple[str, ...] = WORKERS) -> psutil.Process | None:
        return self._cluster.processes().get(self._rng.choice(among))

    def _send(self, process: psutil.Process | None, send: Callable[[psutil.Process], object]) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process is not None:
                send(process)

    def kill(self) -> None:
        self._send(self._victim(), psutil.Process.kill)

    def end(self) -> None:
        self._send(self._victim(), psutil.Process.terminate)

    def stop(self) -> None:
        victim = self._victim()
        self._send(victim, psutil.Process.suspend)
        self._over.wait(self._rng.uniform(0.1, 4))
        self._send(victim, psutil.Process.resume)

    def cut(self) -> None:
        self._cluster.far.cut()
        self._over.wait(self._rng.uniform(0.5, 8))
        self._cluster.far.restore()

    def slow(self) -> None:
        self._cluster.far.slow(self._rng.choice(["4mbit", "50mbit"]))
        self._over.wait(self._rng.uniform(0.5, 5))
        self._cluster.far.full_speed()

    def kill_gateway(self) -> None:
        self.broken = True
        self._send(self._victim(("gateway-0", "gateway-1")), psutil.Process.kill)

    def kill_supervisor(self) -> None:
        names = tuple(name for name in self._cluster.processes() if name.startswith("supervisor"))
        self._send(self._victim(names), psutil.Process.kill)

    def kill_controller(self) -> None:
        controller = self._victim(("controller",))
        if controller is not None and time.time() - controller.create_time() > CONTROLLERS_S:
            self._send(controller, psutil.Process.kill)

    # Commands may come while another goes on, or while a controller does not live, and then say so.

    def drain(self) -> None:
        self._cluster.ray.tandem("drain", self._rng.choice(WORKERS), "--restart", "--grace-s", "10")

    def restart(self) -> None:
        self._cluster.ray.tandem("restart", self._rng.choice(["prefill", "decode"]))

    def scale(self) -> None:
        pool = self._rng.choice(["prefill", "decode"])
        self._cluster.ray.tandem("scale", pool, "3")
        self._over.wait(self._rng.uniform(1, 15))
        wait_for(lambda: self._cluster.ray.tandem("scale", pool, "2").returncode == 0, SETTLED_S, "scale")

    def kill_head(self) -> None:
        self._cluster.ray.hosts[0].kill()
        self._over.wait(self._rng.uniform(1, 10))
        self._cluster.ray.start_head()


class Taken:
    """What a cluster has taken when nobody asks anything: what must be the same each time, and what must not grow."""

    def __init__(self, cluster: Cluster) -> None:
        processes, left = cluster.processes(), cluster.ray.left()
        self.counts = {
            "processes": Counter(processes.keys()),
            "actors": cluster.ray.actors(),
            "groups": Counter(left["groups"]),
            "named": Counter(name.partition("#")[0] for name in left["named"]),
            "listening": Counter({name: _listening(process) for name, process in processes.items()}),
            "shared": Counter(name for name in os.listdir("/dev/shm") if "tandem" in name),
        }
        daemons = {
            process.name(): process
            for host in cluster.ray.hosts
            for process in map(psutil.Process, host.pids())
            if process.name() in ("raylet", "gcs_server")
        }
        self.sizes: dict[str, int] = {}
        for name, process in (processes | daemons).items():
            self.sizes[f"{name} MiB"] = process.memory_full_info().uss >> 20
            self.sizes[f"{name} descriptors"] = held(process).total()

    def differs(self, before: Taken) -> dict[str, tuple[Counter[str], Counter[str]]]:
        """What there is more and less than before; less shared memory is no harm."""
        pairs = {name: (now - before.counts[name], before.counts[name] - now) for name, now in self.counts.items()}
        return {name: pair for name, pair in pairs.items() if pair[0] or (pair[1] and name != "shared")}


def _listening(process: psutil.Process) -> int:
    return sum(connection.status == psutil.CONN_LISTEN for connection in process.net_connections("tcp"))


def test_everything_at_once(tmp_path: Path, golden: Golden, soak_minutes: float) -> None:
    """Rounds of a hundred requests; now and then all is stopped, or a host dies first, and nothing is left there."""
    until_s = time.monotonic() + soak_minutes * 60
    hosts = Hosts(3)
    done: Counter[str] = Counter()
    sizes: dict[str, list[int]] = defaultdict(list)
    rounds, lost, left, failed = 0, 0, 0, 0
    try:
        cluster = Cluster(tmp_path, hosts)
        before: Taken | None = None
        while time.monotonic() < until_s:
            seed = random.SystemRandom().randrange(1 << 31)
            rng = random.Random(seed)
            print(f"round {rounds}: seed {seed}", flush=True)
            if before is None:
                cluster.up(rng)
                cluster.settle()
                check(ask_all(cluster.gateway.url, [body(0)]), golden([body(0)]), errors=cluster.policy == "fail")
            requests = [body(rng.randrange(200), max_tokens=rng.choice([8, 60])) for _ in range(100)]
            leave = [rng.choice([None, None, rng.random()]) for _ in requests]
            wanted = golden(requests)
            with (
                Load(cluster.gateway.url, requests, 12, leave=leave.__getitem__, broken=True) as load,
                Harm(cluster, rng, done) as harm,
            ):
                answers = load.answers()
            broken = sum(answer.broken for answer in answers)
            assert harm.broken or not broken, f"{broken} connections broke, and no gateway had died"
            failed += check(answers, wanted, errors=cluster.policy == "fail")
            lost, left = lost + broken, left + sum(answer.status == 0 for answer in answers) - broken
            cluster.settle()
            failed += check(ask_all(cluster.gateway.url, requests[:10]), wanted[:10], errors=cluster.policy == "fail")
            cluster.settle()
            before = before or Taken(cluster)
            _same(cluster, before)
            for name, size in Taken(cluster).sizes.items():
                sizes[name].append(size)
            rounds += 1
            if rng.random() < 0.1:
                _end(cluster, rng, done)
                before = None
        cluster.down()
    finally:
        hosts.close()
        for name in sorted(sizes):
            print(f"{name}: {sizes[name]}", flush=True)
        print(
            f"{rounds} rounds; {lost} connections lost, {left} clients left, {failed} errors; {dict(done)}", flush=True
        )
    assert not (grown := _grown(sizes)), grown


def _same(cluster: Cluster, before: Taken) -> None:
    """What has ended is gone within a minute, and what is to be there is there."""
    now = Taken(cluster)
    end_s = time.monotonic() + 60
    while differs := now.differs(before):
        assert time.monotonic() < end_s, f"more and less than before: {differs}"
        time.sleep(2)
        now = Taken(cluster)


def _end(cluster: Cluster, rng: random.Random, done: Counter[str]) -> None:
    """Stop it, sometimes when half of it has just died with its host, which comes back."""
    if rng.random() < 0.5:
        cluster.far.kill()
        done["kill_host"] += 1
        with contextlib.suppress(AssertionError, httpx.HTTPError):
            ask_all(cluster.gateway.url, [body(0)], broken=True)
        wait_for(cluster.all_there, SETTLED_S, "all workers on the host that is left")
        cluster.ray.start(cluster.far)
    cluster.down()
    done["down"] += 1


def _grown(sizes: dict[str, list[int]]) -> dict[str, tuple[float, float]]:
    """What is larger at the end than once all was warm: medians of the second and the last quarter. What Ray's own
    daemons take is printed, and theirs."""
    grown = {}
    for name, series in sizes.items():
        quarter = len(series) // 4
        if quarter < 2 or name.startswith(("raylet", "gcs_server")):
            continue
        early, late = statistics.median(series[quarter : 2 * quarter]), statistics.median(series[-quarter:])
        if late > 1.1 * early + 16:
            grown[name] = (early, late)
    return grown
