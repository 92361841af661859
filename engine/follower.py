"""A rank of a tensor-parallel worker that is not the first: does what it is told, until nobody tells it any more.

Run as a process with the numbers of two inherited sockets: one tells the steps, the other which KV to read, by a thread
of its own while a step computes.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from ..core.clock import SystemClock
from ..core.config import Config, KVConfig
from ..core.errors import TandemError, WorkerError
from ..core.frames import send_frame
from ..core.garbage import settle
from ..core.log import logger
from ..core.metrics import ExpertMetrics
from ..core.wire import SecureContext
from ..kv_transfer.ends import BLOCKS, open_transports
from ..kv_transfer.memory import Buffer
from ..kv_transfer.transports import Region, Transport
from ..kv_transfer.transports.base import Notify
from ..kv_transfer.transports.mover import Mover
from .build import build_engine, use_threads
from .engine import Engine
from .open_balancer import open_balancer
from .rank_wire import (
    Accompany,
    Balance,
    Built,
    Capture,
    Compute,
    CopyBlock,
    Holds,
    Message,
    PeerAccess,
    Serve,
    Task,
    encode,
    receive,
    step_of,
)  # fmt: skip
from .ranks import device_of, join
from .runner import Runner


def main(connection: socket.socket, orders: socket.socket) -> None:
    """Be a rank. Returns when the first rank is gone.

    Args:
        connection: what `rank_wire` describes.
        orders: for a `Mover`.
    """
    try:
        task = receive(connection)
    except (EOFError, ConnectionError):
        return
    if not isinstance(task, Task):
        return
    try:
        engine = _build(connection, task)
        if engine is None:
            return
        blocks = engine.cache.blocks
        holds = Holds(blocks.shared) if isinstance(blocks, Buffer) else Holds(None, blocks.handle)
        send_frame(connection, encode(holds))
        config = Config.model_validate_json(task.config)
        follower = Follower(
            engine.runner,
            lambda access: _move(engine, config.kv, access, orders),
            lambda access: _balance(engine, config, access),
        )
        while True:
            follower.obey(receive(connection))
    except (EOFError, ConnectionError):
        return
    except WorkerError as error:
        logger.error("rank %d of %d ends: %s", task.rank, task.size, error)
    finally:
        # The first rank does it, unless it was killed.
        if task.among is None:
            shutil.rmtree(Path(task.rendezvous.removeprefix("file://")).parent, ignore_errors=True)


def _build(connection: socket.socket, task: Task) -> Engine | None:
    def agree(num_blocks: int) -> int:
        send_frame(connection, encode(Built(num_blocks)))
        answer = receive(connection)
        assert isinstance(answer, Built)
        return answer.num_blocks

    device = device_of(task.device, task.rank)
    try:
        group, place = join(task.rank, task.size, task.rendezvous, device, task.among, task.learned)
        config = Config.model_validate_json(task.config)
        built = build_engine(
            config, task.max_running, device, lambda *_: None, task.max_batched_tokens, group=group, agree=agree,
            place=place,
        )  # fmt: skip
    except TandemError as error:
        send_frame(connection, encode(Built(0, str(error))))
        return None
    use_threads(built.engine, task.threads)
    return built.engine


def _move(engine: Engine, kv: KVConfig, access: PeerAccess, orders: socket.socket) -> Mover:
    """Let a thread move this rank's KV."""
    context, blocks = SecureContext(access.keys), engine.cache.blocks

    def make(notify: Notify, on_bad_frame: Callable[[], None]) -> Mapping[str, Transport]:
        return open_transports(notify, context, access.address, blocks, kv, on_bad_frame)[0]

    mover = Mover(orders, make, [Region(BLOCKS, blocks)])

    def run() -> None:
        try:
            if engine.model.device.type == "cuda":
                torch.cuda.set_device(engine.model.device)
            mover.run()
        except BaseException:  # noqa: BLE001 - whatever it was, it is told
            logger.exception("the thread that moves KV broke; the process ends")
            os._exit(70)

    threading.Thread(target=run, name="kv", daemon=True).start()
    return mover


def _balance(engine: Engine, config: Config, access: PeerAccess) -> None:
    """Let this rank's experts move."""
    experts = engine.model.experts
    if experts is not None:
        # What is counted here nobody asks for: the first rank's counts stand for the worker.
        metrics = ExpertMetrics(CollectorRegistry())
        open_balancer(experts, config, SecureContext(access.keys), access.address, _done, metrics, SystemClock())


class Follower:
    """Does what the first rank does.

    Args:
        runner: of this rank's part of the model.
        move: starts what moves its KV, when the first rank says so.
        balance: likewise, what moves its experts.
    """

    def __init__(
        self,
        runner: Runner,
        move: Callable[[PeerAccess], Mover],
        balance: Callable[[PeerAccess], None] = lambda access: None,
    ) -> None:
        self._runner = runner
        self._balance = balance
        self._move = move
        self._mover: Mover | None = None
        self._num_copies = 0

    def obey(self, message: Message) -> None:
        """Do one thing. Blocks while the other ranks are behind.

        Raises:
            ValueError: it is nothing to be done.
            WorkerError: another rank did not take part.
        """
        match message:
            case Compute():
                self._runner.run(step_of(message), eager=message.eager)
            case CopyBlock():
                self._runner.copy_block(message.source, message.target)
                self._num_copies += 1
                self._tell_copies()
            case Serve():
                self._runner.serve()
            case Accompany():
                self._runner.accompany()
            case Capture():
                self._runner.capture()
                settle()  # the last that is done before it serves
            case Balance():
                self._balance(message.access)
            case PeerAccess():
                self._mover = self._move(message)
                self._tell_copies()
            case _:
                raise ValueError(f"unexpected message {type(message).__name__}")

    def _tell_copies(self) -> None:
        """No read may land in a block that is yet to be copied, or to be copied over."""
        if self._mover is None:
            return
        wait: Callable[[], None] = _done
        if self._runner.model.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            wait = event.synchronize
        self._mover.copied(self._num_copies, wait)


def _done() -> None:
    """What a CPU was told to do, it has done."""


if __name__ == "__main__":
    main(*(socket.socket(fileno=int(number)) for number in sys.argv[1:]))
    # Work that waits for a rank that is gone never ends by itself, nor does an orderly exit.
    sys.stdout.flush()
    os._exit(0)
