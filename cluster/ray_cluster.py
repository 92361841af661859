"""The Ray cluster that Tandem runs on: one of its own, or one that is joined."""

from __future__ import annotations

import math
import shutil
import socket
import tempfile
from pathlib import Path

import grpc
import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from ..core.config import Config
from ..core.environment import announce_local_ray, ray_authenticates
from ..core.errors import ConfigError
from .janitor import hire

NAMESPACE = "tandem"
ANSWER_TIMEOUT_S = 3.0


class LocalRay:
    """A Ray cluster of this machine alone, listening on the loopback address, gone without a trace after `stop`.

    `core.environment.prepare_local_ray` must have been called before this module was imported.

    Args:
        configs: of the clusters that will run there: they tell how many logical CPUs are needed.
    """

    def __init__(self, *configs: Config) -> None:
        # Sockets live below this folder, and their paths must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-ray-"))
        self._janitor = hire(self._folder)
        self._note: Path | None = None
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=max(psutil.cpu_count() or 1, math.ceil(sum(map(_wanted_cpus, configs)))),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=80 << 20,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self._folder),
            )
            self._note = announce_local_ray(ray.get_runtime_context().gcs_address)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End Ray and remove its files. Idempotent."""
        ray.shutdown()
        if self._note is not None:
            self._note.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._janitor.communicate()


def connect_ray(address: str | None) -> None:
    """Join a running Ray cluster as a driver.

    Raises:
        ConfigError: there is none, or it lets strangers in.
    """
    _probe(address)
    try:
        ray.init(address=address or "auto", namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address or 'this host'}: {str(error).splitlines()[0]}",
            fix="`ray start --head` starts one; `tandem serve` needs none",
        ) from None
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if addresses - {"127.0.0.1", "::1"} and not ray_authenticates():
        disconnect_ray()
        raise ConfigError(
            f"the Ray cluster at {', '.join(sorted(addresses))} can be reached from the network, "
            "and this environment does not ask for token authentication",
            fix="set RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN on every node, before `ray start`, and here",
        )


def _probe(address: str | None) -> None:
    """Ray itself waits for minutes for an address where nobody listens, or where its token is not known."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster at {address}: {(error.strerror or str(error)).lower()}",
            fix="`ray start --head` starts one and prints its address",
        ) from None
    channel = init_grpc_channel(f"{host}:{port}")
    try:
        NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        # Whatever else it is, Ray will tell.
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError(
                f"the Ray cluster at {address} refuses this environment's token",
                fix="RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token, must be as they were for "
                "its `ray start`",
            ) from None
    finally:
        channel.close()


def disconnect_ray() -> None:
    """Leave the Ray cluster; what runs there goes on."""
    ray.shutdown()


def _wanted_cpus(config: Config) -> float:
    pools = (config.pools.prefill, config.pools.decode, config.pools.colocated)
    return sum(pool.replicas * pool.cpus_per_replica for pool in pools if pool is not None)
