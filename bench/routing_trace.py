"""A trace replayed over a cluster that is not there: the real router, the real messages, workers that only count.

Every policy is compared with an *oracle*: it knows at once what every worker has, and will have when it comes to a
request, and gives each request to whoever has most of its prompt, among the workers that have not been given more than
their share of all work so far, and a bit. It does not look at who is busy now: it has more hits than are good for those
who wait.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..cluster.kv_publisher import PERIOD_S
from ..cluster.kv_view import KVView
from ..cluster.router import Placement, Router
from ..core.hashing import BlockHash, root_hash, split_hashes
from ..core.kv_messages import KVEvents, KVSnapshot
from ..core.messages import Member, Membership, Report
from ..core.urgency import LEAST, LEVELS
from ..kernels.block_hashes import chain
from ..kv_transfer.offload.trace import Trace, TraceRequest
from .summary import spread

ORACLE = "oracle"
_FINGERPRINT = "f"
_REPORT_S = 1.0
_BOUND = 1.25
"""Of the mean of prompt tokens that workers have been given to compute: more than this, and a few long prompts, the
oracle gives to nobody."""
_FREE_TOKENS = 100_000


class Cluster(NamedTuple):
    """What the trace is replayed on."""

    num_workers: int = 8
    tokens_per_s: float = 10_000.0
    """Prompt tokens that a worker computes."""
    itl_s: float = 0.03
    capacity_tokens: int = 0
    """Of a worker's prefix cache, least recently used first out; 0: without limit."""
    num_gateways: int = 1
    """Requests go to them in turn. Each sees what workers tell, and knows what it has sent itself."""
    urgent_share: float = 0.0
    """Of the requests, those of high priority: a worker computes their prompts before all others that wait."""
    blind: bool = False
    """Routers are not told of priorities."""


class _Prompt(NamedTuple):
    request: TraceRequest
    tokens: list[int]
    hashes: list[BlockHash]
    level: int
    """Of `core.urgency`."""


class _Job(NamedTuple):
    prompt: _Prompt
    gateway: int
    placement: Placement
    came_s: float


class _Worker:
    """A prefix cache and a queue of prompts, computed one after the other."""

    def __init__(self, peer: str, capacity: int) -> None:
        self.peer = peer
        self.capacity = capacity
        self.cache: OrderedDict[BlockHash, None] = OrderedDict()
        self.coming: dict[BlockHash, int] = {}
        """Blocks of prompts that wait, by how many."""
        self.queues: dict[int, deque[_Job]] = {level: deque() for level in range(len(LEVELS))}
        """By level."""
        self.present: _Job | None = None
        self.left: dict[int, float] = {}
        """Tokens still to compute of jobs that have begun."""
        self.began_s = 0.0
        """When the present job went on."""
        self.turn = 0
        """Counts jobs that begin or go on."""
        self.backlog = [0] * len(LEVELS)
        """Prompt tokens to compute, as was thought when they came, by level."""
        self.running = 0
        self.given = self.computed = 0
        """Prompt tokens to compute, of all prompts that have come, and of those that have been begun."""
        self.changes: dict[BlockHash, bool] = {}
        self.next_number = 0

    def held(self, hashes: Sequence[BlockHash]) -> int:
        """A prompt's first blocks that are there."""
        return next((n for n, key in enumerate(hashes) if key not in self.cache), len(hashes))

    def will_hold(self, hashes: Sequence[BlockHash]) -> int:
        """Those that will be there when all that waits is computed."""
        there = (key in self.cache or key in self.coming for key in hashes)
        return next((n for n, is_there in enumerate(there) if not is_there), len(hashes))

    def expect(self, hashes: Sequence[BlockHash], count: int) -> None:
        """A prompt has come, or with −1 is computed."""
        for key in hashes:
            self.coming[key] = self.coming.get(key, 0) + count
            if not self.coming[key]:
                del self.coming[key]

    def store(self, hashes: Sequence[BlockHash]) -> None:
        """A prompt is computed. Its last block goes first, as in the workers' own cache."""
        for key in reversed(hashes):
            if key not in self.cache:
                self.cache[key] = None
                self.changes[key] = True
            self.cache.move_to_end(key)
        while self.capacity and len(self.cache) > self.capacity:
            gone, _ = self.cache.popitem(last=False)
            self.changes[gone] = False


