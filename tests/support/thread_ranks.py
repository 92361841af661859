"""Ranks of one model in threads of one process: the workers' own code between them, frames and all, but for the sums."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch
from tandem.core.config import Config
from tandem.core.frames import send_frame
from tandem.core.wire import make_cluster_keys
from tandem.engine.batch import StepInput
from tandem.engine.build import Built, build_engine
from tandem.engine.follower import Follower
from tandem.engine.rank_wire import Capture, CopyBlock, PeerAccess, encode, encode_step, receive
from tandem.kv_transfer.ends import BLOCKS, converting
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Region, Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.forwarded import forwarded
from tandem.kv_transfer.transports.inproc import InprocTransport
from tandem.kv_transfer.transports.mover import Mover
from tandem.kv_transfer.transports.mover_link import MoverLink
from torch import Tensor

CPU = torch.device("cpu")


class _Meeting:
    """Where the threads of a group lay down what they have, and take what the others have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor] = [torch.empty(0)] * size


class ThreadGroup:
    """See `engine.tensor_parallel.Group`."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=1)

    def barrier(self) -> None:
        self._meeting.barrier.wait()

    def check(self) -> None: ...

    def close(self) -> None: ...

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._meeting.parts[self.rank] = x
        self._meeting.barrier.wait()
        parts = list(self._meeting.parts)
        self._meeting.barrier.wait()
        return parts


class ThreadRanks:
    """Stands for `engine.ranks.Ranks`: the other ranks of an engine."""

    def __init__(self, builts: list[Built]) -> None:
        self.num_copies = 0
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._links: list[MoverLink] = []
        self.caches = [built.engine.cache for built in builts]
        self.movers: list[Mover] = []
        self.transports: list[Mapping[str, Transport]] = []
        self.news = threading.Event()
        for number, built in enumerate(builts, 1):
            orders, their_orders = socket.socketpair()
            mover = Mover(their_orders, _make, [Region(BLOCKS, built.engine.cache.blocks)])
            ours, theirs = socket.socketpair()
            self._connections.append(ours)
            self.movers.append(mover)
            follower = Follower(built.engine.runner, lambda access, mover=mover: self._move(mover))
            self._start(lambda theirs=theirs, follower=follower: _follow(theirs, follower))
            send_frame(ours, encode(PeerAccess(make_cluster_keys(), "127.0.0.1")))
            self._links.append(MoverLink(orders, f"rank {number}", self.news.set, lambda: self.num_copies))
            self.transports.append(forwarded(self._links[-1]))

    def compute(self, step: StepInput, eager: bool) -> None:
        self._tell(encode_step(step, eager))

    def copy_block(self, source: int, target: int) -> None:
        self.num_copies += 1
        self._tell(encode(CopyBlock(source, target)))

    def capture(self) -> None:
        self._tell(encode(Capture()))

    def memory(self, wanted_by: str) -> list[np.ndarray]:
        buffers = [cache.blocks for cache in self.caches]
        return [buffer.array for buffer in buffers if isinstance(buffer, Buffer)]

    def close(self) -> None:
        for link in self._links:
            link.close()
        for connection in self._connections:
            connection.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _move(self, mover: Mover) -> Mover:
        self._start(mover.run)
        return mover

    def _start(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def _tell(self, frame: bytes) -> None:
        for connection in self._connections:
            send_frame(connection, frame)


def build_on_threads(
    config: Config, max_running: int, max_batched_tokens: int, size: int, overlap: bool = False
) -> tuple[Built, ThreadRanks]:
    """An engine whose model ``size`` threads share, this one among them, and the others."""
    meeting = _Meeting(size)
    builts = [
        build_engine(
            config, max_running, CPU, lambda *_: None, max_batched_tokens, overlap, ThreadGroup(rank, size, meeting)
        )
        for rank in range(size)
    ]
    ranks = ThreadRanks(builts[1:])
    builts[0].engine.runner.ranks = ranks  # type: ignore[assignment]
    return builts[0], ranks


def _make(notify: Notify, on_bad_frame: Callable[[], None]) -> Mapping[str, Transport]:
    return converting({"inproc": InprocTransport(notify)})


def _follow(connection: socket.socket, follower: Follower) -> None:
    with connection, contextlib.suppress(EOFError, ConnectionError):
        while True:
            follower.obey(receive(connection))
