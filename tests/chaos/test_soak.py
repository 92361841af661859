"""Everything at once, for as long as it is asked for: faults of every kind, kills, stops, and clients that leave.

`pytest tests/chaos/test_soak.py --soak MINUTES`; with `--soak`, every other chaos test that takes seeds repeats as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from support.footprint import Footprint, held
from support.gateway import wait_for
from support.load import Body, Tokens, ask_all, body, check
from support.processes import Processes
from support.tiered import BLOCK_BYTES, TieredNode

pytestmark = [pytest.mark.chaos, pytest.mark.soak]

Golden = Callable[[list[Body]], list[Tokens]]


class Nuisance:
    """Kills, ends or stops a worker now and then, until it is left.

    Args:
        cluster: whose.
        rng: decides.
        others: as often, one of these is called instead, with what waits for so long or until it is over.
        spared: a worker that nothing is done to.
    """

    def __init__(
        self,
        cluster: Processes,
        rng: random.Random,
        others: Sequence[Callable[[Callable[[float], object]], None]] = (),
        spared: str = "",
    ) -> None:
        self._cluster = cluster
        self._rng = rng
        self._others = others
        self._spared = spared
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nuisance")

    def _run(self) -> None:
        while not self._over.wait(self._rng.uniform(0.5, 3)):
            if self._others and self._rng.random() < 0.5:
                self._rng.choice(self._others)(self._over.wait)
                continue
            workers = [process.worker for process in self._cluster.workers() if process.worker != self._spared]
            victim = self._cluster.all[self._rng.choice(workers)]
            what = self._rng.random()
            if what < 0.35:
                self._cluster.replace(victim.worker)
            elif what < 0.7:
                self._cluster.end(victim.worker)
            else:
                victim.system.suspend()
                self._over.wait(self._rng.uniform(0.1, 4))
                victim.system.resume()

    def __enter__(self) -> Nuisance:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_everything_at_once(tmp_path: Path, golden: Golden, soak_minutes: float) -> None:
    """Rounds of a hundred requests on a new cluster of random settings each; a failure's round is printed."""
    until_s = time.monotonic() + soak_minutes * 60
    rounds = 0
    while time.monotonic() < until_s:
        seed = random.SystemRandom().randrange(1 << 31)
        rng = random.Random(seed)
        policy = rng.choice(["recompute", "fail"])
        faults = {
            "share": rng.choice([0.01, 0.1]), "kind": rng.choice(["error", "delay", "corrupt"]),
            "delay_s": rng.choice([0.05, 2.0]), "seed": seed,
        }  # fmt: skip
        config = {
            "model": {"max_model_len": 512}, "routing": {"local_prefill": rng.choice(["never", "auto"])},
            "pools": {"prefill": {"max_batched_tokens": rng.choice([64, 256])}, "decode": {}},
            "kv": {
                "poison_freed": True, "lease_s": rng.choice([1.0, 5.0]), "transport": rng.choice(["shm", "zmq"]),
                "capacity": rng.choice([60, 120]) * BLOCK_BYTES, "inject_faults": faults, "on_load_failure": policy,
            },
        }  # fmt: skip
        print(f"round {rounds}: seed {seed}: {config}", flush=True)
        folder = tmp_path / str(seed)
        folder.mkdir()
        with Processes(folder, config, {"prefill-0": {}, "prefill-1": {}, "decode-0": {}, "decode-1": {}}) as cluster:
            cluster.serve()
            requests = [body(rng.randrange(300), max_tokens=rng.choice([8, 60])) for _ in range(100)]
            leave = [rng.choice([None, None, rng.random()]) for _ in requests]
            with Nuisance(cluster, rng):
                answers = ask_all(cluster.url, requests, 16, leave.__getitem__)
            check(answers, golden(requests), errors=policy == "fail")
            cluster.wait_routable()
            answers = ask_all(cluster.url, requests[:20], 16)
            check(answers, golden(requests[:20]), errors=policy == "fail")
            Footprint(cluster, [process.system for process in cluster.workers()]).check()
        rounds += 1
    assert rounds > 0


