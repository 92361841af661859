"""A life of the controller: its parts, what they keep for the next life, and how that takes over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from ..core.clock import SystemClock
from ..core.config import Config
from ..core.wire import make_cluster_keys
from .control.credentials import Credentials
from .control.server import ControlServer
from .controller import Controller
from .estate import Estate
from .gateway.listener import listen
from .node_actors import HostTiers, Supervisors
from .ray_launcher import RayLauncher
from .rebalancing import Rebalancing
from .scaling import Scaling
from .state import State


class Reign:
    """Belongs to the event loop of the controller's process. Blocks until the keeper has answered when it is made.

    Args:
        name: of the Tandem.
        config: the cluster's.
        log_folder: where all logs go.
        keeper: handle of the cluster's.
    """

    def __init__(self, name: str, config: Config, log_folder: str, keeper: Any) -> None:
        self._config = config
        self._estate = Estate(keeper)
        self._last = msgspec.msgpack.decode(self._estate.state, type=State) if self._estate.state else None
        self._keys = self._last.keys if self._last else make_cluster_keys()
        self._credentials: Credentials | None = self._last.control if self._last else None
        keys = msgspec.msgpack.encode(self._keys)
        self.launcher = RayLauncher(name, config, keys, log_folder, self._estate)
        self.controller = Controller(config, self.launcher, SystemClock(), self._keep)
        self.host_tiers = HostTiers(config, keys, log_folder, self._estate, self.controller.follow_host_tiers)
        self.supervisors = Supervisors(config, log_folder, self._estate, self.controller, self._keep)
        self._scaling = Scaling(config, self.launcher, self.controller, self._keep)
        rebalancing = Rebalancing(config, self.controller)
        self._control = ControlServer(self.controller, self._scaling, rebalancing, config.control, Path(log_folder))

    @property
    def is_first(self) -> bool:
        """Whether there was no life before."""
        return self._last is None

    async def start(self) -> None:
        """Begin a cluster; returns when everything serves.

        Raises:
            TandemError: something cannot start; everything is stopped again.
        """
        gateway = self._config.gateway
        listen(gateway.host, gateway.port).close()  # gateways share it among each other, and with nobody else
        try:
            self._credentials = await self._control.start()
            await self.launcher.choose_nodes()
            await self.controller.start()
            await self.supervisors.started()
        except BaseException:
            await self.stop(grace_s=0)
            raise

    async def take_over(self, how: str) -> None:
        """Go on where the last life ended.

        Args:
            how: it ended.

        Raises:
            ConfigError: the operators' API cannot listen.
        """
        assert self._last is not None, "there was a life before"
        self.supervisors.take_over(self._last.nodes, self._last.places, self._last.num_supervisors)
        host_tiers = self.host_tiers.take_over(self._last.host_tiers)
        await self.controller.take_over(self._last.controller, host_tiers, how)
        self._scaling.take_over(self._last.scaling)
        self._credentials = await self._control.start(self._credentials)
        self._keep()

    async def stop(self, grace_s: float) -> None:
        """End everything, gently for ``grace_s`` seconds. Idempotent."""
        await self._control.stop()
        await asyncio.gather(self.supervisors.stop(), self.controller.stop(grace_s))
        await self.host_tiers.stop()
        await self.launcher.release_all()

    def _keep(self) -> None:
        """Have the next life know what is so now."""
        nodes, places, num_supervisors = self.supervisors.state()
        state = State(
            self._keys,
            self._credentials,
            self.controller.state(),
            self._scaling.state(),
            self.host_tiers.state(),
            nodes,
            places,
            num_supervisors,
        )
        self._estate.keep(msgspec.msgpack.encode(state))
