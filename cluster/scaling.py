"""Drains and scales: who comes and who leaves when an operator asks. The controller starts and ends them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..core.config import Config, PoolsConfig
from ..core.errors import CapacityError, NotFoundError, RequestError, WorkerError
from ..core.ids import WorkerId
from .controller import Controller, Desired, desired_workers
from .launcher import Launcher

DRAIN_S = 600.0
"""What a worker that is drained takes at most, unless told otherwise."""
_MAX_DRAIN_S = 86_400.0
_ALONE_S = 5.0
"""What a worker takes to finish while nobody else of its pool is there: what comes meanwhile waits."""
_MAX_REPLICAS = 1024


class Scaling:
    """Belongs to the controller's event loop.

    Args:
        config: what was started.
        launcher: knows what there is room for.
        controller: of the cluster.
    """

    def __init__(self, config: Config, launcher: Launcher, controller: Controller) -> None:
        self._config = config
        self._launcher = launcher
        self._controller = controller
        self._restarting = False

    async def drain(
        self, name: WorkerId, grace_s: float = DRAIN_S, *, restart: bool = False, finish: bool = False
    ) -> None:
        """Take a worker out: it gets nothing new, hands over or finishes what it has, and ends. Waits until it has
        ended, or, to ``restart``, until it serves again; the drain goes on when the caller is cancelled. Idempotent.

        Args:
            name: of a prefill, decode or colocated worker.
            grace_s: what is not finished by then goes on elsewhere.
            restart: begin another life.
            finish: what runs on a decode worker is finished there; else it goes on on another, with its KV.

        Raises:
            NotFoundError: there is no such worker.
            RequestError: it is a gateway, shares experts with others, or ``grace_s`` is out of bounds.
            CapacityError: it is the last of its pool that is ready, or the cluster is still starting.
        """
        self._check_started()
        worker = next((worker for worker in self._controller.desired if worker.worker == name), None)
        if worker is None:
            known = ", ".join(worker.worker for worker in self._controller.desired if worker.role != "gateway")
            raise NotFoundError(f"no worker is called {name[:100]!r}; there are {known}", param="worker")
        if worker.role == "gateway":
            raise RequestError("a gateway cannot be drained: its clients are connected to it", param="worker")
        self._check_experts(worker.role, "worker")
        self._check_grace(grace_s)
        if [other for other in self._pool(worker.role) if other.phase == "ready"] == [worker]:
            raise CapacityError(
                f"{name} is the last {worker.role} worker that is ready", fix=f"first `tandem scale {worker.role} N`"
            )
        life = worker.peer
        if worker.wanted or not restart:
            self._controller.take_out(worker, grace_s, restart=restart, hand_over=not finish)

        def over() -> bool:
            if restart and worker.wanted:
                return worker.peer != life and worker.phase == "ready"
            return worker.peer != life or worker.phase == "drained"

        await self._controller.until(over)

    async def restart(self, pool: str = "", grace_s: float = DRAIN_S) -> AsyncGenerator[WorkerId, None]:
        """Begin another life of every worker of a pool, or of all but the gateways: one is drained, starts and serves
        before the next is drained. Of a pool with one worker a second one lives meanwhile, where there is room for it;
        else what comes meanwhile waits. When the caller leaves, no further one is begun.

        Yields:
            each worker that serves again.

        Raises:
            NotFoundError: the configuration has no such pool.
            RequestError: its workers share experts, or ``grace_s`` is out of bounds.
            CapacityError: another restart is under way, or the cluster is still starting.
            WorkerError: one did not come back; those that are left have not been touched.
        """
        self._check_started()
        self._check_grace(grace_s)
        pools = [pool] if pool else [name for name in PoolsConfig.model_fields if self._pool(name)]
        for name in pools:
            self._workers_of(name)
            self._check_experts(name, "pool")
        if self._restarting:
            raise CapacityError("another restart is under way", fix="`tandem watch` shows how it goes on")
        self._restarting = True
        try:
            for name in pools:
                workers = [worker for worker in self._pool(name) if worker.wanted]
                spare = await self._spare(name) if len(workers) == 1 else None
                try:
                    for worker in workers:
                        if worker.wanted:
                            await self._replace(worker, grace_s)
                            yield worker.worker
                finally:
                    if spare is not None:
                        self._controller.background(self._dismiss(spare))
        finally:
            self._restarting = False

    async def _spare(self, pool: str) -> Desired | None:
        """One more worker of a pool, or None where there is no room for it."""
        try:
            self._check_tiers(pool, len(self._pool(pool)) + 1)
            self._launcher.check_room(pool, 1)
        except (RequestError, CapacityError):
            return None
        [spare] = self._start(pool, 1)
        try:
            await self._serves(spare, "")
        except WorkerError:
            self._controller.take_out(spare, 0, restart=False)
            raise
        return spare

    async def _dismiss(self, spare: Desired) -> None:
        """Take a spare worker out as soon as it is not the only one."""
        others = [worker for worker in self._pool(spare.role) if worker is not spare]
        await self._controller.until(lambda: any(worker.phase == "ready" for worker in others))
        self._controller.take_out(spare, DRAIN_S, restart=False)

    async def _replace(self, worker: Desired, grace_s: float) -> None:
        life = worker.peer
        alone = not any(other.phase == "ready" for other in self._pool(worker.role) if other is not worker)
        self._controller.take_out(worker, min(grace_s, _ALONE_S) if alone else grace_s, restart=True)
        await self._serves(worker, life)

    async def _serves(self, worker: Desired, after: str) -> None:
        """Wait until a worker serves, in another life than ``after``."""

        def settled() -> bool:
            return worker.peer != after and (worker.phase == "ready" or _failed(worker) or not worker.wanted)

        await self._controller.until(settled)
        if _failed(worker):
            raise WorkerError(f"{worker.worker} does not come back", fix="`tandem watch` tells why; then begin again")

    def _start(self, pool: str, count: int) -> list[Desired]:
        """Have more workers in a pool; those that were drained come back first."""
        workers = self._pool(pool)
        new = [Desired(f"{pool}-{number}", pool) for number in range(len(workers), len(workers) + count)]
        starting = ([worker for worker in workers if not worker.wanted] + new)[:count]
        for worker in starting:
            self._controller.take_in(worker)
        return starting

    async def scale(self, pool: str, replicas: int) -> tuple[list[WorkerId], list[WorkerId]]:
        """Have so many workers in a pool. Those that were drained come back first; those that are not ready leave
        first, then those with the highest numbers. Does not wait for them.

        Returns:
            Those that start, and those that are drained.

        Raises:
            NotFoundError: the configuration has no such pool.
            RequestError: so many cannot be.
            CapacityError: there is no room for them, or the cluster is still starting.
        """
        self._check_started()
        workers = self._workers_of(pool)
        if not 1 <= replicas <= _MAX_REPLICAS:
            raise RequestError(f"replicas is {replicas}, expected 1 to {_MAX_REPLICAS}", param="replicas")
        self._check_experts(pool, "pool")
        self._check_tiers(pool, replicas)
        wanted = [worker for worker in workers if worker.wanted]
        surplus = sorted(wanted, key=lambda worker: worker.phase != "ready")[replicas:]
        num_missing = max(0, replicas - len(wanted))
        self._launcher.check_room(pool, num_missing)
        starting = self._start(pool, num_missing)
        for worker in surplus:
            self._controller.take_out(worker, DRAIN_S, restart=False)
        return [worker.worker for worker in starting], [worker.worker for worker in surplus]

    def lacking(self) -> list[str]:
        """Roles of which nobody is ready, so that requests cannot be served."""
        ready = {worker.role for worker in self._controller.desired if worker.phase == "ready"}
        return sorted({role for _, role in desired_workers(self._config)} - ready)

    def _pool(self, role: str) -> list[Desired]:
        return [worker for worker in self._controller.desired if worker.role == role]

    def _workers_of(self, pool: str) -> list[Desired]:
        workers = self._pool(pool)
        if pool not in PoolsConfig.model_fields or not workers:
            pools = ", ".join(sorted({worker.role for worker in self._controller.desired} - {"gateway"}))
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
        shared = [tier.kind for tier in self._config.offload.tiers if tier.kind in ("disk", "s3")]
        configured = getattr(self._config.pools, pool).replicas
        if shared and replicas > configured:
            raise RequestError(
                f"replicas is {replicas}; the {shared[0]} tier's capacity is divided among the workers of the YAML, "
                f"of which {configured} are in this pool",
                fix=f"start with a larger pools.{pool}.replicas, and scale down",
                param="replicas",
            )


def _failed(worker: Desired) -> bool:
    """Whether its newest life was a short one."""
    return worker.phase.startswith("restarts in")
