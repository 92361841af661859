"""The order in which the doctor looks: Ray, every node, every worker's place, and every pair that hands KV over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from ...core.config import Config
from ...core.errors import WorkerError
from ..controller import desired_workers
from .finding import Finding, Notes, Verdict
from .links import judge_link
from .probe import LinkReport

if TYPE_CHECKING:
    from ..probe_actors import Node, PlacedProbe, Probes

PROBE_BYTES = 256 << 20
"""Read from each place by each transport, in the time that there is."""

_TCP_BYTES = 256 << 20
_TRANSPORT_LIMIT_S = 2.0
_PLACE_TIMEOUT_S = 60.0
_LOOK_TIMEOUT_S = 90.0
_MAX_SKEW_S = 0.05
_SKEW_ROUNDS = 5

Show = Callable[[str], None]
"""Told what goes on, for people."""


class Examination:
    """One look at a cluster.

    Args:
        config: of the workers.
        probes: on the connected Ray cluster.
        running: worker → node address of the Tandem that runs there; empty if none does.
        deadline_s: on the monotonic clock: pairs that are left over then are not measured.
        show: told what goes on.
    """

    def __init__(self, config: Config, probes: Probes, running: dict[str, str], deadline_s: float, show: Show) -> None:
        self._config = config
        self._probes = probes
        self._running = running
        self._deadline_s = deadline_s
        self._show = show

    def run(self) -> Iterator[Finding]:
        """Findings as they are made. Blocks until the deadline at most, and for one read more."""
        nodes = self._probes.nodes()
        notes = Notes("Ray", "cluster")
        for node in nodes:
            notes.ok(f"node {node.address}", f"{node.cpus:g} CPUs, {node.gpus:g} GPUs, id {node.node_id[:8]}")
        yield from notes.findings
        self._show(f"starting probes on {_count(len(nodes), 'node')}")
        on_nodes = {node: self._probes.on_node(f"node {node.address}", node.node_id) for node in nodes}
        places, placement = self._place(nodes)
        yield from placement
        num_here = Counter(node_id for _, node_id in places.values())
        looked: list[Finding] = []
        for node, probe in on_nodes.items():
            self._show(f"looking at {node.address}")
            looked += self._look(node, probe, num_here[node.node_id])
        yield from looked
        yield from _differing_versions(looked)
        if len(nodes) > 1:
            yield from self._compare_clocks(on_nodes)
        yield from self._measure(places, num_here)

    # ---- places -----------------------------------------------------------------------------------------------------

    def _place(self, nodes: list[Node]) -> tuple[dict[str, tuple[PlacedProbe, str]], list[Finding]]:
        """Worker → its probe and the node's id, and rows about the placement."""
        notes = Notes("Ray", "cluster")
        by_address = {node.address: node.node_id for node in reversed(nodes)}
        wanted = [(worker, role) for worker, role in desired_workers(self._config) if role != "gateway"]
        lacking = "" if self._running else self._probes.lacking()
        placed: dict[str, PlacedProbe] = {}
        for worker, role in wanted:
            if self._running:
                # The running workers hold the resources: the probes stand beside them.
                if self._running.get(worker) in by_address:
                    placed[worker] = self._probes.on_node(worker, by_address[self._running[worker]])
                else:
                    notes.warn(f"place of {worker}", "it is not up", "a running worker", "`tandem status`, and its log")
            elif lacking and not self._probes.has_room(worker):
                _fail_place(notes, worker, lacking)
            else:
                placed[worker] = self._probes.as_worker(worker, role)
        places: dict[str, tuple[PlacedProbe, str]] = {}
        self._show(f"waiting for {_count(len(placed), 'place')}")
        until_s = min(time.monotonic() + _PLACE_TIMEOUT_S, self._deadline_s)
        for worker, probe in placed.items():
            try:
                node_id = str(probe.call("node", timeout_s=max(until_s - time.monotonic(), 1.0)))
            except WorkerError as error:
                _fail_place(notes, worker, lacking or error.message)
                continue
            places[worker] = probe, node_id
        address = {node.node_id: node.address for node in nodes}
        for worker, (_, node_id) in places.items():
            notes.ok(f"place of {worker}", f"{address.get(node_id, '?')}, node {node_id[:8]}")
        return places, notes.findings

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def _look(self, node: Node, probe: PlacedProbe, num_workers: int) -> list[Finding]:
        try:
            answer = probe.call("look", num_workers, timeout_s=self._left_s(_LOOK_TIMEOUT_S))
        except WorkerError as error:
            notes = Notes("host", node.address)
            notes.fail("probe", error.message, "an actor that runs Tandem", "install the same Tandem on every node")
            return notes.findings
        return msgspec.msgpack.decode(answer, type=list[Finding])

    def _compare_clocks(self, on_nodes: dict[Node, PlacedProbe]) -> list[Finding]:
        notes = Notes("Ray", "cluster")
        for node, probe in on_nodes.items():
            try:
                skew_s, error_s = min((self._skew_s(probe) for _ in range(_SKEW_ROUNDS)), key=lambda pair: pair[1])
            except WorkerError:
                continue  # told by its own row
            notes.judge(
                f"clock of {node.address}", abs(skew_s) <= _MAX_SKEW_S + error_s,
                f"{1e3 * skew_s:+.1f} ms ± {1e3 * error_s:.1f} ms against this host",
                f"within {1e3 * _MAX_SKEW_S:.0f} ms",
                "synchronize the nodes' clocks (chrony): requests' timelines span nodes",
            )  # fmt: skip
        return notes.findings

    def _skew_s(self, probe: PlacedProbe) -> tuple[float, float]:
        """A node's clock minus ours, and how far off that may be: half the round trip."""
        before_s = time.time()
        theirs_s = float(probe.call("wall_s", timeout_s=self._left_s(10.0)))
        after_s = time.time()
        return theirs_s - (before_s + after_s) / 2, (after_s - before_s) / 2

    # ---- links ------------------------------------------------------------------------------------------------------

    def _measure(self, places: dict[str, tuple[PlacedProbe, str]], num_here: Counter[str]) -> Iterator[Finding]:
        owners, readers = (
            {worker: place for worker, place in places.items() if worker.startswith(f"{role}-")}
            for role in ("prefill", "decode")
        )
        if self._config.pools.colocated is not None:
            notes = Notes("KV links", "cluster")
            notes.ok("pairs", "none: colocated workers hand no KV over")
            yield from notes.findings
            return
        offers: dict[str, bytes] = {}
        for worker, (probe, node_id) in places.items():
            try:
                offers[worker] = bytes(
                    probe.call("open", PROBE_BYTES, num_here[node_id], timeout_s=self._left_s(_LOOK_TIMEOUT_S))
                )
            except WorkerError as error:
                notes = Notes("KV links", worker)
                notes.fail("memory to read", error.message, "memory and sockets of a worker", "the error tells")
                yield from notes.findings
        pairs = [(reader, owner) for reader in readers for owner in owners if reader in offers and owner in offers]
        # Pairs of nodes that were not seen yet come first: what is left over at the deadline is more of the same.
        seen: Counter[tuple[str, str]] = Counter()
        turns = {}
        for pair in pairs:
            nodes = readers[pair[0]][1], owners[pair[1]][1]
            turns[pair] = seen[nodes]
            seen[nodes] += 1
        for number, (reader, owner) in enumerate(sorted(pairs, key=turns.__getitem__), start=1):
            if time.monotonic() > self._deadline_s:
                notes = Notes("KV links", "cluster")
                notes.warn(
                    "pairs", f"{number - 1} of {len(pairs)} measured, then the time was over", "all", "raise --limit-s",
                )  # fmt: skip
                yield from notes.findings
                return
            self._show(f"measuring {reader} ← {owner} ({number} of {len(pairs)})")
            yield from self._measure_pair(f"{reader} ← {owner}", readers[reader][0], owners[owner][0], offers[owner])

    def _measure_pair(self, name: str, reader: PlacedProbe, owner: PlacedProbe, offer: bytes) -> list[Finding]:
        try:
            tcp = owner.call("send_tcp", _TCP_BYTES, timeout_s=10.0)
            answer = reader.call("measure", offer, tcp, _TRANSPORT_LIMIT_S, timeout_s=60.0)
        except WorkerError as error:
            notes = Notes("KV links", name)
            notes.fail("measurement", error.message, "an answer", "the log of the node's Ray tells more")
            return notes.findings
        return judge_link(name, self._config.kv, msgspec.msgpack.decode(answer, type=LinkReport))

    def _left_s(self, most_s: float) -> float:
        return max(min(self._deadline_s - time.monotonic(), most_s), 1.0)


def _fail_place(notes: Notes, worker: str, why: str) -> None:
    notes.fail(
        f"place of {worker}", why, "a node with the CPUs and GPUs of its pool",
        "lower pools.*.replicas or pools.*.cpus_per_replica, or add nodes",
    )  # fmt: skip


def _differing_versions(findings: list[Finding]) -> list[Finding]:
    """Rows about software that is not the same on all nodes."""
    versions: dict[str, set[str]] = {}
    for finding in findings:
        if finding.section == "software":
            versions.setdefault(finding.check, set()).add(finding.measured)
    return [
        Finding(
            "software", "cluster", check, Verdict.WARN, " and ".join(sorted(found)), "the same on every node",
            "install the same on every node",
        )
        for check, found in versions.items()
        if len(found) > 1
    ]  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
