"""All tests of UCX, in a process of their own: what it does when peers die ends the process now and then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
_FILES = ("conformance", "unit/test_kv_bench.py")
_MOST_CRASHES = 2


def test_ucx_in_a_process_of_its_own() -> None:
    """A process that UCX ends is started again; a test that fails, fails."""
    command = [sys.executable, "-m", "pytest", "-q", "--ucx", "-m", "ucx", "-p", "no:cacheprovider"]
    for _ in range(_MOST_CRASHES + 1):
        done = subprocess.run(
            [*command, *(str(_TESTS / file) for file in _FILES)], capture_output=True, text=True, timeout=300
        )
        print(done.stdout[-4000:])
        if done.returncode >= 0:
            break
        print(f"UCX ended the process by signal {-done.returncode}: {done.stderr[-2000:]}")
    assert done.returncode == 0
