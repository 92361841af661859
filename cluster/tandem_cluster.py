"""A Tandem on a Ray cluster, as the command line sees it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.config import Config
from ..core.environment import cache_folder
from ..core.errors import ConfigError, WorkerError
from .actors import ControllerActor
from .controller import Event, WorkerStatus
from .keeper import Keeper, Logs
from .placement_groups import check_resources
from .ray_cluster import ANSWER_TIMEOUT_S, NAMESPACE
from .ray_errors import cause, reason

NAME = "tandem"

_PATIENCE_S = 10.0
"""A controller that answers at all answers sooner, however busy its machine is."""
_RESTART_S = 60.0
"""One that ended has been started again by then, or given up, pauses included."""


class Cluster:
    """A running Tandem, seen from a driver process. Every method blocks."""

    def __init__(self, keeper: Any, name: str) -> None:
        self._keeper = keeper
        self._name = name
        self._found: Any = None
        self._starting: Any = None

    @property
    def _controller(self) -> Any:
        """Raises WorkerError if it is gone, or not there yet."""
        if self._found is None:
            try:
                self._found = ray.get_actor(_controller_name(self._name), NAMESPACE)
            except ValueError:
                raise WorkerError(self._ended("there is no controller")) from None
        return self._found

    @classmethod
    def launch(cls, config: Config, log_folder: Path, name: str = NAME) -> Cluster:
        """Start a keeper and a controller on the connected Ray cluster; `wait_ready` comes next.

        Args:
            config: what should run.
            log_folder: where its logs go.
            name: several clusters can share a Ray under different names.

        Raises:
            ConfigError: one runs already, or the Ray cluster lacks resources.
        """
        with contextlib.suppress(ValueError):
            ray.get_actor(_keeper_name(name), NAMESPACE)
            raise ConfigError("Tandem already runs on this Ray cluster", fix="`tandem down` stops it")
        check_resources(config)
        node = ray.get_runtime_context().get_node_id()
        here = {
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        log = config.log
        keeper: Any = (
            ray.remote(Keeper)
            .options(name=_keeper_name(name), lifetime="detached", max_concurrency=16, **here)
            .remote(
                ControllerActor,
                {"name": _controller_name(name), "max_concurrency": 1000, **here},
                (name, config.model_dump_json(), str(log_folder)),
                Logs(str(log_folder), log.level, log.format, log.max_per_s),
            )
        )
        cluster = cls(keeper, name)
        cluster._starting = keeper.start.remote()
        return cluster

    @classmethod
    def find(cls) -> Cluster:
        """The Tandem that runs on the connected Ray cluster.

        Raises:
            ConfigError: there is none.
        """
        try:
            return cls(ray.get_actor(_keeper_name(NAME), NAMESPACE), NAME)
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
            raise cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"the keeper died: {reason(error)}") from None
        return True

    def phases(self) -> dict[str, str]:
        """How far each worker is; empty while the controller itself is still starting, or is gone."""
        try:
            return dict(ray.get(self._controller.phases.remote(), timeout=ANSWER_TIMEOUT_S))
        except (ray.exceptions.RayError, WorkerError):
            return {}

    def status(self) -> list[WorkerStatus]:
        """Every worker, and its load.

        Raises:
            WorkerError: the controller does not answer.
        """
        return list(self._ask(self._controller.status.remote()))

    def supervisors(self) -> dict[str, str]:
        """Where each worker's node tells its health and metrics.

        Raises:
            WorkerError: the controller does not answer.
        """
        return dict(self._ask(self._controller.supervisors.remote()))

    def events(self, after: int, timeout_s: float) -> list[Event]:
        """News since event ``after``; waits for some for at most ``timeout_s``.

        Raises:
            WorkerError: the controller is gone.
        """
        ask = self._controller.events
        try:
            # Not tried again by Ray, which would tell the terminal about it.
            answer = ask.options(max_task_retries=0).remote(after, timeout_s)
            reply = ray.get(answer, timeout=timeout_s + ANSWER_TIMEOUT_S)
        except ray.exceptions.ActorUnavailableError:
            reply = self._ask(ask.remote(after, 0.0), _RESTART_S)
        except ray.exceptions.GetTimeoutError:
            raise WorkerError("the controller does not answer") from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(self._ended(f"the controller is gone: {reason(error)}")) from None
        return list(reply)

    def describe(self) -> tuple[Config, Path]:
        """The configuration that runs, and the folder of its logs.

        Raises:
            WorkerError: the controller does not answer.
        """
        config, folder = self._ask(self._controller.describe.remote())
        return Config.model_validate_json(config), Path(folder)

    def stop(self, grace_s: float) -> None:
        """End everything, the controller and the keeper last."""
        with contextlib.suppress(ray.exceptions.RayError, WorkerError):
            ray.get(self._controller.stop.remote(grace_s), timeout=2 * grace_s + 10)
            ray.kill(self._controller)
        ray.kill(self._keeper)

    def _ask(self, answer: Any, timeout_s: float = _PATIENCE_S) -> Any:
        try:
            return ray.get(answer, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise WorkerError(
                f"the controller does not answer within {timeout_s:g} s", fix="try again, or `tandem down`"
            ) from None
        except ray.exceptions.RayActorError as error:
            told = self._ended(f"the controller is gone: {reason(error)}")
            raise WorkerError(told, fix="`tandem up` starts another") from None

    def _ended(self, otherwise: str) -> str:
        """Why the cluster has ended: what the keeper says, if it still does."""
        try:
            return str(ray.get(self._keeper.verdict.remote(), timeout=ANSWER_TIMEOUT_S)) or otherwise
        except ray.exceptions.RayError:
            return otherwise


def default_log_folder() -> Path:
    """Where the logs of a launch go."""
    return cache_folder() / "logs"


def _controller_name(name: str) -> str:
    return f"{name}-controller"


def _keeper_name(name: str) -> str:
    return f"{name}-keeper"
