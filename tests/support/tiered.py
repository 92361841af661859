"""Workers with tiers, and all that tiers are made of: the node's keeper, a folder, an object store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from tandem.cluster.host_tier import HostTierOwner
from tandem.core.config import Config

from .processes import Processes, Sections
from .s3 import S3Server, allow

BLOCK_BYTES = 6 * 2 * 2 * 16 * 32 * 4
"""Of the demo model: layers, K and V, heads, tokens, dimensions, bytes."""
_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class TieredNode:
    """See the module. `start` makes the cluster.

    Args:
        folder: for logs and blocks.
        capacity: of each tier.
        timeout_s: of each tier.
    """

    def __init__(self, folder: Path, capacity: str = "64MiB", timeout_s: float = 1.0) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        with pytest.MonkeyPatch.context() as patch:
            allow(patch)
            self.s3 = S3Server()
        common = {"capacity": capacity, "timeout_s": timeout_s}
        self._tiers: dict[str, dict[str, Any]] = {
            "host": {"kind": "host", **common},
            "disk": {"kind": "disk", "path": str(self.disk), **common},
            "s3": {"kind": "s3", "bucket": S3Server.BUCKET, "endpoint": self.s3.endpoint, **common},
        }
        self._owner = HostTierOwner(Config.model_validate(self.tiers("host")).model_dump_json(), str(folder))
        self.cluster: Processes

    def tiers(self, *kinds: str) -> dict[str, dict[str, Any]]:
        """A configuration's section, nearest first."""
        return {"offload": {"tiers": [self._tiers[kind] for kind in kinds]}}

    def start(self, config: Sections, workers: Mapping[str, Sections]) -> None:
        """Start a gateway and workers."""
        tier = Path(self._owner.start(BLOCK_BYTES))
        self.cluster = Processes(self.folder, config, workers, host_tier=tier, environment=_KEYS)

    def keeper(self) -> psutil.Process | None:
        """The process that keeps the node's memory, if there is one at present."""
        for child in psutil.Process().children():
            if child.status() != "zombie" and any("offload.keeper" in part for part in child.cmdline()):
                return child
        return None

    def close(self) -> None:
        """End all."""
        if hasattr(self, "cluster"):
            self.cluster.close()
        self._owner.stop()
        self.s3.close()
