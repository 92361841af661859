"""Drains and scales: who comes and who leaves when an operator asks. The controller starts and ends them."""

from __future__ import annotations

from ..core.config import Config, PoolsConfig
from ..core.errors import CapacityError, NotFoundError, RequestError
from ..core.ids import WorkerId
from .controller import Controller, Desired, Launcher, desired_workers

DRAIN_S = 600.0
"""What a worker that is drained takes at most, unless told otherwise."""
_MAX_DRAIN_S = 86_400.0
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

    async def drain(self, name: WorkerId, grace_s: float = DRAIN_S, *, restart: bool = False) -> None:
        """Take a worker out: it gets nothing new, finishes what it has, and ends. Waits until it has ended, or, to
        ``restart``, until it serves again; the drain goes on when the caller is cancelled. Idempotent.

        Args:
            name: of a prefill, decode or colocated worker.
            grace_s: what is not finished by then goes on elsewhere.
            restart: begin another life.

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
        if not 0 <= grace_s <= _MAX_DRAIN_S:
            raise RequestError(f"grace_s is {grace_s:g}, expected 0 to {_MAX_DRAIN_S:g}", param="grace_s")
        if [other for other in self._pool(worker.role) if other.phase == "ready"] == [worker]:
            raise CapacityError(
                f"{name} is the last {worker.role} worker that is ready", fix=f"first `tandem scale {worker.role} N`"
            )
        life = worker.peer
        if worker.wanted or not restart:
            self._controller.take_out(worker, grace_s, restart=restart)

        def over() -> bool:
            if restart and worker.wanted:
                return worker.peer != life and worker.phase == "ready"
            return worker.peer != life or worker.phase == "drained"

        await self._controller.until(over)

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
        workers = self._pool(pool)
        if pool not in PoolsConfig.model_fields or not workers:
            pools = ", ".join(sorted({worker.role for worker in self._controller.desired} - {"gateway"}))
            raise NotFoundError(f"there is no pool {pool[:100]!r}; there are {pools}", param="pool")
        if not 1 <= replicas <= _MAX_REPLICAS:
            raise RequestError(f"replicas is {replicas}, expected 1 to {_MAX_REPLICAS}", param="replicas")
        self._check_experts(pool, "pool")
        self._check_tiers(pool, replicas)
        wanted = [worker for worker in workers if worker.wanted]
        surplus = sorted(wanted, key=lambda worker: worker.phase != "ready")[replicas:]
        num_missing = max(0, replicas - len(wanted))
        self._launcher.check_room(pool, num_missing)
        new = [Desired(f"{pool}-{number}", pool) for number in range(len(workers), len(workers) + num_missing)]
        starting = ([worker for worker in workers if not worker.wanted] + new)[:num_missing]
        for worker in starting:
            self._controller.take_in(worker)
        for worker in surplus:
            self._controller.take_out(worker, DRAIN_S, restart=False)
        return [worker.worker for worker in starting], [worker.worker for worker in surplus]

    def lacking(self) -> list[str]:
        """Roles of which nobody is ready, so that requests cannot be served."""
        ready = {worker.role for worker in self._controller.desired if worker.phase == "ready"}
        return sorted({role for _, role in desired_workers(self._config)} - ready)

    def _pool(self, role: str) -> list[Desired]:
        return [worker for worker in self._controller.desired if worker.role == role]

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
