"""Kernels are compiled by one process of a host; the others wait for it, unless it dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = """
from tandem.kernels.compiled import compiled

@compiled
def inner(x):
    return x * 2

@compiled
def outer(x):
    return inner(x) + 1
"""

# Says when it asks for a kernel; with "held", stands still in the middle of compiling until it is told to go on.
MAIN = """
import sys
import numpy as np
from numba.core import event
import kernels_of_a_test as kernels

class Held(event.Listener):
    def on_start(self, event):
        if event.data["dispatcher"] is kernels.outer:
            print("compiling", flush=True)
            sys.stdin.readline()
    def on_end(self, event):
        pass

if sys.argv[1] == "held":
    event.register("numba:compile", Held())
else:
    print("asking", flush=True)
for kind in sys.argv[2:]:
    assert kernels.outer(np.dtype(kind).type(3)) == 7
print(sum(kernels.outer.stats.cache_misses.values()), sum(kernels.inner.stats.cache_misses.values()))
"""


class Compiler:
    """A process that calls a kernel with arguments of some types."""

    def __init__(self, folder: Path, how: str, *kinds: str) -> None:
        (folder / "kernels_of_a_test.py").write_text(KERNELS)
        environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")}
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, how, *kinds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == ("compiling\n" if how == "held" else "asking\n")

    def compiled(self) -> list[int]:
        """Let it go on to its end: how often it had to compile, the kernel and what that calls."""
        out, _ = self.process.communicate("\n")
        assert self.process.returncode == 0
        return [int(word) for word in out.split()]


def test_one_compiles_and_the_others_load(tmp_path: Path) -> None:
    first = Compiler(tmp_path, "held", "int64")
    others = [Compiler(tmp_path, "asks", "int64") for _ in range(2)]
    assert first.compiled() == [1, 1]
    assert [other.compiled() for other in others] == [[0, 0], [0, 0]]


def test_a_dead_compiler_blocks_nobody(tmp_path: Path) -> None:
    first = Compiler(tmp_path, "held", "int64")
    other = Compiler(tmp_path, "asks", "int64")
    first.process.kill()
    first.process.communicate()
    assert other.compiled() == [1, 1]


def test_what_several_compile_is_kept_apart(tmp_path: Path) -> None:
    """Numba alone may give both the same file."""
    first = Compiler(tmp_path, "held", "int64")
    other = Compiler(tmp_path, "asks", "float64")
    assert first.compiled() == [1, 1]
    assert other.compiled() == [1, 1]
    assert Compiler(tmp_path, "asks", "float64", "int64").compiled() == [0, 0]
