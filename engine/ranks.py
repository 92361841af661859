"""The first rank's side of a tensor-parallel worker: starts the other ranks, and tells them each step.

Every rank computes the same steps on its part of the model, and samples the same tokens; only the first has requests, a
block pool and somebody to answer to.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..core.config import ColocatedPool, Config, DecodePool, PrefillPool
from ..core.errors import ConfigError, TransferError
from ..core.frames import send_frame
from ..kernels import cuda_memory
from ..kv_transfer.memory import map_shared
from ..kv_transfer.transports import Transport
from ..kv_transfer.transports.base import Notify
from ..kv_transfer.transports.forwarded import forwarded
from ..kv_transfer.transports.mover_link import MoverLink
from .batch import StepInput
from .build import Built as BuiltEngine
from .build import Progress, build_engine
from .expert_parallel import ExpertPlace, meet
from .rank_wire import (
    Accompany,
    Balance,
    Built,
    Capture,
    CopyBlock,
    Holds,
    Message,
    PeerAccess,
    Serve,
    Task,
    encode,
    encode_step,
    receive,
)  # fmt: skip
from .tensor_parallel import Group, TorchGroup


def build_on_ranks(
    config: Config,
    pool: PrefillPool | DecodePool | ColocatedPool,
    threads: int,
    progress: Progress,
    place: ExpertPlace | None = None,
) -> tuple[BuiltEngine, Ranks | None]:
    """An engine for a pool's worker, and the other ranks if its model is shared. Blocks as `build_engine`.

    Args:
        config: the cluster's.
        pool: says on what, on how many, and how much at a time.
        threads: of the CPU, for each rank.
        progress: told what happens.
        place: among the workers that share the experts.

    Raises:
        ConfigError: as `build_engine`; the other ranks have ended then.
        WorkerError: a rank did not come.
    """
    kind = "cuda" if pool.gpus_per_replica else "cpu"
    if pool.tensor_parallel == 1:
        device = torch.device(kind)
        return build_engine(config, pool.max_running, device, progress, pool.max_batched_tokens, place=place), None
    among = None
    if place is not None:
        progress("waiting for those that share the experts", 0.0)
        among = Among(place.meet(), place.rank * pool.tensor_parallel, place.size * pool.tensor_parallel, place.learned)
    ranks = Ranks(config, pool.tensor_parallel, kind, pool.max_running, pool.max_batched_tokens, threads, among)
    try:
        group, place = ranks.join()
        built = build_engine(
            config,
            pool.max_running,
            device_of(kind, 0),
            progress,
            pool.max_batched_tokens,
            group=group,
            agree=ranks.agree,
            place=place,
        )
    except BaseException:
        ranks.close()
        raise
    built.engine.runner.ranks = ranks
    return built, ranks


def device_of(kind: str, rank: int) -> torch.device:
    """A rank's device: the GPU of its number, or the CPU."""
    return torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")


class Among(NamedTuple):
    """Where the ranks of several workers meet that share experts.

    Args:
        rendezvous: see `TorchGroup`.
        first: number of the worker's first rank among them.
        size: how many there are.
        learned: see `ExpertPlace`.
    """

    rendezvous: str
    first: int
    size: int
    learned: bytes = b""


def join(
    rank: int,
    size: int,
    rendezvous: str,
    device: torch.device,
    among: tuple[int, int] | None,
    learned: bytes = b"",
) -> tuple[Group, ExpertPlace | None]:
    """A worker's ranks, and all that share experts with them. Blocks until these are there.

    Args:
        rank: of the worker's.
        size: of the worker.
        rendezvous: where all meet.
        device: of this rank.
        among: the worker's first rank among those that share experts, and how many these are; None: nobody does.
        learned: see `ExpertPlace`.

    Raises:
        WorkerError: a rank did not come.
    """
    if among is None:
        return TorchGroup(rank, size, rendezvous, device), None
    first, total = among
    all_ranks = meet(first + rank, total, rendezvous, device)
    return all_ranks.part(size), ExpertPlace(first + rank, total, lambda: rendezvous, all_ranks, learned)


