"""Tandem's processes as Ray actors, and their placement. `ray_cluster` and `probe_actors` alone speak to Ray too.

Ray starts processes, tells when they die, and carries the control calls below. Tokens and KV never pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.clock import SystemClock
from ..core.config import Config
from ..core.environment import cache_folder, show_gpus, worker_environment
from ..core.errors import ConfigError, TandemError, WorkerError
from ..core.expert_messages import LoadEntries
from ..core.ids import PeerId
from ..core.log import configure_logging, logger
from ..core.messages import Member, Membership, Report
from ..core.wire import ClusterKeys, make_cluster_keys
from .controller import Controller, Event, Handle, WorkerStatus
from .ray_cluster import ANSWER_TIMEOUT_S, NAMESPACE, check_resources, check_room
from .rebalancing import Rebalancing
from .scaling import Scaling

if TYPE_CHECKING:
    from ..kv_transfer.trial import TrialEnd

NAME = "tandem"

_START_TIMEOUT_S = 600.0
_LEAVE_S = 5.0
"""What a process that gets SIGTERM takes at most: what is not done by then is done again elsewhere."""
_PATIENCE_S = 10.0
"""A controller that answers at all answers sooner, however busy its machine is."""


# ---- processes ------------------------------------------------------------------------------------------------------


class _Process:
    """What every worker and gateway actor has."""

    def __init__(self, peer: PeerId, role: str, config: str, keys: bytes, log_folder: str, controller: Any) -> None:
        self._config = Config.model_validate_json(config)
        configure_logging(peer, self._config.log.level, self._config.log.format, Path(log_folder) / f"{peer}.log")
        self._peer = peer
        self._role = role
        self._keys = msgspec.msgpack.decode(keys, type=ClusterKeys)
        self._controller = controller
        self._runtime: Any = None
        self._ended = threading.Event()
        self._trial: TrialEnd | None = None
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._leave, name="leave").start())

    def start(self) -> bytes:
        """Build and serve; returns the encoded `Member`."""
        address = ray.util.get_node_ip_address()
        show_gpus(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))

        def progress(phase: str) -> None:
            self._controller.phase.remote(self._peer, phase)

        # Imported here: the controller's process needs neither torch nor a web server.
        if self._role == "gateway":
            from .gateway.runtime import GatewayRuntime

            self._runtime = GatewayRuntime(self._peer, self._config, self._keys, address, progress)
        else:
            from .worker_runtime import WorkerRuntime

            self._runtime = WorkerRuntime(
                self._peer,
                self._role,
                self._config,
                self._keys,
                address,
                address,
                progress,
                self._host_tier,
                self._meet,
                lambda text: self._controller.note.remote(self._peer, text),
            )
        member: Member = self._runtime.start()
        return msgspec.msgpack.encode(member)

    def _host_tier(self, block_bytes: int) -> Path:
        """Where this node's host tier is found; it is started by the first that asks."""
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        try:
            return Path(ray.get(self._controller.host_tier.remote(node, address, block_bytes)))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None

    def _meet(self, rendezvous: str) -> str:
        """Wait for those that share experts with this worker."""
        try:
            return str(ray.get(self._controller.meet.remote(self._peer, rendezvous)))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None

    def link_offer(self) -> bytes:
        """What readers may try before the model is there: see `kv_transfer.trial`."""
        return msgspec.msgpack.encode(self._open_trial().offer())

    def link_refusals(self, offers: list[bytes]) -> list[str]:
        """Why KV could not be read from the ends of these offers, or "" each."""
        from ..kv_transfer.trial import Offer

        trial = self._open_trial()
        return [trial.refusal(msgspec.msgpack.decode(offer, type=Offer)) for offer in offers]

    def _open_trial(self) -> TrialEnd:
        from ..kv_transfer.trial import BLOCK_BYTES, TrialEnd

        address = ray.util.get_node_ip_address()
        self._trial = TrialEnd(self._peer, self._keys, address, self._config.kv, BLOCK_BYTES)
        return self._trial

    def wait(self) -> str:
        """Return when the process has been stopped; if it dies, the caller is told by Ray."""
        self._ended.wait()
        return "stopped"

    def follow(self, membership: bytes) -> None:
        """The cluster has changed."""
        if self._trial is not None:
            self._trial.close()
            self._trial = None
        if self._runtime is not None:
            self._runtime.follow(msgspec.msgpack.decode(membership, type=Membership))

    def report(self) -> bytes:
        """The encoded `Report`."""
        return msgspec.msgpack.encode(self._runtime.report())

    def rebalance(self, timeout_s: float) -> str:
        """Place the experts of this worker's group anew; see `WorkerRuntime.rebalance`."""
        return str(self._runtime.rebalance(timeout_s))

    def expert_load(self, after: int) -> bytes:
        """The encoded `LoadEntries`."""
        return msgspec.msgpack.encode(self._runtime.expert_load(after))

    def stop(self, grace_s: float) -> None:
        """End the threads."""
        if self._runtime is not None:
            self._runtime.stop(grace_s)
        self._ended.set()

    def _leave(self) -> None:
        """SIGTERM: hand over what we have, and end; the controller starts the next life."""
        logger.info("SIGTERM: ends within %g s", _LEAVE_S)
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(self._controller.leaving.remote(self._peer), timeout=ANSWER_TIMEOUT_S)
        self.stop(_LEAVE_S)

    def pid(self) -> int:
        """For tests and for people."""
        return psutil.Process().pid


