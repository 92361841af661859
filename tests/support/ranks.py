"""Ranks of a group, each a process of its own, as they are in service."""

from __future__ import annotations

import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

from .forking import forking
from .interpreter import hasten


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """``function(rank, size, *arguments)`` in ``size`` processes at a time; what each returned, in the order of ranks.

    Fails with the first rank that fails, and leaves no process behind. The function is one of a module that a new
    process can import, and imports itself what the environment is to be set for.
    """
    # On a GPU a rank chooses for itself whether kernels are interpreted, before it imports any.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    context: Any = forking if interpreted else torch.multiprocessing.get_context("spawn")
    deadline_s = time.monotonic() + timeout_s
    processes, readers = [], []
    try:
        for rank in range(size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(writer, rank, size, function, arguments), daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        results: dict[int, Any] = {}
        while len(results) < size:
            waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, max(0, deadline_s - time.monotonic()))
            assert ready, f"ranks {sorted(set(range(size)) - set(results))} did not finish within {timeout_s} s"
            for rank, reader in enumerate(readers):
                if reader in ready:
                    try:
                        failure, results[rank] = reader.recv()
                    except EOFError:
                        failure = f"the process died, exit code {processes[rank].exitcode}"
                    assert not failure, f"rank {rank} of {size}:\n{failure}"
        for process in processes:
            process.join(max(1, deadline_s - time.monotonic()))
        return [results[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(writer: Any, rank: int, size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    hasten()
    try:
        result = function(rank, size, *arguments)
    except BaseException:  # noqa: BLE001
        writer.send((traceback.format_exc(), None))
        # Without a group's farewell, for which a rank that failed would make the others wait.
        os._exit(1)
    writer.send(("", result))
