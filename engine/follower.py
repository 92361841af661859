"""A rank of a tensor-parallel worker that is not the first: does what it is told, until nobody tells it any more.

Run as a process with the number of an inherited socket.
"""

from __future__ import annotations

import os
import socket
import sys

from ..core.config import Config
from ..core.errors import TandemError
from .build import build_engine, use_threads
from .rank_wire import Built, Capture, Compute, CopyBlock, Message, Task, encode, receive, send, step_of
from .ranks import device_of
from .runner import Runner
from .tensor_parallel import TorchGroup


def main(connection: socket.socket) -> None:
    """Be a rank. Returns when the first rank is gone."""
    try:
        task = receive(connection)
        if not isinstance(task, Task):
            return
        runner = _build(connection, task)
        while runner is not None:
            _obey(runner, receive(connection))
    except (EOFError, ConnectionError):
        return


def _build(connection: socket.socket, task: Task) -> Runner | None:
    def agree(num_blocks: int) -> int:
        send(connection, encode(Built(num_blocks)))
        answer = receive(connection)
        assert isinstance(answer, Built)
        return answer.num_blocks

    device = device_of(task.device, task.rank)
    try:
        group = TorchGroup(task.rank, task.size, task.rendezvous, device)
        config = Config.model_validate_json(task.config)
        built = build_engine(
            config, task.max_running, device, lambda *_: None, task.max_batched_tokens, group=group, agree=agree
        )
    except TandemError as error:
        send(connection, encode(Built(0, str(error))))
        return None
    use_threads(built.engine, task.threads)
    return built.engine.runner


def _obey(runner: Runner, message: Message) -> None:
    match message:
        case Compute():
            runner.run(step_of(message), eager=message.eager)
        case CopyBlock():
            runner.copy_block(message.source, message.target)
        case Capture():
            runner.capture()
        case _:
            raise ValueError(f"unexpected message {type(message).__name__}")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
    # Work that waits for a rank that is gone never ends by itself, nor does an orderly exit.
    sys.stdout.flush()
    os._exit(0)
