"""Drains and scales: who comes and who leaves when an operator asks. The controller starts and ends them."""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable

from ..core.config import Config, PoolsConfig
from ..core.errors import CapacityError, NotFoundError, RequestError
from ..core.ids import WorkerId
from .controller import Controller, Desired, desired_workers
from .launcher import Launcher
from .rolling_restart import RollingRestart
from .state import KeptDrain, KeptScale, ScalingState

DRAIN_S = 600.0
"""What a worker that is drained takes at most, unless told otherwise."""
_MAX_DRAIN_S = 86_400.0
_MAX_REPLICAS = 1024
_MAX_KEPT = 64
"""Calls whose callers may ask again."""


class Scaling:
    """Belongs to the controller's event loop.

    Args:
        config: what was started.
        launcher: knows what there is room for.
        controller: of the cluster.
        on_change: called when `state` has changed.
    """

    def __init__(
        self,
        config: Config,
        launcher: Launcher,
        controller: Controller,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._controller = controller
        self._rolling = RollingRestart(controller, self._one_more, on_change)
        self._drains: deque[KeptDrain] = deque(maxlen=_MAX_KEPT)
        self._scales: deque[KeptScale] = deque(maxlen=_MAX_KEPT)

    def state(self) -> ScalingState:
        """What `take_over` needs."""
        return ScalingState(list(self._drains), list(self._scales), self._rolling.kept, self._rolling.spares)

    def take_over(self, state: ScalingState) -> None:
        """Go on where the last life of the controller ended, once the controller itself does. Callers that it cut off
        may ask again, with the keys of their calls."""
        self._drains.extend(state.drains)
        self._scales.extend(state.scales)
        self._rolling.take_over(state.restart, state.spares)

    async def drain(
        self, name: WorkerId, grace_s: float = DRAIN_S, *, restart: bool = False, finish: bool = False, key: str = ""
    ) -> None:
        """Take a worker out: it gets nothing new, hands over or finishes what it has, and ends. Waits until it has
        ended, or, to ``restart``, until it serves again; the drain goes on when the caller is cancelled. Idempotent.

        Args:
            name: of a prefill, decode or colocated worker.
            grace_s: what is not finished by then goes on elsewhere.
            restart: begin another life.
            finish: what runs on a decode worker is finished there; else it goes on on another, with its KV.
            key: of the call; with that of an earlier one, nothing is begun, and that one's end is waited for.

        Raises:
            NotFoundError: there is no such worker.
            RequestError: it is a gateway, shares experts with others, or ``grace_s`` is out of bounds.
            CapacityError: it is the last of its pool that is ready, or the cluster is still starting.
        """
        kept = next((kept for kept in self._drains if key and kept.key == key), None)
        if kept is None:
            kept = self._begin_drain(name, grace_s, restart, finish, key)
        [worker] = [worker for worker in self._controller.desired if worker.worker == kept.worker]

        def over() -> bool:
            if kept.restart and worker.wanted:
                return worker.peer != kept.life and worker.phase == "ready"
            return worker.peer != kept.life or worker.phase == "drained"

        await self._controller.until(over)

    def _begin_drain(self, name: WorkerId, grace_s: float, restart: bool, finish: bool, key: str) -> KeptDrain:
        self._check_started()
        worker = next((worker for worker in self._controller.desired if worker.worker == name), None)
        if worker is None:
            known = ", ".join(worker.worker for worker in self._controller.desired if worker.role != "gateway")
            raise NotFoundError(f"no worker is called {name[:100]!r}; there are {known}", param="worker")
        if worker.role == "gateway":
            raise RequestError(
                "a gateway cannot be drained: its clients are connected to it",
                fix="`tandem restart gateway` begins another life of each",
                param="worker",
            )
        self._check_experts(worker.role, "worker")
        self._check_grace(grace_s)
        if [other for other in self._pool(worker.role) if other.phase == "ready"] == [worker]:
            raise CapacityError(
                f"{name} is the last {worker.role} worker that is ready", fix=f"first `tandem scale {worker.role} N`"
            )
        kept = KeptDrain(key, name, worker.peer, restart)
        if key:
            self._drains.append(kept)
        if worker.wanted or not restart:
            self._controller.take_out(worker, grace_s, restart=restart, hand_over=not finish)
        return kept

    async def restart(self, pool: str = "", grace_s: float = DRAIN_S, key: str = "") -> AsyncGenerator[WorkerId, None]:
        """Begin another life of every worker of a pool or of the gateways, or of all: one is drained, starts and serves
        before the next is drained. Of those that are alone a second one lives meanwhile, where there is room for it;
        else what comes meanwhile waits. When the caller leaves, no further one is begun; when the controller dies, its
        next life goes on, and waits a minute for the caller to come back.

        Args:
            pool: prefill, decode, colocated or gateway; "": all there are, gateways last.
            grace_s: what a worker has not finished or handed over by then goes on elsewhere, and clients of a gateway
                lose their connections.
            key: of the call; with that of an earlier one, that is followed from its beginning.

        Yields:
            each worker that serves again.

        Raises:
            NotFoundError: the configuration has no such pool.
            RequestError: its workers share experts, or ``grace_s`` is out of bounds.
            CapacityError: another restart is under way, or the cluster is still starting.
            WorkerError: one did not come back; those that are left have not been touched.
        """
        kept = self._rolling.kept
        if kept is None or not key or kept.key != key:
            key = key or secrets.token_hex(8)
            self._rolling.begin(key, self._to_restart(pool, grace_s), grace_s)
        async with contextlib.aclosing(self._rolling.follow(key)) as restarted:
            async for worker in restarted:
                yield worker

    def _to_restart(self, pool: str, grace_s: float) -> list[WorkerId]:
        self._check_started()
        self._check_grace(grace_s)
        pools = [pool] if pool else [name for name in (*PoolsConfig.model_fields, "gateway") if self._pool(name)]
        workers = [worker for name in pools for worker in self._workers_of(name, "gateway")]
        for name in pools:
            self._check_experts(name, "pool")
        return [worker.worker for worker in workers if worker.wanted]

    def _one_more(self, pool: str) -> Desired | None:
        """Have one more worker of a pool, or None where there is no room for it."""
        more = self._candidates(pool, 1)
        try:
            self._check_tiers(pool, len(self._pool(pool)) + 1)
            self._launcher.check_room([(worker.worker, pool) for worker in more])
        except (RequestError, CapacityError):
            return None
        self._controller.take_in(more[0])
        return more[0]

    def _candidates(self, pool: str, count: int) -> list[Desired]:
        """Who would come if a pool had so many more: those that were drained first, then new ones."""
        workers = self._pool(pool)
        new = [Desired(f"{pool}-{number}", pool) for number in range(len(workers), len(workers) + count)]
        return ([worker for worker in workers if not worker.wanted] + new)[:count]

    async def scale(self, pool: str, replicas: int, key: str = "") -> tuple[list[WorkerId], list[WorkerId]]:
        """Have so many workers in a pool. Those that were drained come back first; those that are not ready leave
        first, then those with the highest numbers. Does not wait for them.

        Args:
            pool: prefill, decode or colocated.
            replicas: 1 to 1024.
            key: of the call; with that of an earlier one, nothing is done, and that one's answer is given.

        Returns:
            Those that start, and those that are drained.

        Raises:
            NotFoundError: the configuration has no such pool.
            RequestError: so many cannot be.
            CapacityError: there is no room for them, or the cluster is still starting.
        """
        for kept in self._scales:
            if key and kept.key == key:
                return kept.started, kept.drained
        self._check_started()
        workers = self._workers_of(pool)
        if not 1 <= replicas <= _MAX_REPLICAS:
            raise RequestError(f"replicas is {replicas}, expected 1 to {_MAX_REPLICAS}", param="replicas")
        self._check_experts(pool, "pool")
        self._check_tiers(pool, replicas)
        wanted = [worker for worker in workers if worker.wanted]
        surplus = sorted(wanted, key=lambda worker: worker.phase != "ready")[replicas:]
        starting = self._candidates(pool, max(0, replicas - len(wanted)))
        self._launcher.check_room([(worker.worker, pool) for worker in starting])
        answer = [worker.worker for worker in starting], [worker.worker for worker in surplus]
        if key:
            self._scales.append(KeptScale(key, *answer))
        for worker in starting:
            self._controller.take_in(worker)
        for worker in surplus:
            self._controller.take_out(worker, DRAIN_S, restart=False)
        return answer

    def lacking(self) -> list[str]:
        """Roles of which nobody is ready, so that requests cannot be served."""
        ready = {worker.role for worker in self._controller.desired if worker.phase == "ready"}
        return sorted({role for _, role in desired_workers(self._config)} - ready)

    def _pool(self, role: str) -> list[Desired]:
        return [worker for worker in self._controller.desired if worker.role == role]

    def _workers_of(self, pool: str, *others: str) -> list[Desired]:
        """Of one of the configuration's pools, or of ``others`` that count as such."""
        workers = self._pool(pool)
        if pool not in (*PoolsConfig.model_fields, *others) or not workers:
            roles = {worker.role for worker in self._controller.desired}
            pools = ", ".join(sorted(roles & {*PoolsConfig.model_fields, *others}))
            raise NotFoundError(f"there is no pool {pool[:100]!r}; there are {pools}", param="pool")
        return workers

    def _check_grace(self, grace_s: float) -> None:
        if not 0 <= grace_s <= _MAX_DRAIN_S:
            raise RequestError(f"grace_s is {grace_s:g}, expected 0 to {_MAX_DRAIN_S:g}", param="grace_s")

    def _check_started(self) -> None:
        desired = self._controller.desired
        if not desired or not all(worker.first_ready.done() for worker in desired):
            raise CapacityError("the cluster is still starting", fix="try again when it serves")

    def _check_experts(self, role: str, param: str) -> None:
        """Workers that share experts live and end together."""
        size = self._config.expert_parallel(role)
        if size > 1:
            raise RequestError(
                f"workers of pools.{role} share experts in groups of {size}: one cannot come or leave alone",
                param=param,
            )

    def _check_tiers(self, pool: str, replicas: int) -> None:
        """What workers divide among themselves when they start, they divide by the numbers of the YAML."""
        if pool == "gateway":
            return
        shared = [tier.kind for tier in self._config.offload.tiers if tier.kind in ("disk", "s3")]
        configured = getattr(self._config.pools, pool).replicas
        if shared and replicas > configured:
            raise RequestError(
                f"replicas is {replicas}; the {shared[0]} tier's capacity is divided among the workers of the YAML, "
                f"of which {configured} are in this pool",
                fix=f"start with a larger pools.{pool}.replicas, and scale down",
                param="replicas",
            )