class _ActorHandle:
    """`controller.Handle` over a Ray actor."""

    def __init__(self, peer: PeerId, actor: Any) -> None:
        self._peer = peer
        self._actor = actor

    async def ready(self) -> Member:
        try:
            encoded = await asyncio.wait_for(self._actor.start.remote(), _START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"{self._peer} died while it started: {_reason(error)}") from None
        except TimeoutError:
            raise WorkerError(f"{self._peer} did not start within {_START_TIMEOUT_S:g} s") from None
        return msgspec.msgpack.decode(encoded, type=Member)

    async def link_offer(self) -> bytes:
        return bytes(await self._ask(self._actor.link_offer.remote()))

    async def link_refusals(self, offers: list[bytes]) -> list[str]:
        return list(await self._ask(self._actor.link_refusals.remote(offers)))

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{self._peer} does not answer: {type(error).__name__}") from None

    async def gone(self) -> str:
        try:
            how = str(await self._actor.wait.remote())
            ray.kill(self._actor)
            return how
        except ray.exceptions.RayActorError as error:
            return _reason(error)

    async def follow(self, membership: Membership) -> None:
        self._actor.follow.remote(msgspec.msgpack.encode(membership))

    async def report(self) -> Report | None:
        try:
            encoded = await asyncio.wait_for(self._actor.report.remote(), ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return None
        return msgspec.msgpack.decode(encoded, type=Report)

    async def rebalance(self, timeout_s: float) -> str:
        return str(await self._ask(self._actor.rebalance.remote(timeout_s)))

    async def expert_load(self, after: int) -> LoadEntries:
        return msgspec.msgpack.decode(await self._ask(self._actor.expert_load.remote(after)), type=LoadEntries)

    async def stop(self, grace_s: float) -> None:
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(self._actor.stop.remote(grace_s), grace_s + ANSWER_TIMEOUT_S)
        ray.kill(self._actor)


class _RayLauncher:
    """`controller.Launcher` over Ray: workers are spread over the nodes, gateways stay on the controller's."""

    def __init__(
        self,
        name: str,
        config: Config,
        keys: ClusterKeys,
        log_folder: str,
        on_host_tiers: Callable[[list[Member]], Awaitable[None]],
    ) -> None:
        self._name = name
        self._config = config
        self._keys = msgspec.msgpack.encode(keys)
        self._log_folder = log_folder
        self._phases: dict[PeerId, Callable[[str], None]] = {}
        self._on_host_tiers = on_host_tiers
        self._host_tiers: dict[str, Any] = {}
        self._readable: dict[str, Member] = {}
        """By node, host tiers that other nodes may read."""
        self._watches: set[asyncio.Task[None]] = set()

    async def host_tier(self, node: str, address: str, block_bytes: int) -> str:
        """The folder of a node's host tier, which is started if there is none.

        Args:
            node: Ray's name of it.
            address: where other nodes reach it.
            block_bytes: of a block.

        Raises:
            ConfigError: it cannot be; names the key.
            WorkerError: its process died.
        """
        if node not in self._host_tiers:
            # Imported here, as by a worker's process: most clusters have no tiers.
            from .host_tier import HostTierOwner

            self._host_tiers[node] = (
                ray.remote(HostTierOwner)
                .options(
                    num_cpus=0,
                    max_concurrency=8,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                )
                .remote(self._config.model_dump_json(), self._log_folder, self._keys, address)
            )
        owner = self._host_tiers[node]
        try:
            folder = str(await owner.start.remote(block_bytes))
            endpoint = str(await owner.endpoint.remote())
            if endpoint and node not in self._readable:
                self._readable[node] = Member(Path(folder).name, "host", address, endpoint)
                watch = asyncio.create_task(self._watch_host_tier(node, owner))
                self._watches.add(watch)
                watch.add_done_callback(self._watches.discard)
                await self._on_host_tiers(list(self._readable.values()))
            return folder
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayActorError as error:
            self._host_tiers.pop(node, None)
            raise WorkerError(f"the host tier of node {node} died: {_reason(error)}") from None

    async def _watch_host_tier(self, node: str, owner: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await owner.wait.remote()
        del self._readable[node]
        if self._host_tiers.get(node) is owner:
            del self._host_tiers[node]
        await self._on_host_tiers(list(self._readable.values()))

    async def stop_host_tiers(self) -> None:
        """End all of them, and what they left on their nodes. Idempotent."""
        while self._host_tiers:
            _, tier = self._host_tiers.popitem()
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                await asyncio.wait_for(tier.stop.remote(), ANSWER_TIMEOUT_S)
            ray.kill(tier)

    def check_room(self, role: str, count: int) -> None:
        check_room(self._config, role, count)

    def phase(self, peer: PeerId, phase: str) -> None:
        """A process tells how its start goes on."""
        if peer in self._phases:
            self._phases[peer](phase)

    def launch(self, peer: PeerId, role: str, on_phase: Callable[[str], None]) -> Handle:
        self._phases[peer] = on_phase
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
        if role == "gateway":
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        else:
            pool = getattr(self._config.pools, role)
            options |= {
                "num_cpus": pool.cpus_per_replica,
                "num_gpus": pool.gpus_per_replica,
                "scheduling_strategy": "SPREAD",
            }
        actor = (
            ray.remote(_Process)
            .options(
                name=f"{self._name}-{peer}",
                namespace=NAMESPACE,
                max_concurrency=8,
                runtime_env={"env_vars": worker_environment()},
                **options,
            )
            .remote(
                peer,
                role,
                self._config.model_dump_json(),
                self._keys,
                self._log_folder,
                ray.get_runtime_context().current_actor,
            )
        )
        return _ActorHandle(peer, actor)


class _ControllerActor:
    """The controller's process. It owns all others: when it goes, they go."""

    def __init__(self, name: str, config: str, log_folder: str) -> None:
        parsed = Config.model_validate_json(config)
        from .control.server import ControlServer  # gRPC is the controller's alone

        configure_logging("controller", parsed.log.level, parsed.log.format, Path(log_folder) / "controller.log")
        self._config = parsed
        self._log_folder = log_folder
        self._launcher = _RayLauncher(name, parsed, make_cluster_keys(), log_folder, self._follow_host_tiers)
        self._controller = Controller(parsed, self._launcher, SystemClock())
        scaling = Scaling(parsed, self._launcher, self._controller)
        self._control = ControlServer(
            self._controller, scaling, Rebalancing(parsed, self._controller), parsed.control, Path(log_folder)
        )

    async def start(self) -> None:
        try:
            await self._control.start()
            await self._controller.start()
        except BaseException:
            await self._control.stop()
            await self._launcher.stop_host_tiers()
            raise

    async def stop(self, grace_s: float) -> None:
        await self._control.stop()
        await self._controller.stop(grace_s)
        await self._launcher.stop_host_tiers()

    async def host_tier(self, node: str, address: str, block_bytes: int) -> str:
        return await self._launcher.host_tier(node, address, block_bytes)

    async def _follow_host_tiers(self, host_tiers: list[Member]) -> None:
        await self._controller.follow_host_tiers(host_tiers)

    async def meet(self, peer: PeerId, rendezvous: str) -> str:
        return await self._controller.meet(peer, rendezvous)

    async def phases(self) -> dict[str, str]:
        return self._controller.phases()

    async def phase(self, peer: PeerId, phase: str) -> None:
        self._launcher.phase(peer, phase)

    async def leaving(self, peer: PeerId) -> None:
        await self._controller.leaving(peer)

    async def note(self, peer: PeerId, text: str) -> None:
        await self._controller.note(peer, text)

    async def status(self) -> list[WorkerStatus]:
        return await self._controller.status()

    async def events(self, after: int, timeout_s: float) -> list[Event]:
        return await self._controller.events(after, timeout_s)

    async def describe(self) -> tuple[str, str]:
        """The configuration, as JSON, and the folder of the logs."""
        return self._config.model_dump_json(), self._log_folder


def _cause(error: ray.exceptions.RayTaskError) -> TandemError:
    """What a remote call raised; what it did not raise on purpose, with its type."""
    cause = error.cause
    return cause if isinstance(cause, TandemError) else WorkerError(f"{type(cause).__name__}: {cause}")


def _reason(error: ray.exceptions.RayActorError) -> str:
    text = str(error)
    for known in ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "exit code", "OOM", "node"):
        if known in text:
            return next((line.strip() for line in text.splitlines() if known in line), text)[:300]
    return text.splitlines()[0][:300] if text else type(error).__name__


# ---- for the command line -------------------------------------------------------------------------------------------


class Cluster:
    """A running Tandem, seen from a driver process. Every method blocks."""

    def __init__(self, controller: Any) -> None:
        self._controller: Any = controller
        self._starting: Any = None

    @classmethod
    def launch(cls, config: Config, log_folder: Path, name: str = NAME) -> Cluster:
        """Start a controller on the connected Ray cluster; `wait_ready` comes next.

        Args:
            config: what should run.
            log_folder: where its logs go.
            name: several clusters can share a Ray under different names.

        Raises:
            ConfigError: one runs already, or the Ray cluster lacks resources.
        """
        with contextlib.suppress(ValueError):
            ray.get_actor(_controller_name(name), NAMESPACE)
            raise ConfigError("Tandem already runs on this Ray cluster", fix="`tandem down` stops it")
        check_resources(config)
        node = ray.get_runtime_context().get_node_id()
        controller: Any = (
            ray.remote(_ControllerActor)
            .options(
                name=_controller_name(name),
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(name, config.model_dump_json(), str(log_folder))
        )
        cluster = cls(controller)
        cluster._starting = controller.start.remote()
        return cluster

    @classmethod
    def find(cls) -> Cluster:
        """The Tandem that runs on the connected Ray cluster.

        Raises:
            ConfigError: there is none.
        """
        try:
            return cls(ray.get_actor(_controller_name(NAME), NAMESPACE))
        except ValueError:
            raise ConfigError("no Tandem runs on this Ray cluster", fix="`tandem up` starts one") from None

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for the launch to end, at most ``timeout_s``; whether everything serves.

        Raises:
            TandemError: what a worker's start raised; everything is stopped.
        """
        done, _ = ray.wait([self._starting], timeout=timeout_s)
        if not done:
            return False
        try:
            ray.get(self._starting)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"the controller died: {_reason(error)}") from None
        return True

    def phases(self) -> dict[str, str]:
        """How far each worker is; empty while the controller itself is still starting, or is gone."""
        try:
            return dict(ray.get(self._controller.phases.remote(), timeout=ANSWER_TIMEOUT_S))
        except ray.exceptions.RayError:
            return {}

    def status(self) -> list[WorkerStatus]:
        """Every worker, and its load.

        Raises:
            WorkerError: the controller does not answer.
        """
        return list(self._ask(self._controller.status.remote()))

    def events(self, after: int, timeout_s: float) -> list[Event]:
        """News since event ``after``; waits for some for at most ``timeout_s``.

        Raises:
            WorkerError: the controller is gone.
        """
        try:
            reply = ray.get(self._controller.events.remote(after, timeout_s), timeout=timeout_s + ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise WorkerError(f"the controller is gone: {type(error).__name__}") from None
        return list(reply)

    def describe(self) -> tuple[Config, Path]:
        """The configuration that runs, and the folder of its logs.

        Raises:
            WorkerError: the controller does not answer.
        """
        config, folder = self._ask(self._controller.describe.remote())
        return Config.model_validate_json(config), Path(folder)

    def stop(self, grace_s: float) -> None:
        """End everything, the controller last."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._controller.stop.remote(grace_s), timeout=2 * grace_s + 10)
        ray.kill(self._controller)

    def _ask(self, answer: Any) -> Any:
        try:
            return ray.get(answer, timeout=_PATIENCE_S)
        except ray.exceptions.GetTimeoutError:
            raise WorkerError(
                f"the controller does not answer within {_PATIENCE_S:g} s", fix="try again, or `tandem down`"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"the controller is gone: {_reason(error)}", fix="`tandem up` starts another") from None


def default_log_folder() -> Path:
    """Where the logs of a launch go."""
    return cache_folder() / "logs"


def _controller_name(name: str) -> str:
    return f"{name}-controller"


__all__ = ["Cluster", "default_log_folder"]
