"""Who owns a node's host tier: one keeper for all, a new one when it dies, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import msgspec
import psutil
import pytest
from support.gateway import wait_for
from support.living import living
from support.remote import OtherNode
from support.tiers import BLOCK_BYTES, ready
from tandem.cluster.host_tier import HostTierOwner
from tandem.core.clock import SystemClock
from tandem.core.config import Config
from tandem.core.errors import ConfigError
from tandem.kv_transfer.offload.host import HostTier

CONFIG = Config.model_validate({"offload": {"tiers": [{"kind": "host", "capacity": "64KiB"}]}}).model_dump_json()


def keepers(module: str = "offload.keeper") -> list[psutil.Process]:
    alive = [child for child in psutil.Process().children() if child.status() != "zombie"]
    return [child for child in alive if any(module in argument for argument in child.cmdline())]


def test_a_keeper_that_dies_is_replaced_and_nothing_is_left(tmp_path: Path) -> None:
    owner = HostTierOwner(CONFIG, str(tmp_path))
    folder = Path(owner.start(BLOCK_BYTES))
    assert owner.start(BLOCK_BYTES) == str(folder), "the node has one"
    news = threading.Event()
    tier = HostTier(folder / "host.socket", BLOCK_BYTES, SystemClock(), 5.0, news.set)
    ready(tier)
    [keeper] = keepers()
    keeper.kill()
    wait_for(lambda: tier.stats().away, 10, "the end of the first")
    ready(tier)
    tier.close()
    owner.stop()
    owner.stop()
    assert not folder.exists()
    wait_for(lambda: not keepers(), 10, "the end of the second")


def test_a_server_that_dies_is_replaced_where_it_was(tmp_path: Path) -> None:
    tiers = [{"kind": "host", "capacity": "1MiB"}, {"kind": "remote"}]
    config = Config.model_validate({"offload": {"tiers": tiers}, "kv": {"transport": "zmq"}}).model_dump_json()
    node = OtherNode({})
    owner = HostTierOwner(config, str(tmp_path), msgspec.msgpack.encode(node.keys), "127.0.0.1")
    owner.start(BLOCK_BYTES)
    endpoint = owner.endpoint()
    node.servers.follow({"node": endpoint})
    tier = node.tier(lambda: None, 5.0)
    wait_for(lambda: tier.stats().num_slots, 20, "the first")
    [server] = keepers("offload.remote_server")
    server.kill()
    wait_for(lambda: tier.stats().away, 10, "its end")
    wait_for(lambda: tier.stats().num_slots, 30, "the next")
    assert owner.endpoint() == endpoint
    node.close()
    owner.stop()
    wait_for(lambda: not keepers("offload."), 10, "the end of both")


def test_what_cannot_be_leaves_nothing(tmp_path: Path) -> None:
    config = Config.model_validate({"offload": {"tiers": [{"kind": "host", "capacity": "1000TiB"}]}})
    with pytest.raises(ConfigError, match=r"offload\.tiers\.0\.capacity"):
        HostTierOwner(config.model_dump_json(), str(tmp_path)).start(BLOCK_BYTES)
    assert not list(Path(tempfile.gettempdir()).glob("tandem-host-*"))


def test_an_owner_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tandem.cluster.host_tier import HostTierOwner\n"
        "owner = HostTierOwner(sys.argv[1], sys.argv[2]); print(owner.start(5000), flush=True); time.sleep(100)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, CONFIG, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    wait_for((folder / "host.socket").exists, 10, "the keeper")
    children = psutil.Process(owner.pid).children()
    assert children
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: not folder.exists(), 15, "the janitor")
    wait_for(lambda: not living(children), 10, "the end of all")
