"""A node's host tier: its folder, the processes that keep its memory and let other nodes read it, and new ones when
they die."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..core.config import Config
from ..core.errors import TandemError
from ..core.log import configure_logging, logger
from ..core.wire import ClusterKeys
from ..kv_transfer.offload.build import host_socket, start_host_tier
from ..kv_transfer.offload.remote_task import Task, start_server
from .ending import Ending
from .janitor import hire

_PAUSE_S = 1.0


class HostTierOwner:
    """Outlives the node's workers, so that a new life of one finds what the last one stored. When this process ends,
    however it does, the processes end with it, and a janitor removes the folder. Thread-safe.

    Args:
        config: the cluster's, as JSON.
        log_folder: where its log goes.
        keys: the cluster's, encoded; for a remote tier.
        address: of this node, where others reach it; for a remote tier.
    """

    def __init__(self, config: str, log_folder: str, keys: bytes = b"", address: str = "") -> None:
        self._config = Config.model_validate_json(config)
        log = self._config.log
        configure_logging("host-tier", log.level, log.format, Path(log_folder) / "host-tier.log", log.max_per_s)
        self._keys = keys
        self._address = address
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._endpoint = ""
        self._processes: list[_Watched] = []
        self._ending = Ending()

    def start(self, block_bytes: int) -> str:
        """Start the processes, unless they run. Returns the folder where the node's workers find the keeper.

        Raises:
            ConfigError: see `build.start_host_tier` and `remote_task.start_server`.
        """
        with self._lock:
            if self._folder is None:
                # Sockets live in this folder, and their paths must be short.
                folder = Path(tempfile.mkdtemp(prefix="tandem-host-"))
                self._janitor = hire(folder, orphan=True)
                try:
                    self._start(block_bytes, folder)
                except BaseException:
                    self._leave(folder)
                    raise
                self._folder = folder
            return str(self._folder)

    def endpoint(self) -> str:
        """Where other nodes read it; "": nowhere."""
        return self._endpoint

    def wait(self) -> None:
        """Return when it has been stopped, or somebody else waits; if the process dies, Ray tells."""
        self._ending.wait()

    def stop(self) -> None:
        """End the processes, and remove the folder. Blocks. Idempotent."""
        with self._lock:
            self._ending.set()
            if self._folder is not None:
                self._leave(self._folder)
                self._folder = None

    def _start(self, block_bytes: int, folder: Path) -> None:
        offload = self._config.offload
        caches = _least_cache_bytes(self._config)
        self._processes.append(
            _Watched("host tier's memory", lambda: start_host_tier(offload, block_bytes, folder, caches))
        )
        remote = next((tier for tier in offload.tiers if tier.kind == "remote"), None)
        if remote is not None:
            keys = msgspec.msgpack.decode(self._keys, type=ClusterKeys)
            kv, path = self._config.kv.model_dump_json(), str(host_socket(folder))
            task = Task(path, block_bytes, self._address, 0, keys, kv, remote.timeout_s)
            self._processes.append(_Watched("host tier's server", lambda: self._serve(task)))

    def _serve(self, task: Task) -> subprocess.Popen[bytes]:
        # A new life listens where the last one did: everybody knows the place.
        port = int(self._endpoint.rpartition(":")[2] or 0)
        process, self._endpoint = start_server(msgspec.structs.replace(task, port=port))
        return process

    def _leave(self, folder: Path) -> None:
        while self._processes:
            self._processes.pop().close()
        shutil.rmtree(folder, ignore_errors=True)
        self._janitor.communicate()


def _least_cache_bytes(config: Config) -> int:
    """What KV takes of a node's memory at least: one worker is there, and of those on the CPU some capacities are
    known."""
    sizes = []
    for role in type(config.pools).model_fields:
        pool = getattr(config.pools, role)
        if pool is not None:
            capacity = config.of_pool(role).kv.capacity
            sizes.append(0 if pool.gpus_per_replica or capacity == "auto" else capacity)
    return min(sizes)


class _Watched:
    """A process that is started again when it dies, until `close`.

    Args:
        what: it is, for people.
        start: it; None: there is none.
    """

    def __init__(self, what: str, start: Callable[[], subprocess.Popen[bytes] | None]) -> None:
        self._what = what
        self._start = start
        self._process = start()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=what)
        self._thread.start()

    def close(self) -> None:
        """End it, and wait for its end."""
        self._stopping.set()
        if self._process is not None:
            _end(self._process)
        self._thread.join()

    def _watch(self) -> None:
        while self._process is not None:
            status = self._process.wait()
            _end(self._process)
            while not self._stopping.wait(_PAUSE_S):
                logger.warning("the %s: its process ended with status %d, and is started again", self._what, status)
                with contextlib.suppress(TandemError):
                    self._process = self._start()
                    break
            if self._stopping.is_set():
                if self._process is not None:
                    _end(self._process)
                    self._process.wait()
                return


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