class Harm:
    """What happens to tiers. Each takes what waits for so long, or until it is over."""

    def __init__(self, node: TieredNode, rng: random.Random) -> None:
        self._node = node
        self._rng = rng
        self.all = (self.kill_keeper, self.stop_keeper, self.stop_objects, self.delete_file, self.flip_bits)

    def kill_keeper(self, wait: Callable[[float], object]) -> None:
        if keeper := self._node.keeper():
            keeper.kill()

    def stop_keeper(self, wait: Callable[[float], object]) -> None:
        if keeper := self._node.keeper():
            keeper.suspend()
            wait(self._rng.uniform(0.1, 4))
            keeper.resume()

    def stop_objects(self, wait: Callable[[float], object]) -> None:
        self._node.s3.stop()
        wait(self._rng.uniform(0.1, 4))
        self._node.s3.go_on()

    def delete_file(self, wait: Callable[[float], object]) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._file().unlink()

    def flip_bits(self, wait: Callable[[float], object]) -> None:
        with contextlib.suppress(FileNotFoundError), self._file().open("r+b", buffering=0) as file:
            for offset in range(4096 + self._rng.randrange(100_000), os.fstat(file.fileno()).st_size, 50_000):
                byte = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << self._rng.randrange(8)]), offset)

    def _file(self) -> Path:
        return self._node.disk / self._rng.choice(["prefill-0", "decode-0", "decode-1"]) / "blocks.tandem"


CAPACITY_BYTES = 48 << 20


class Taken:
    """What a node has taken when nobody asks anything, to be compared with the same later."""

    def __init__(self, node: TieredNode) -> None:
        cluster = node.cluster
        cluster.wait_idle(60)
        self.shared = {name for name in os.listdir("/dev/shm") if "tandem" in name}
        # A life more of a worker has no more than the one before.
        self.held = {process.worker: held(process.system) for process in cluster.all.values()}
        self.memory = {process.worker: process.system.memory_full_info().uss for process in cluster.all.values()}
        self.disk = sum(path.stat().st_blocks * 512 for path in node.disk.rglob("*") if path.is_file())
        self.objects = len(node.s3.names())
        self.own = psutil.Process().num_fds()

    def excess(self, before: Taken) -> dict[str, object]:
        """What there is more than before, or than there may be."""
        more: dict[str, object] = {name: held - before.held[name] for name, held in self.held.items()}
        more["shared"] = self.shared - before.shared
        more["disk"] = max(self.disk - 1.05 * CAPACITY_BYTES, 0)
        more["objects"] = max(self.objects - CAPACITY_BYTES // BLOCK_BYTES, 0)
        more["own"] = max(self.own - before.own, 0)
        return {name: what for name, what in more.items() if what}


def test_everything_happens_to_tiers(tmp_path: Path, golden: Golden, soak_minutes: float) -> None:
    """One cluster all the time, with conversations that return: memory, disk and descriptors stay what they were."""
    until_s = time.monotonic() + soak_minutes * 60
    node = TieredNode(tmp_path, str(CAPACITY_BYTES))
    config = {
        "model": {"max_model_len": 512}, "routing": {"local_prefill": "auto"},
        "pools": {"prefill": {"max_batched_tokens": 128}, "decode": {"replicas": 2}},
        "kv": {"poison_freed": True, "lease_s": 2.0, "capacity": 80 * BLOCK_BYTES},
        **node.tiers("host", "disk", "s3"),
    }  # fmt: skip
    try:
        node.start(config, {"prefill-0": {}, "decode-0": {}, "decode-1": {}})
        cluster = node.cluster
        cluster.serve()
        before: Taken | None = None
        rounds, start_memory = 0, 0
        while time.monotonic() < until_s or rounds < 3:
            seed = random.SystemRandom().randrange(1 << 31)
            rng = random.Random(seed)
            print(f"round {rounds}: seed {seed}", flush=True)
            # Of sixty prompts; the tiers hold them, and the workers five.
            requests = [body(rng.randrange(60), max_tokens=rng.choice([8, 60]), cache_salt="tiers") for _ in range(100)]
            leave = [rng.choice([None, None, None, rng.random()]) for _ in requests]
            wanted = golden(requests)
            with Nuisance(cluster, rng, Harm(node, rng).all, spared="prefill-0"):
                check(ask_all(cluster.url, requests, 12, leave.__getitem__), wanted)
            cluster.wait_routable()
            check(ask_all(cluster.url, requests[:20], 12), wanted[:20])
            if before is None or rounds < 2:
                before = Taken(node)
                start_memory = before.memory["prefill-0"]
            else:
                known = before
                try:
                    wait_for(lambda known=known: not Taken(node).excess(known), 60, "all as it was")
                except AssertionError:
                    raise AssertionError(f"more than before: {Taken(node).excess(known)}") from None
            now = Taken(node)
            memory = {name: f"{size >> 20} MiB" for name, size in now.memory.items()}
            print(f"  memory {memory}, disk {now.disk >> 20} MiB, {now.objects} objects, held {now.held}", flush=True)
            rounds += 1
        assert Taken(node).memory["prefill-0"] < 1.1 * start_memory + (16 << 20)
        name = "tandem_offload_blocks_total"
        blocks = {event: cluster.metric(name, event=event, worker="prefill-0") for event in ("stored", "loaded")}
        assert min(blocks.values()) > 0, blocks
        print(f"{rounds} rounds; blocks of prefill-0: {blocks}", flush=True)
    finally:
        node.close()
