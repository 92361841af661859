"""What the doctor does at one place of a cluster: look at the node, and read from other places."""

from __future__ import annotations

import time

import msgspec

from ...core.config import Config
from ...core.errors import ConfigError
from ...core.wire import ClusterKeys
from ...kv_transfer.rdma import plain_tcp, rdma_devices
from ...kv_transfer.trial import BLOCK_BYTES, Offer, Rate, TrialEnd
from .finding import Finding
from .gpus import GpuLink, link_between, look_at_gpus
from .host import available_bytes, look_at_host
from .network import interface_of, look_at_network
from .software import look_at_software
from .tcp import TcpPlace, TcpSender, receive

_SENDER_LIMIT_S = 10.0


class PlaceOffer(msgspec.Struct, frozen=True):
    """What an owner's place tells readers."""

    trial: Offer
    ruled_out: dict[str, str]
    """Name → why `kv.require_rdma` would not allow it here."""
    rdma_bits_per_s: float
    """Of the fastest active RDMA port; 0 without."""
    interface_bits_per_s: float
    """Of the node's address; 0 where the system does not tell."""
    gpu: str = ""
    """UUID of the GPU whose memory is read; "": the host's is."""


class Measured(msgspec.Struct, frozen=True):
    """One transport between two places."""

    transport: str
    refused: str
    """Why it does not work, or ""."""
    rate: Rate
    ruled_out: str
    """Why `kv.require_rdma` does not allow it, or ""."""


class LinkReport(msgspec.Struct, frozen=True):
    """Everything between two places, in the order in which a worker tries the transports."""

    transports: list[Measured]
    memory: Rate
    tcp: Rate
    rdma_bits_per_s: float
    interface_bits_per_s: float
    gpu_link: GpuLink | None = None
    """Between the memories of two GPUs of one host."""


class Probe:
    """One place: in an actor, or in this process. Owned by one thread. What it returns is MessagePack.

    Args:
        peer: the worker that would live here, "prefill-0", or the node's name.
        config: as JSON.
        keys: encoded `ClusterKeys`, the same at all places.
        address: of this node.
    """

    def __init__(self, peer: str, config: str, keys: bytes, address: str) -> None:
        self._peer = peer
        self._config = Config.model_validate_json(config)
        self._keys = msgspec.msgpack.decode(keys, type=ClusterKeys)
        self._address = address
        self._end: TrialEnd | None = None
        self._sender: TcpSender | None = None

    def look(self, num_workers: int) -> bytes:
        """`list[Finding]` about this node, where ``num_workers`` would live."""
        ports = rdma_devices()
        findings: list[Finding] = [
            *look_at_software(self._address, self._config, ports),
            *look_at_host(self._address, self._config, num_workers, ports),
            *look_at_gpus(self._address, self._config),
            *look_at_network(self._address, self._address, self._config, ports),
        ]
        return msgspec.msgpack.encode(findings)

    def wall_s(self) -> float:
        """This node's clock."""
        return time.time()

    def open(self, num_bytes: int, num_here: int) -> bytes:
        """Open an end over ``num_bytes``, less where ``num_here`` such ends would not fit; a `PlaceOffer`."""
        self.close()
        pool = getattr(self._config.pools, self._peer.partition("-")[0])
        kind = "cuda" if pool.gpus_per_replica else "host"
        room = available_bytes() // (4 * num_here)
        if kind == "cuda":
            room = _free_gpu_bytes() // 4
        num_blocks = max(min(num_bytes, room) // BLOCK_BYTES, 2)
        size = num_blocks * BLOCK_BYTES
        self._end = TrialEnd(self._peer, self._keys, self._address, self._config.kv, size, kind, everything=True)
        ports = rdma_devices()
        trial = self._end.offer()
        return msgspec.msgpack.encode(
            PlaceOffer(
                trial,
                {name: why for name in trial.transports if (why := plain_tcp(name, ports))},
                max((1e9 * port.rate_gbit_s for port in ports if port.active), default=0.0),
                interface_of(self._address)[1],
                self._end.gpu,
            )
        )

    def send_tcp(self, num_bytes: int) -> bytes:
        """Wait for a reader of plain TCP; a `TcpPlace`."""
        if self._sender is not None:
            self._sender.close()
        self._sender = TcpSender(self._address, num_bytes, _SENDER_LIMIT_S)
        return msgspec.msgpack.encode(self._sender.place)

    def measure(self, offer: bytes, tcp: bytes, limit_s: float) -> bytes:
        """Read from an owner's place by every transport, each for ``limit_s`` at most; a `LinkReport`. Blocks."""
        assert self._end is not None, "open comes first"
        theirs = msgspec.msgpack.decode(offer, type=PlaceOffer)
        ports = rdma_devices()
        transports = []
        for name, refused in self._end.connect(theirs.trial).items():
            rate = Rate(0, 0.0) if refused else self._end.measure(theirs.trial, name, limit_s)
            ruled_out = plain_tcp(name, ports) or theirs.ruled_out.get(name, "")
            transports.append(Measured(name, refused, rate, ruled_out))
        mine = max((1e9 * port.rate_gbit_s for port in ports if port.active), default=0.0)
        report = LinkReport(
            transports,
            self._end.memory_rate(),
            receive(msgspec.msgpack.decode(tcp, type=TcpPlace), limit_s / 2),
            min(mine, theirs.rdma_bits_per_s),
            min(interface_of(self._address)[1], theirs.interface_bits_per_s),
            link_between(self._end.gpu, theirs.gpu) if self._end.gpu and theirs.gpu else None,
        )
        return msgspec.msgpack.encode(report)

    def close(self) -> None:
        """Let go of memory and sockets. Idempotent."""
        if self._end is not None:
            self._end.close()
            self._end = None
        if self._sender is not None:
            self._sender.close()
            self._sender = None


def _free_gpu_bytes() -> int:
    """Of the first GPU that this process sees.

    Raises:
        ConfigError: it sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device is seen here", fix="a torch for CUDA, and a driver that is new enough for it")
    return int(torch.cuda.mem_get_info(0)[0])