class Ranks:
    """The other ranks, each a process of this host that ends with this one.

    Args:
        config: the cluster's.
        size: ranks in all.
        device: "cuda" or "cpu".
        max_running: sequences at a time.
        max_batched_tokens: tokens of a step.
        threads: of the CPU, for each rank.
        among: those that share experts with them, if there are any.
    """

    def __init__(
        self,
        config: Config,
        size: int,
        device: str,
        max_running: int,
        max_batched_tokens: int,
        threads: int,
        among: Among | None = None,
    ) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-ranks-"))
        self._rendezvous = f"file://{self._folder}/rendezvous" if among is None else among.rendezvous
        self._among = None if among is None else (among.first, among.size)
        self._learned = b"" if among is None else among.learned
        self._device = device
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        self._orders: list[socket.socket] = []
        self._links: list[MoverLink] = []
        self._num_copies = 0
        self._memory: list[np.ndarray | int] | None = None
        self._closing = False
        document = config.model_dump_json().encode()
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            our_orders, their_orders = socket.socketpair()
            with theirs, their_orders:
                files = [theirs.fileno(), their_orders.fileno()]
                command = [sys.executable, "-m", f"{__package__}.follower", *map(str, files)]
                self._processes.append(subprocess.Popen(command, pass_fds=files, stdin=subprocess.DEVNULL))
            self._connections.append(ours)
            self._orders.append(our_orders)
            task = Task(
                document, rank, size, self._rendezvous, device, max_running, max_batched_tokens, threads, self._among,
                self._learned,
            )  # fmt: skip
            send_frame(ours, encode(task))

    def join(self) -> tuple[Group, ExpertPlace | None]:
        """The group of all ranks, and this one's place among those that share experts. Blocks until they are there.

        Raises:
            WorkerError: one did not come.
        """
        return join(0, self.size, self._rendezvous, device_of(self._device, 0), self._among, self._learned)

    def agree(self, num_blocks: int) -> int:
        """As many blocks as every rank has room for. Blocks until all have built their part.

        Raises:
            ConfigError: one could not.
        """
        answers: list[Message] = []
        for rank, connection in enumerate(self._connections, 1):
            try:
                answers.append(receive(connection))
            except (EOFError, OSError):
                raise ConfigError(f"rank {rank} of {self.size} ended while it was built", fix="see its log") from None
        built = [answer for answer in answers if isinstance(answer, Built)]
        for rank, answer in enumerate(built, 1):
            if answer.error:
                raise ConfigError(f"rank {rank} of {self.size}: {answer.error}")
        agreed = min([num_blocks, *(answer.num_blocks for answer in built)])
        self._tell(encode(Built(agreed)))
        return agreed

    def compute(self, step: StepInput, eager: bool) -> None:
        """Let the others compute a step. Returns before they have.

        Args:
            step: that this rank computes next.
            eager: without CUDA graphs.
        """
        self._tell(encode_step(step, eager))

    def copy_block(self, source: int, target: int) -> None:
        """Let the others copy a block's KV. Reads that are submitted from now on wait for it."""
        self._num_copies += 1
        self._tell(encode(CopyBlock(source, target)))

    def capture(self) -> None:
        """Let the others record their CUDA graphs."""
        self._tell(encode(Capture()))

    def serve(self) -> None:
        """Let the others begin to serve; see `Runner.serve`."""
        self._tell(encode(Serve()))

    def accompany(self) -> None:
        """Let the others take part in the next step of the ranks that share experts, with no tokens."""
        self._tell(encode(Accompany()))

    def balance(self, access: PeerAccess) -> None:
        """Let the others begin to move experts; see `open_balancer`, which this rank calls next."""
        self._tell(encode(Balance(access)))

    def transports(
        self, access: PeerAccess, notify: Notify, on_bad_frame: Callable[[], None]
    ) -> list[Mapping[str, Transport]]:
        """What moves the others' KV: for each rank, its transports by name. Blocks until all have told. Once.

        Args:
            access: how peers reach this host. The CUDA graphs must have been recorded.
            notify: as for a transport of this process; called by threads.
            on_bad_frame: called, by threads, for each frame from the network that another rank refused.

        Raises:
            WorkerError: a rank cannot, ended, or told nothing.
        """
        self._tell(encode(access))
        for rank, orders in enumerate(self._orders, 1):
            whose = f"rank {rank} of {self.size}"
            self._links.append(MoverLink(orders, whose, notify, lambda: self._num_copies, on_bad_frame))
        return [forwarded(link) for link in self._links]

    def memory(self, wanted_by: str) -> list[np.ndarray | int]:
        """The others' blocks, to be read and written: [bytes] uint8 each, or, on GPUs, where the first rank's GPU sees
        them. Blocks until all are built.

        Args:
            wanted_by: the key of the configuration that needs them.

        Raises:
            ConfigError: they are not in memory that this process can map.
        """
        if self._memory is not None:
            return self._memory
        found: list[np.ndarray | int] = []
        for rank, connection in enumerate(self._connections, 1):
            try:
                answer = receive(connection)
                if isinstance(answer, Holds) and answer.handle:
                    found.append(cuda_memory.open_handle(answer.handle, 0))
                elif isinstance(answer, Holds) and answer.host is not None:
                    found.append(map_shared(answer.host, writable=True))
                else:
                    raise TransferError("it is not in memory that processes of this system can share")
            except (EOFError, OSError, TransferError) as error:
                raise ConfigError(
                    f"{wanted_by}: KV of rank {rank} of {self.size} cannot be reached: {error}",
                    fix=f"leave {wanted_by} out, or give each worker one rank",
                ) from None
        self._memory = found
        return found

    def watch(self, lost: Callable[[int], None]) -> None:
        """From now on, call ``lost`` with the number of a rank that has ended, in a thread of its own."""
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._wait, args=(rank, process, lost), name=f"rank-{rank}", daemon=True).start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes], lost: Callable[[int], None]) -> None:
        process.wait()
        if not self._closing:
            shutil.rmtree(self._folder, ignore_errors=True)  # whoever is told may end at once
            lost(rank)

    def _tell(self, frame: bytes) -> None:
        for connection in self._connections:
            send_frame(connection, frame)

    def close(self) -> None:
        """End the other ranks. Blocks for at most some seconds. Idempotent."""
        self._closing = True
        for link in self._links:
            link.close()
        for connection in (*self._connections, *self._orders):
            connection.close()
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
