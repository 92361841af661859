"""A node's host tier: its folder, the process that keeps its memory, and a new one when that dies."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from ..core.config import Config
from ..core.log import configure_logging, logger
from ..kv_transfer.offload.build import start_host_tier
from .janitor import hire

_PAUSE_S = 1.0


class HostTierOwner:
    """Outlives the node's workers, so that a new life of one finds what the last one stored. When this process ends,
    however it does, the keeper ends with it, and a janitor removes the folder.

    Args:
        config: the cluster's, as JSON.
        log_folder: where its log goes.
    """

    def __init__(self, config: str, log_folder: str) -> None:
        self._config = Config.model_validate_json(config)
        log = self._config.log
        configure_logging("host-tier", log.level, log.format, Path(log_folder) / "host-tier.log")
        self._folder: Path | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def start(self, block_bytes: int) -> str:
        """Start the keeper, unless it runs. Returns the folder where the node's workers find it.

        Raises:
            ConfigError: see `build.start_host_tier`.
        """
        if self._folder is None:
            # Sockets live in this folder, and their paths must be short.
            folder = Path(tempfile.mkdtemp(prefix="tandem-host-"))
            self._janitor = hire(folder, orphan=True)
            try:
                self._keeper = start_host_tier(self._config.offload, block_bytes, folder)
            except BaseException:
                self._leave(folder)
                raise
            self._folder = folder
            self._thread = threading.Thread(target=self._watch, args=(block_bytes, folder), name="host-tier")
            self._thread.start()
        return str(self._folder)

    def stop(self) -> None:
        """End the keeper, and remove the folder. Blocks. Idempotent."""
        if self._folder is not None and not self._stopping.is_set():
            self._stopping.set()
            if self._keeper is not None:
                _end(self._keeper)
            self._thread.join()
            self._leave(self._folder)

    def _watch(self, block_bytes: int, folder: Path) -> None:
        while self._keeper is not None:
            status = self._keeper.wait()
            _end(self._keeper)
            if self._stopping.wait(_PAUSE_S):
                return
            logger.warning("the host tier's process ended with status %d: it starts again, empty", status)
            self._keeper = start_host_tier(self._config.offload, block_bytes, folder)
            if self._stopping.is_set() and self._keeper is not None:
                _end(self._keeper)

    def _leave(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._janitor.communicate()


def _end(keeper: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if keeper.stdin is not None:
            keeper.stdin.close()
