"""Processes of a host compile each kernel once: one does, the others wait for it and load what it has written.

Workers start together and need the same kernels. Left alone, each compiles all of them at the same time. And what Numba
keeps on disk is not safe from two writers: both may give two signatures of a function the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock


def share(jitted: Any) -> None:
    """Let a cached Numba dispatcher compile, or load, while no other process of the host does that with the same one.

    A function is locked while those that it calls are, never the other way round: nobody waits in a circle.

    Args:
        jitted: what ``numba.njit(cache=True)`` gave.
    """
    function, compile_alone = jitted.py_func, jitted.compile
    # Beside Numba's files about it, so that all who share these share this, too.
    name = f"{Path(function.__code__.co_filename).stem}.{function.__qualname__}-{function.__code__.co_firstlineno}.lock"
    lock = _Lock(Path(jitted.stats.cache_path) / name)

    def compile_in_turn(signature: Any) -> Any:
        # First what keeps this process's threads apart, as wherever Numba compiles.
        with global_compiler_lock, lock.held():
            return compile_alone(signature)

    jitted.compile = compile_in_turn


class _Lock:
    """A file that one process at a time has locked; who dies lets go. Used under Numba's lock alone.

    Args:
        path: of the file, which stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Wait for it, as long as it takes; a thread that has it may take it again."""
        with contextlib.ExitStack() as open_file:
            if self._depth == 0:
                # Where files cannot be locked, everyone compiles.
                with contextlib.suppress(OSError):
                    descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                    open_file.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