class Replay:
    """One policy on one trace.

    Args:
        policy: of the router, or `ORACLE`.
        trace: the load.
        cluster: the workers.
    """

    def __init__(self, policy: str, trace: Trace, cluster: Cluster) -> None:
        self._policy = policy
        self._trace = trace
        self._cluster = cluster
        peers = [f"colocated-{number}#1" for number in range(cluster.num_workers)]
        members = Membership(1, [Member(peer, "colocated", peer, "tcp://127.0.0.1:1") for peer in peers])
        capacity = cluster.capacity_tokens // trace.block_tokens
        self._workers = {peer: _Worker(peer, capacity) for peer in peers}
        self._views = [KVView(lambda peer, message: None) for _ in range(cluster.num_gateways)]
        self._routers = [Router(policy if policy != ORACLE else "round_robin", view) for view in self._views]
        for view, router in zip(self._views, self._routers, strict=True):
            view.follow(members)
            router.follow(members)
            for peer in peers:
                view.receive(peer, KVSnapshot(True, 0, _FINGERPRINT, trace.block_tokens, "", False, b""))
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._hit_tokens = 0
        self._ttft_s: dict[int, list[float]] = {level: [] for level in range(len(LEVELS))}
        self._unfinished = len(trace.requests)

    def run(self) -> dict[str, Any]:
        """The whole trace; returns the figures. Blocks."""
        for number, prompt in enumerate(_prompts(self._trace, self._cluster.urgent_share)):
            came_s = prompt.request.timestamp / 1e3
            if number == 0:
                for worker in self._workers.values():
                    self._report(worker, came_s)
            while self._events and self._events[0][0] <= came_s:
                self._next_event()
            self._arrive(prompt, number % len(self._routers), came_s)
            self._unfinished = len(self._trace.requests) - number - 1
        while self._events:
            self._next_event()
        computed = [worker.computed for worker in self._workers.values()]
        return {
            "hit_tokens": self._hit_tokens,
            "hit_share": round(self._hit_tokens / self._trace.prompt_tokens, 5),
            "ttft_s": spread(self._ttft_s[LEVELS.index("normal")]),
            **({"urgent_ttft_s": spread(urgent)} if (urgent := self._ttft_s[LEVELS.index("high")]) else {}),
            "most_computed_to_mean": round(max(computed) / (sum(computed) / len(computed)), 4),
        }

    def _next_event(self) -> None:
        now_s, _, act = heapq.heappop(self._events)
        act(now_s)

    def _at(self, when_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def _arrive(self, prompt: _Prompt, gateway: int, now_s: float) -> None:
        router = self._routers[gateway]
        level = self._level(prompt)
        placement = self._ask_oracle(prompt) if self._policy == ORACLE else router.place(prompt.tokens, level=level)
        assert placement is not None
        router.sent(placement, 1, placement.num_left, level)
        worker = self._workers[placement.decode]
        worker.expect(prompt.hashes, 1)
        worker.backlog[prompt.level] += placement.num_left
        worker.given += placement.num_left
        worker.queues[prompt.level].append(_Job(prompt, gateway, placement, now_s))
        if worker.present is None:
            self._start(worker, now_s)
        elif prompt.level < worker.present.prompt.level:  # prompts are computed in chunks: nobody more urgent waits
            present = worker.present
            worker.left[id(present)] -= (now_s - worker.began_s) * self._cluster.tokens_per_s
            worker.queues[present.prompt.level].appendleft(present)
            self._start(worker, now_s)

    def _level(self, prompt: _Prompt) -> int:
        """That the router is told."""
        return LEAST if self._cluster.blind else prompt.level

    def _ask_oracle(self, prompt: _Prompt) -> Placement:
        workers = self._workers.values()
        most = _BOUND * sum(worker.given for worker in workers) / len(workers) + _FREE_TOKENS
        fitting = [worker for worker in workers if worker.given <= most]
        best = max(fitting, key=lambda worker: (worker.will_hold(prompt.hashes), -worker.given))
        held = best.will_hold(prompt.hashes) * self._trace.block_tokens
        return Placement(best.peer, "", prompt.request.input_length - held)

    def _start(self, worker: _Worker, now_s: float) -> None:
        job = worker.present = next(queue for queue in worker.queues.values() if queue).popleft()
        if id(job) not in worker.left:
            hit_tokens = worker.held(job.prompt.hashes) * self._trace.block_tokens
            left = job.prompt.request.input_length - hit_tokens
            self._hit_tokens += hit_tokens
            worker.computed += left
            worker.left[id(job)] = left
        worker.began_s = now_s
        worker.turn += 1
        turn = worker.turn
        ends_s = now_s + worker.left[id(job)] / self._cluster.tokens_per_s
        self._at(ends_s, lambda now_s: self._computed(worker, job, now_s) if worker.turn == turn else None)

    def _computed(self, worker: _Worker, job: _Job, now_s: float) -> None:
        level, router = self._level(job.prompt), self._routers[job.gateway]
        self._ttft_s[job.prompt.level].append(now_s - job.came_s)
        router.prompt_done(job.placement, job.placement.num_left, level)
        router.begun(job.placement, 1, level)
        worker.backlog[job.prompt.level] -= job.placement.num_left
        worker.expect(job.prompt.hashes, -1)
        if not worker.changes:
            self._at(now_s + PERIOD_S, lambda now_s: self._publish(worker))
        worker.store(job.prompt.hashes)
        worker.running += 1
        self._at(now_s + job.prompt.request.output_length * self._cluster.itl_s, lambda now_s: self._done(worker, job))
        worker.present = None
        del worker.left[id(job)]
        if any(worker.queues.values()):
            self._start(worker, now_s)

    def _done(self, worker: _Worker, job: _Job) -> None:
        worker.running -= 1
        self._routers[job.gateway].done(job.placement, 1, 0)

    def _publish(self, worker: _Worker) -> None:
        stored = b"".join(key for key, is_there in worker.changes.items() if is_there)
        removed = b"".join(key for key, is_there in worker.changes.items() if not is_there)
        worker.changes.clear()
        events = KVEvents(worker.next_number, "", False, False, stored, removed)
        worker.next_number = events.next_number
        for view in self._views:
            view.receive(worker.peer, events)

    def _report(self, worker: _Worker, now_s: float) -> None:
        counts = [len(queue) for queue in worker.queues.values()]
        if worker.present is not None:
            counts[worker.present.prompt.level] += 1
        before = [(sum(counts[: n + 1]), sum(worker.backlog[: n + 1])) for n in range(len(LEVELS))]
        report = Report(worker.running, *before[LEAST], 10, 10, urgent=[] if self._cluster.blind else before[:LEAST])
        for router in self._routers:
            router.report(worker.peer, report)
        if self._unfinished:
            self._at(now_s + _REPORT_S, lambda now_s: self._report(worker, now_s))


def _prompts(trace: Trace, urgent_share: float) -> Iterator[_Prompt]:
    """Prompts that begin alike where the trace says so: each of its blocks is as many equal tokens."""
    size, root, rng = trace.block_tokens, root_hash(_FINGERPRINT), random.Random(0)
    for request in trace.requests:
        tokens = [token for block in request.hash_ids for token in [block] * size][: request.input_length]
        # A worker computes one token at least.
        full = tokens[: (len(tokens) - 1) // size * size]
        level = LEVELS.index("high" if rng.random() < urgent_share else "normal")
        yield _Prompt(request, tokens, split_hashes(chain(full, size, root)), level)


def compare(trace: Trace, cluster: Cluster, policies: Sequence[str]) -> dict[str, Any]:
    """Replay a trace with each policy; each one's hits against the oracle's, and against a cache that has it all."""
    runs = {policy: Replay(policy, trace, cluster).run() for policy in (ORACLE, *policies)}
    limit, _ = trace.without_limit()
    for run in runs.values():
        run["of_oracle"] = round(run["hit_tokens"] / runs[ORACLE]["hit_tokens"], 4)
        run["of_limit"] = round(run["hit_tokens"] / limit, 4)
    return {
        "requests": len(trace.requests), "prompt_tokens": trace.prompt_tokens, "cluster": cluster._asdict(),
        "oracle_bound": {"of_mean": _BOUND, "more_tokens": _FREE_TOKENS}, "policies": runs,
    }  # fmt: skip
