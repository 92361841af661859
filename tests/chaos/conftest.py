"""What tests of disturbed clusters compare with, and how often they are repeated."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from support.golden import Golden
from support.processes import Processes


@pytest.fixture(scope="session", autouse=True)
def first_start(compiled_kernels: None) -> None:
    """No worker of a test is the first on this host."""


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    pools = {"pools": {"colocated": {}}, "kv": {"capacity": "256MiB"}}
    with Processes(tmp_path_factory.mktemp("golden"), pools, {"colocated-0": {}}) as quiet:
        quiet.serve()
        yield Golden(quiet)


@pytest.fixture
def seeds(soak_minutes: float) -> Iterator[int]:
    """Seed 0; in a soak, random ones for as long as it takes. A failure's seed is the last that was printed."""

    def draw() -> Iterator[int]:
        yield 0
        until_s = time.monotonic() + soak_minutes * 60
        while time.monotonic() < until_s:
            seed = random.SystemRandom().randrange(1 << 31)
            print(f"seed {seed}", flush=True)
            yield seed

    return draw()
